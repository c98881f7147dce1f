"""The real TabbyAPI with SmolLM2-135M-Instruct, an unquantised model with a chat template.

The folder is made by `python tools/smollm2.py build/smollm2`, as `.ci/run` does. Without it these
tests are skipped.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import exl_loader
from support import REPO, tabby_server
from support.tabby_server import TabbyServer

MODEL = REPO / "build" / "smollm2"
pytestmark = [
    *tabby_server.MARKS[:3],
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason="no build/smollm2; python tools/smollm2.py build/smollm2 makes it",
    ),
]

OPTIONS = {"max_seq_len": 1024, "cache_size": 4096, "cache_mode": "Q8", "chunk_size": 256,
           "max_batch_size": 8}
LOADED = {"ctx_size": 1024, "cache_size": 4096, "cache_type": "q8", "chunk_size": 256,
          "max_batch_size": 8}


@pytest.fixture(scope="module")
def server(tabbyapi, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabby-smollm2")
    (folder / "models").mkdir()
    (folder / "loras").mkdir()
    (folder / "models" / "smollm2").symlink_to(MODEL, target_is_directory=True)
    # No `backend`: where exllamav3 is not installed, unquantised folders are ours.
    with TabbyServer(tabbyapi, folder, OPTIONS | {"model_name": "smollm2"}) as server:
        yield server


@pytest.fixture(scope="module")
def own():
    """The engine itself, with the server's options."""
    with exl_loader.load(MODEL, **LOADED) as model:
        yield model


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def own_answer(own, messages, **settings) -> str:
    settings = {"temperature": 0, "max_new_tokens": 24} | settings
    return "".join(own.generate(own.chat_ids(messages), settings))


def answer(server, messages, **changes) -> str:
    status, found = server.ask("v1/chat/completions", messages=messages, temperature=0,
                               **{"max_tokens": 24} | changes)
    assert status == 200, found
    return found["choices"][0]["message"]["content"]


def test_the_reservation_is_the_plans(server):
    assert server.reserved_bytes() == [exl_loader.plan(MODEL, **LOADED).total_bytes]


def test_a_chat_by_the_models_own_template(server, own):
    messages = question("What is the capital of France?")
    found = answer(server, messages)
    assert found == own_answer(own, messages) and "Paris" in found


def test_a_chat_ends_where_the_model_ends_it(server, own):
    messages = question("Say yes.")
    _, found = server.ask("v1/chat/completions", messages=messages, temperature=0, max_tokens=300)
    (choice,) = found["choices"]
    assert (choice["finish_reason"], choice["eos_reason"]) == ("stop", "stop_token")
    assert choice["message"]["content"] == own_answer(own, messages, max_new_tokens=300)


def test_a_prompt_has_the_tokens_that_the_engine_gives_it(server, own):
    text = "The capital of France is"
    assert server.text(prompt=text) == "".join(
        own.generate(text, temperature=0, max_new_tokens=12))
    # The request's own default is to add one.
    _, found = server.ask("v1/token/encode", text=text, add_bos_token=False)
    assert found["tokens"] == own.encode(text)


def test_a_word_that_the_prompt_has_begun_is_finished(server, own):
    text = "The capital of Fr"
    healed = server.text(prompt=text, token_healing=True)
    assert healed == "".join(
        own.generate(text, temperature=0, max_new_tokens=12, token_healing=True))
    assert healed.startswith("ance")


def test_32_chats_at_once_are_answered_as_each_alone(server, own):
    chats = [question(f"What is {i} plus {i}?") for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda messages: answer(server, messages), chats))
    assert found == [own_answer(own, messages) for messages in chats]


SCHEMA = {"type": "object", "required": ["city"], "additionalProperties": False,
          "properties": {"city": {"type": "string", "maxLength": 20}}}


def test_a_json_schema(server):
    found = answer(server, question("The capital of France, as JSON."), json_schema=SCHEMA,
                   max_tokens=60)
    assert "Paris" in json.loads(found)["city"]


# What SillyTavern sends to TabbyAPI with neutral samplers; it has names of several servers.
SILLYTAVERN = {
    "max_new_tokens": 24, "max_tokens": 24, "temperature": 0, "top_p": 1, "typical_p": 1,
    "typical": 1, "min_p": 0, "repetition_penalty": 1, "frequency_penalty": 0,
    "presence_penalty": 0, "top_k": 0, "skew": 0, "min_tokens": 0, "add_bos_token": True,
    "smoothing_factor": 0, "smoothing_curve": 1, "dry_allowed_length": 2, "dry_multiplier": 0,
    "dry_base": 1.75, "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]', "dry_penalty_last_n": 0,
    "max_tokens_second": 0, "stopping_strings": ["\nUser:"], "stop": ["\nUser:"],
    "truncation_length": 1024, "ban_eos_token": False, "skip_special_tokens": True, "top_a": 0,
    "tfs": 1, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "custom_token_bans": "",
    "banned_strings": [], "sampler_order": [6, 0, 1, 3, 4, 2, 5], "xtc_threshold": 0.1,
    "xtc_probability": 0, "nsigma": 0, "guidance_scale": 1, "negative_prompt": "",
    "grammar_string": "", "repetition_penalty_range": 0, "temperature_last": True,
    "dynatemp_low": 1, "dynatemp_high": 1, "dynatemp_exponent": 1, "n": 1, "api_type": "tabby",
    "json_schema": {}, "sampler_seed": -1, "seed": -1, "rep_pen": 1, "rep_pen_range": 0,
    "rep_pen_slope": 1, "repetition_decay": 0, "repeat_penalty": 1, "repeat_last_n": 0, "tfs_z": 1,
    "speculative_ngram": False, "n_predict": 24, "num_predict": 24, "num_ctx": 1024, "mirostat": 0,
    "ignore_eos": False, "model": "",
}


def test_sillytaverns_request_is_answered_and_nothing_is_reported(server, own):
    before = server.said().count("does nothing here")
    prompt = "User: What is the capital of France?\nAssistant:"
    events = list(server.events("v1/completions", prompt=prompt, stream=True, **SILLYTAVERN))
    text = "".join(event["choices"][0]["text"] or "" for event in events)
    ids = own.tokenizer.prompt_ids(prompt, add_bos=True)
    # Ids have no text before the answer, so its decoder continues them.
    stream = own.text_stream(ids, stop_strings=["\nUser:"], skip_special_tokens=False)
    expected = "".join(stream.push(token)[0] for token in own.generate_ids(
        ids, temperature=0, max_new_tokens=24, stop_strings=["\nUser:"]))
    assert text == expected and text.strip()
    assert server.said().count("does nothing here") == before
