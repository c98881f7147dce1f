"""The real TabbyAPI with the shipped model: requests of clients, loads, and what goes wrong."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import exl_loader
from support import tabby_server
from support.host_server import DEMO, PROMPT, copy_demo
from support.lora_folders import write_adapter
from support.tabby_server import TabbyServer

pytestmark = tabby_server.MARKS

CTX_SIZE = 512
# The options under which the server has the model, in the engine's names.
LOADED = {"ctx_size": CTX_SIZE, "cache_type": "q8", "chunk_size": 256}
OPTIONS = {"max_seq_len": CTX_SIZE, "cache_mode": "Q8", "chunk_size": 256,
           "prompt_template": "chatml"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabby")
    copy_demo(folder / "models", "demo", "other", "tools", "thinker")
    # TabbyAPI passes on what stands in a model's own configuration.
    (folder / "models" / "tools" / "tabby_config.yml").write_text(
        "model:\n  tool_format: mistral\n  memory_limit: 1GiB\n")
    (folder / "models" / "thinker" / "tabby_config.yml").write_text(
        "model:\n  reasoning: true\n  start_in_reasoning: always\n"
        "  reasoning_budget_tokens: 6\n  reasoning_budget_message: ' Enough.'\n")
    (folder / "loras").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(tabbyapi, folder):
    with TabbyServer(tabbyapi, folder, OPTIONS | {
        "model_name": "demo", "inline_model_loading": True,
        # An old configuration goes on working.
        "backend": "exllamav2", "use_as_default": list(OPTIONS),
    }) as server:
        yield server


@pytest.fixture(autouse=True)
def same_model(request):
    """Each test begins and ends with the same model, whatever it does meanwhile."""
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.load("demo")
        assert server.get("v1/model")["id"] == "demo"


@pytest.fixture(scope="module")
def own():
    """The engine itself, with the server's options."""
    with exl_loader.load(DEMO, **LOADED) as model:
        yield model


def own_text(own, prompt=PROMPT, **settings) -> str:
    settings = {"temperature": 0, "max_new_tokens": 12} | settings
    return "".join(own.generate(prompt, settings))


def assert_no_page_is_lost(server) -> None:
    """A text over the whole context needs all pages at once."""
    status, answer = server.ask(
        "v1/completions", prompt=PROMPT, temperature=0, max_tokens=0, ban_eos_token=True)
    assert status == 200, answer
    assert answer["choices"][0]["finish_reason"] == "length"
    status, answer = server.ask("v1/token/encode", text=PROMPT + answer["choices"][0]["text"])
    assert CTX_SIZE - 8 <= answer["length"] <= CTX_SIZE + 8


# ---- One request ----


def test_greedy_text_is_the_engines_own(server, own):
    assert server.text() == own_text(own)


def test_the_reservation_is_the_plans_and_a_line_of_the_log(server):
    planned = exl_loader.plan(DEMO, **LOADED)
    assert server.reserved_bytes()[0] == planned.total_bytes
    (device,) = planned.devices
    assert (f"demo on main memory: {planned.total_bytes:,} bytes reserved (weights "
            f"{device.weights_bytes:,}, cache {device.cache_bytes:,}, workspace "
            f"{device.workspace_bytes:,})") in server.said()


def test_the_model_card_has_the_numbers(server):
    card = server.get("v1/model")
    assert card["id"] == "demo"
    found = card["parameters"]
    assert (found["max_seq_len"], found["cache_size"], found["cache_mode"]) == (
        CTX_SIZE, CTX_SIZE, "Q8")
    assert (found["chunk_size"], found["max_batch_size"]) == (
        256, exl_loader.plan(DEMO, **LOADED).max_batch_size)
    assert found["prompt_template"] == "chatml"
    assert {card["id"] for card in server.get("v1/models")["data"]} >= {"demo", "other"}


def test_tokens(server, own):
    _, answer = server.ask("v1/token/encode", text=PROMPT)
    assert answer["tokens"] == own.encode(PROMPT)
    _, answer = server.ask("v1/token/encode", text=PROMPT, add_bos_token=False)
    assert answer["tokens"] == own.encode(PROMPT, add_bos=False)
    _, answer = server.ask("v1/token/decode", tokens=answer["tokens"])
    assert answer["text"] == own.decode(own.encode(PROMPT, add_bos=False), skip_special=False)


def test_samplers_that_upstream_ignores_work_and_are_not_reported(server, own):
    chosen = {"top_a": 0.5, "typical": 0.9, "tfs": 0.9, "smoothing_factor": 0.3,
              "dry_multiplier": 0.8, "dry_sequence_breakers": ["#"], "ban_eos_token": True,
              "min_temp": 0.5, "max_temp": 2.0}
    # DRY changes a greedy text that repeats itself.
    assert server.text(max_tokens=60, **chosen) == own_text(
        own, max_new_tokens=60, dry_multiplier=0.8, dry_sequence_breakers=["#"], dry_range=0,
        ban_eos_token=True)
    assert server.text(max_tokens=60) != server.text(max_tokens=60, **chosen)
    assert "Ignoring sampler params" not in server.said()


def test_a_skew_favours_likely_tokens(server, own):
    # At this limit the likeliest token is always drawn.
    assert server.text(temperature=1, skew=-100) == own_text(own)


def test_a_prompts_last_token_is_healed(server, own):
    prompt = "import os\nimport s"
    expected = own_text(own, prompt, token_healing=True)
    assert server.text(prompt=prompt, token_healing=True) == expected
    assert expected != own_text(own, prompt)
    assert server.text(prompt=prompt, token_healing=True, stop=["import"]) == expected.partition(
        "import")[0]


@pytest.mark.skipif(tabby_server.IS_OLD, reason="it has no reasoning budget")
def test_a_reasoning_budget_ends_the_reasoning_at_its_token(server, own):
    server.load("thinker")
    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 30}
    for more, budget, message in [
        ({}, 6, " Enough."),
        ({"reasoning_budget_tokens": 3, "reasoning_budget_message": ""}, 3, ""),
        ({"reasoning": {"max_tokens": 2}}, 2, " Enough."),
        ({"thinking_budget": 0}, 0, " Enough."),
    ]:
        status, found = server.ask("v1/chat/completions", **chat, **more)
        assert status == 200, found
        answer = found["choices"][0]["message"]
        prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        whole = own_text(
            own, prompt, max_new_tokens=30, start_in_reasoning="always",
            reasoning_budget_tokens=budget, reasoning_budget_message=message,
            skip_special_tokens=False)
        reasoning, _, content = whole.partition("</think>")
        assert reasoning.endswith(message) and content
        assert (answer["reasoning_content"] or "", answer["content"]) == (reasoning, content)
        events = server.events("v1/chat/completions", **chat, **more, stream=True)
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == reasoning
        assert "".join(delta.get("content") or "" for delta in deltas) == content
    assert "reasoning budget does nothing" not in server.said()


@pytest.mark.parametrize(("setting", "value"), [
    ("mirostat_mode", 1), ("grammar_string", "no grammar"),
])
@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
def test_a_refused_setting_is_named_to_the_client(server, path, setting, value):
    prompt = {"prompt": PROMPT} if path == "v1/completions" else {
        "messages": [{"role": "user", "content": "hi"}]}
    status, answer = server.ask(path, **prompt, max_tokens=4, **{setting: value})
    assert status == 400 and setting in answer["detail"], answer
    (event,) = server.events(path, **prompt, max_tokens=4, stream=True, **{setting: value})
    assert setting in event["error"]["message"]


def test_banned_strings_are_not_written(server, own):
    plain = server.text(max_tokens=60)
    banned = [plain[4:9].upper(), plain[20:23]]
    settings = {"max_tokens": 60, "logprobs": 1, "banned_strings": banned}
    text = own_text(own, max_new_tokens=60, banned_strings=banned)
    assert not any(word.lower() in text.lower() for word in banned)
    assert server.text(**settings) == text != plain
    events = server.events("v1/completions", prompt=PROMPT, temperature=0, stream=True, **settings)
    pieces = [choice["text"] for event in events for choice in event.get("choices", ())]
    assert "".join(pieces) == text
    # A single text is a list of one.
    assert server.text(max_tokens=60, banned_strings=banned[1]) == own_text(
        own, max_new_tokens=60, banned_strings=banned[1:])
    assert_no_page_is_lost(server)


def test_texts_can_be_bounded(server, own):
    assert re.fullmatch("[a-c]{3}[0-9]+", server.text(
        max_tokens=40, regex_pattern="[a-c]{3}[0-9]{2,9}"))
    allowed = own.encode(" sys\n", add_bos=False)
    text = server.text(max_tokens=20, allowed_tokens=allowed)
    assert text.strip() and set(text) <= set(" sys\n")
    assert text != server.text(max_tokens=20)
    # The end token is the only one that is not wanted, so the text has at least so many tokens.
    status, answer = server.ask("v1/completions", prompt=PROMPT, max_tokens=30, min_tokens=30,
                                stream_options={"include_usage": True})
    assert status == 200 and answer["usage"]["completion_tokens"] == 30


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(server):
    long = "import os\n" * CTX_SIZE
    status, answer = server.ask("v1/completions", prompt=long, max_tokens=4)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert f"{CTX_SIZE:,} tokens (max_seq_len)" in answer["error"]["message"]
    status, answer = server.ask("v1/completions", prompt=long, max_tokens=4, stream=True)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert_no_page_is_lost(server)


def test_a_text_that_repeats_itself_ends_where_the_client_asks_for_that(server):
    _, answer = server.ask("v1/completions", prompt=PROMPT, temperature=0, max_tokens=400,
                           ban_eos_token=True, loop_detect_window=100)
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["eos_reason"]) == ("stop", "loop_detected")


# ---- The openai package ----


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


CHAT = [{"role": "user", "content": "def main():"}]


def chat_prompt() -> str:
    return ("<|im_start|>user\ndef main():<|im_end|>\n<|im_start|>assistant\n")


def test_openai_completion(client, own):
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.text == own_text(own) and choice.finish_reason == "length"


def test_openai_completions_of_several_prompts_and_n(client, own):
    prompts = [PROMPT, "def main():\n"]
    answer = client.completions.create(
        model="demo", prompt=prompts, n=2, max_tokens=12, temperature=0)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]
    assert texts == [own_text(own, prompt) for prompt in prompts for _ in range(2)]


def test_openai_stream_is_the_text_in_pieces(client, own):
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text or "" for c in chunks if c.choices) == own_text(own)
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == len(own.encode(PROMPT))


def test_openai_stop(client, own):
    whole = own_text(own, max_new_tokens=40)
    stop = whole[10:16]
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].eos_reason == "stop_string"


def test_openai_logprobs(client, own):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    ids = own.encode(PROMPT)
    generation = own.generate_ids(ids, temperature=0, max_new_tokens=12, logprobs=3)
    list(generation)
    assert found.token_logprobs == [entry.logprob for entry in generation.logprobs]
    assert "".join(found.tokens) == own_text(own) == answer.choices[0].text
    for shown, entry in zip(found.top_logprobs, generation.logprobs, strict=True):
        assert list(shown.values()) == [logprob for _, logprob in entry.top]


def test_openai_chat(client, own):
    answer = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=12, temperature=0)
    expected = own_text(own, chat_prompt())
    assert answer.choices[0].message.content == expected
    stream = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=12, temperature=0, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == expected


@pytest.mark.skipif(tabby_server.IS_OLD, reason="it gives none where no tags are configured")
def test_openai_chat_logprobs_and_n(client):
    answer = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2,
        n=3)
    assert len(answer.choices) == 3
    for choice in answer.choices:
        content = choice.logprobs.content
        assert "".join(entry.token for entry in content) == choice.message.content
        for entry in content:
            assert len(entry.top_logprobs) == 2
            # A greedy token is the likeliest one.
            assert entry.top_logprobs[0].logprob == entry.logprob


def test_openai_seeds_differ_between_answers(client):
    answer = client.completions.create(
        model="demo", prompt=PROMPT, n=4, max_tokens=30, temperature=1.5)
    assert len({choice.text for choice in answer.choices}) > 1


SCHEMA = {
    "type": "object", "required": ["name", "count"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 5}, "count": {"enum": [1, 2, 3]}},
}


def test_openai_json_schema(client):
    answer = client.chat.completions.create(
        model="demo", messages=CHAT, max_tokens=100, temperature=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "count"} and found["count"] in (1, 2, 3)


TOOLS = [{"type": "function", "function": {
    "name": "add", "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
# In the format mistral: the grammar writes what a model with tools would.
CALL = 'root ::= "[TOOL_CALLS]add[ARGS]{\\"a\\": 3}"'


@pytest.mark.skipif(tabby_server.IS_OLD, reason="it finds tags only where they are one token")
def test_openai_tools_are_parsed_by_the_server(client, server):
    server.load("tools")
    answer = client.chat.completions.create(
        model="tools", messages=CHAT, max_tokens=60, tools=TOOLS,
        extra_body={"grammar_string": CALL})
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 3}
    assert answer.choices[0].finish_reason == "tool_calls"


# ---- Kobold ----

KOBOLD = {"prompt": PROMPT, "max_length": 12, "temperature": 0}


def test_kobold(server, own):
    status, answer = server.ask("api/v1/generate", **KOBOLD)
    assert status == 200 and answer["results"][0]["text"] == own_text(own)
    pieces = list(server.events("api/extra/generate/stream", **KOBOLD))
    assert "".join(piece["token"] for piece in pieces) == own_text(own)
    assert server.get("api/v1/config/max_length")["value"] == CTX_SIZE
    _, counted = server.ask("api/extra/tokencount", prompt=PROMPT)
    assert counted["value"] == len(own.encode(PROMPT))


def test_kobold_abort(server):
    stream = server.events("api/extra/generate/stream", prompt=PROMPT, genkey="mine",
                           max_length=0, use_default_badwordsids=True)
    next(stream)
    server.ask("api/extra/abort", genkey="mine")
    rest = list(stream)
    assert len(rest) < CTX_SIZE
    assert_no_page_is_lost(server)


def test_kobold_names_a_refused_setting(server):
    status, answer = server.ask("api/v1/generate", **KOBOLD, banned_strings=["a" * 2000])
    assert status == 400 and "banned_strings" in answer["detail"]


# ---- Many clients ----


def test_32_at_once_get_the_texts_that_they_get_alone(server, own):
    prompts = [f"import os\nclass C{i}:\n" for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda prompt: server.text(prompt=prompt, max_tokens=24), prompts))
    assert texts == [own_text(own, prompt, max_new_tokens=24) for prompt in prompts]
    assert_no_page_is_lost(server)


def endless(server, **changes):
    return server.events("v1/completions", prompt=PROMPT, stream=True, max_tokens=CTX_SIZE,
                         ban_eos_token=True, **changes)


def wait_until_idle(server) -> None:
    """Wait until the log says of each request that its client has gone."""
    deadline = time.monotonic() + 60
    while server.said().count("was ended by its client") < wait_until_idle.expected:
        assert time.monotonic() < deadline, server.said()[-3000:]
        time.sleep(0.1)


def test_clients_that_disconnect_lose_no_page(server, own):
    wait_until_idle.expected = server.said().count("was ended by its client") + 6
    # Each leaves after its first piece; the others wait for pages meanwhile.
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: next(endless(server)), range(6)))
    wait_until_idle(server)
    assert server.text() == own_text(own)
    assert_no_page_is_lost(server)


# ---- Loads and unloads ----


def test_a_load_reports_its_steps(server):
    server.ask("v1/model/unload")
    events = server.load("other")
    assert [event["module"] for event in events[:-1]] == list(range(1, 101))
    assert events[-1]["status"] == "finished" and events[-1]["modules"] == 100
    assert {event["model_type"] for event in events} == {"model"}


def test_a_load_that_does_not_fit_is_refused_with_numbers_and_the_server_goes_on(server, own):
    (event,) = server.load("other", max_seq_len=1 << 26, rope_alpha=1.0, cache_mode="FP16")
    message = event["error"]["message"]
    assert "a context of 67108864 tokens with cache fp16 does not fit" in message
    assert "GiB missing" in message and "the largest context is" in message, message
    # The branch exl2-checkpoint answers no completion any more after one without a model.
    assert server.ask("v1/model", "GET")[0] == 503
    assert server.load("demo")[-1]["status"] == "finished"
    assert server.text() == own_text(own)
    assert_no_page_is_lost(server)


@pytest.mark.parametrize(("options", "named"), [
    ({"cache_mode": "5,5"}, "cache_mode"), ({"backend": "vllm"}, "vllm"),
    ({"chunk_size": 0}, "chunk_size"), ({"cache_size": 256, "gpu_split": [-1]}, "gpu_split"),
])
def test_an_option_that_cannot_be_honoured_is_named(server, options, named):
    (event,) = server.load("other", **options)
    assert named in event["error"]["message"]


def test_a_damaged_folder_is_named_and_the_server_goes_on(server, folder, own):
    broken = folder / "models" / "broken"
    if not broken.exists():
        copy_demo(folder / "models", "broken")
        (broken / "output.safetensors").write_bytes(b"\0" * 100)
    (event,) = server.load("broken")
    assert "output.safetensors" in event["error"]["message"]
    server.load("demo")
    assert server.text() == own_text(own)


def test_a_models_own_configuration_may_have_options_of_the_engine(server):
    (event,) = server.load("tools", cache_size=1 << 23, rope_alpha=1.0, cache_mode="FP16")
    assert "limit" in event["error"]["message"] and "1.00 GiB" in event["error"]["message"]


def test_a_length_that_is_not_set_takes_what_fits_and_says_so(server):
    server.ask("v1/model/unload")
    server.load("other", max_seq_len=-1)
    own_length = exl_loader.plan(DEMO).own_length
    assert server.get("v1/model")["parameters"]["max_seq_len"] == own_length


def test_a_model_is_unloaded_under_load_and_its_clients_are_told(server, own):
    streams = [endless(server) for _ in range(3)]
    next(streams[0])
    assert server.ask("v1/model/unload")[0] == 200
    (*_, last) = streams[0]
    assert "unloaded" in last["error"]["message"]
    # The branch exl2-checkpoint answers no completion any more after one without a model.
    assert server.ask("v1/model", "GET")[0] == 503
    server.load("demo")
    assert server.text() == own_text(own)
    assert_no_page_is_lost(server)


def test_a_load_waits_for_running_requests(server, own):
    stream = server.events("v1/completions", prompt=PROMPT, stream=True, max_tokens=60,
                           temperature=0, ban_eos_token=True)
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(server.load, "other")
        rest = list(stream)
        loading.result(120)
    text = "".join(event["choices"][0]["text"] or "" for event in [first, *rest])
    assert text == own_text(own, max_new_tokens=60, ban_eos_token=True)
    assert server.get("v1/model")["id"] == "other"


def test_a_model_can_be_named_in_a_request(server, own):
    assert server.text(model="other") == own_text(own)
    assert server.get("v1/model")["id"] == "other"


def test_the_server_is_healthy(server):
    status, answer = server.ask("health", method="GET")
    assert status == 200, answer


# ---- Drafts ----


@pytest.mark.parametrize("draft", [
    {"draft_model_name": "other"}, {"draft_mode": "ngram", "draft_num_tokens": 5}])
def test_drafts_change_no_text(tabbyapi, folder, own, draft):
    with TabbyServer(tabbyapi, folder, OPTIONS | {"model_name": "demo"},
                     draft_model=draft) as server:
        text = server.text(max_tokens=100, ban_eos_token=True)
        assert text == own_text(own, max_new_tokens=100, ban_eos_token=True)
        card = server.get("v1/model")["parameters"]
        assert (card["draft"] or {}).get("id") == draft.get("draft_model_name")
        if "draft_model_name" in draft:
            planned = exl_loader.plan(DEMO, **LOADED, model_draft=DEMO)
            assert server.reserved_bytes() == [planned.total_bytes]


def test_a_load_with_a_draft_model_reports_a_bar_of_each(server, own):
    server.ask("v1/model/unload")
    events = server.load("other", draft_model={"draft_model_name": "demo"})
    steps = [(event["model_type"], event["module"], event["status"]) for event in events]
    assert steps == [
        (kind, step, status)
        for kind in ("draft", "model")
        for step, status in [*((i, "processing") for i in range(1, 101)), (100, "finished")]
    ]
    assert {event["modules"] for event in events} == {100}
    assert server.get("v1/model")["parameters"]["draft"]["id"] == "demo"
    assert server.text() == own_text(own)


# ---- Starting ----


def test_a_model_that_does_not_fit_ends_the_server_with_the_numbers(tabbyapi, folder):
    with pytest.raises(AssertionError) as said:
        with TabbyServer(tabbyapi, folder, {
            "model_name": "demo", "max_seq_len": 1 << 26, "rope_alpha": 1.0}):
            pass
    assert "InsufficientMemory" in str(said.value) and "GiB missing" in str(said.value)


def test_the_launcher_starts_the_server_where_there_is_no_hook(tabbyapi, folder, own):
    from extension.install import plugin_files
    from extension.install.environment import TABBYAPI, find_python
    from support import REPO

    site = find_python(tabbyapi, tabby_server.PYTHON, TABBYAPI).site_packages
    pth = site / plugin_files.TABBYAPI_HOOK.pth
    kept = pth.read_text()
    pth.unlink()
    try:
        launcher = REPO / "extension" / "tabby" / "launcher.py"
        with TabbyServer(tabbyapi, folder, OPTIONS | {"model_name": "demo"},
                         launcher=launcher) as server:
            assert server.text() == own_text(own)
    finally:
        pth.write_text(kept)


# ---- LoRAs ----


def test_loras_are_loaded_listed_and_unloaded(server, folder, own):
    shapes = {f"model.layers.{layer}.mlp.up_proj": (704, 256) for layer in range(5)}
    write_adapter(folder / "loras" / "first", shapes)
    assert [card["id"] for card in server.get("v1/loras")["data"]] == ["first"]
    status, answer = server.ask("v1/lora/load", loras=[
        {"name": "first", "scaling": 0.5}, {"name": "missing"}])
    assert status == 200 and answer == {"success": ["first"], "failure": ["missing"]}
    (card,) = server.get("v1/lora")["data"]
    assert (card["id"], card["scaling"]) == ("first", 0.5)
    with exl_loader.load(DEMO, **LOADED, loras=[(folder / "loras" / "first", 0.5)]) as model:
        expected = own_text(model)
        assert server.reserved_bytes()[-1] == model.reservation.total_bytes
    assert server.text() == expected
    assert server.ask("v1/lora/unload")[0] == 200
    assert server.get("v1/lora")["data"] == [] and server.text() == own_text(own)


def test_loras_of_the_configuration_are_loaded_at_the_start(tabbyapi, folder):
    shapes = {f"model.layers.{layer}.mlp.up_proj": (704, 256) for layer in range(5)}
    write_adapter(folder / "loras" / "second", shapes, seed=1)
    with TabbyServer(tabbyapi, folder, OPTIONS | {"model_name": "demo"},
                     lora={"loras": [{"name": "second", "scaling": 0.25}]}) as server:
        (card,) = server.get("v1/lora")["data"]
        assert (card["id"], card["scaling"]) == ("second", 0.25)
        with exl_loader.load(DEMO, **LOADED, loras=[(folder / "loras" / "second", 0.25)]) as model:
            assert server.text() == own_text(model)
