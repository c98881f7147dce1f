"""The plugin in a real text-generation-webui without its page: loads, requests, refusals.

Needs TEXTGEN_WEBUI_DIR, see support.webui_server.
"""

from __future__ import annotations

import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import exl_loader
from extension.install import saved_settings
from support.host_server import GREEDY, PROMPT
from support.lora_folders import write_adapter
from support.webui_server import MARKS, Server, StreamError

pytestmark = MARKS

# A header without tensors and without metadata.
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)

ENDLESS = {"max_tokens": 450, "temperature": 1, "ban_eos_token": True}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder of LoRAs: one of the demo model, and one of a model with more layers."""
    folder = tmp_path_factory.mktemp("loras")
    shapes = {f"model.layers.{i}.self_attn.o_proj": (256, 256) for i in range(5)}
    write_adapter(folder / "mine", shapes, rank=8)
    write_adapter(folder / "other", {"model.layers.9.self_attn.o_proj": (256, 256)})
    return folder


@pytest.fixture(scope="module")
def server(webui, webui_models, loras):
    with Server(webui, webui_models, "--lora-dir", str(loras)) as running:
        yield running


def test_load_generate_and_unload(server, greedy_text):
    assert server.load(ctx_size=512, cache_4bit=True) == "OK"
    assert server.info()["loader"] == "ExLlamav2"
    assert server.text() == greedy_text
    chat = server.post("chat/completions", messages=[{"role": "user", "content": "Hi"}],
                       max_tokens=8)
    assert chat["choices"][0]["message"]["content"]
    # v4.0 answers nothing, later versions answer OK.
    assert server.post("internal/model/unload") in ("OK", None)
    assert server.info()["model_name"] == "None"


def test_transformers_samplers_guidance_and_grammar(server, greedy_text):
    assert server.load(loader="ExLlamav2_HF", ctx_size=512, cache_type="q4") == "OK"
    assert server.info()["loader"] == "ExLlamav2_HF"
    assert server.text() == greedy_text
    assert server.text(guidance_scale=1.5, negative_prompt="something else")
    answer = server.text(grammar_string='root ::= "yes" | "no"', temperature=1)
    assert answer in ("yes", "no")


def test_native_guidance_grammar_and_bans_are_the_engines(server, webui_models):
    server.load(ctx_size=512, cache_4bit=True)
    (newline,) = server.post("internal/encode", text="\n")["tokens"][-1:]
    wishes = [{"guidance_scale": 4.0, "negative_prompt": "class"},
              {"grammar_string": 'root ::= "yes" | "no"'},
              {"custom_token_bans": str(newline)}]
    found = [server.text(**wish) for wish in wishes]
    with exl_loader.load(webui_models / "demo", ctx_size=512, cache_type="q4") as model:
        settings = {"temperature": 0, "max_new_tokens": GREEDY["max_tokens"]}
        expected = ["".join(model.generate(PROMPT, settings | wish)) for wish in wishes]
    assert found == expected and len({*found, server.text()}) == 4


def test_a_draft_model_changes_the_reservation_and_no_text(server, greedy_text, webui_models):
    # The draft model is the model itself, so every guess is right.
    load = server.load(ctx_size=512, cache_4bit=True, model_draft="demo", ctx_size_draft=256,
                       draft_max=3)
    assert load == "OK" and server.text() == greedy_text
    # v4.8 took the draft model's own context out of the page and the API.
    had = "'ctx_size_draft'" in (server.root / "modules/loaders.py").read_text()
    planned = exl_loader.plan(webui_models / "demo", ctx_size=512, cache_type="q4",
                              ctx_size_draft=256 if had else 0,
                              model_draft=webui_models / "demo")
    assert server.reserved_bytes()[-1] == planned.total_bytes
    # Options of an earlier load are forgotten; up to v4.3 the web UI keeps them.
    assert server.load(ctx_size=512, cache_4bit=True, model_draft=None) == "OK"
    assert server.reserved_bytes()[-1] < planned.total_bytes


def test_log_probabilities_biases_and_echo(server):
    server.load(ctx_size=512)
    choice = server.post("completions", **GREEDY, logprobs=3)["choices"][0]
    # v4.0 returns only the alternatives of the tokens.
    top = choice["logprobs"]["top_logprobs"]
    assert all(0 < len(t) <= 3 and max(t.values()) < 0 for t in top)
    if "tokens" not in choice["logprobs"]:
        return
    assert len(top) == 12 and "".join(choice["logprobs"]["tokens"]) == choice["text"]
    echo = server.post("completions", **GREEDY, logprobs=1, echo=True)["choices"][0]
    assert echo["text"] == PROMPT + choice["text"]
    # Up to v4.2 prompt tokens have no log probabilities.
    if len(echo["logprobs"]["tokens"]) > 12:
        assert "".join(echo["logprobs"]["tokens"]) == echo["text"]
        assert echo["logprobs"]["token_logprobs"][0] is None
    chat = server.post("chat/completions", messages=[{"role": "user", "content": "Hi"}],
                       max_tokens=4, logprobs=True, top_logprobs=2, temperature=0)
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 4 and all(len(c["top_logprobs"]) == 2 for c in content)
    (token,) = server.post("internal/encode", text="x")["tokens"][-1:]
    biased = server.text(logit_bias={str(token): 100}, max_tokens=3)
    assert biased.replace(" ", "") == "xxx"


def test_token_counts_and_logits(server):
    server.load(ctx_size=512)
    tokens = server.post("internal/encode", text=PROMPT)["tokens"]
    assert server.post("internal/token-count", text=PROMPT)["length"] == len(tokens)
    plain = server.post("internal/logits", prompt=PROMPT, use_samplers=False)
    sampled = server.post("internal/logits", prompt=PROMPT, use_samplers=True, top_k=5)
    plain, sampled = plain.get("logits", plain), sampled.get("logits", sampled)
    assert max(plain, key=plain.get).strip("▁ ") == max(sampled, key=sampled.get).strip("▁ ")
    assert sum(value > 0 for value in sampled.values()) == 5


def test_requests_at_once_and_the_same_seed(server):
    server.load(ctx_size=2048)
    wanted = [{"prompt": f"{PROMPT} {i}", "temperature": 1, "seed": i, "max_tokens": 20}
              for i in range(4)]
    alone = [server.text(**w) for w in wanted]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: server.text(**w), wanted))
    assert together == alone


def wait_for_text(pieces):
    """Read up to the first text: the web UI sends an empty piece before it begins to generate."""
    assert any(piece != "" for piece in pieces)


def test_a_client_that_hangs_up_stops_its_own_request_only(server):
    server.load(ctx_size=1024)
    staying = {"seed": 1, "temperature": 1, "max_tokens": 60, "ban_eos_token": True}
    expected = server.text(**staying)
    written = server.said().count("Output generated")
    slow = {"max_tokens_second": 15}
    with ThreadPoolExecutor(1) as pool:
        leaving = server.stream(**ENDLESS, **slow, seed=2)
        other = pool.submit(lambda: "".join(server.stream(**staying, **slow)))
        wait_for_text(leaving)
        leaving.close()
        assert other.result(300) == expected
    deadline = time.monotonic() + 300
    while server.said().count("Output generated") < written + 2:
        assert time.monotonic() < deadline, server.said()[-2000:]
        time.sleep(0.2)
    assert "450 tokens, context" not in server.said()


def test_stopping_from_outside(server):
    server.load(ctx_size=1024)
    pieces = server.stream(**ENDLESS, max_tokens_second=15)
    wait_for_text(pieces)
    server.post("internal/stop-generation")
    assert len(list(pieces)) < ENDLESS["max_tokens"] / 2


def test_a_load_during_a_generation_ends_it_and_serves_the_next(server, greedy_text):
    server.load(ctx_size=1024)
    pieces = server.stream(**ENDLESS, max_tokens_second=15)
    wait_for_text(pieces)
    assert server.load(ctx_size=512, cache_4bit=True) == "OK"
    try:
        list(pieces)
    except StreamError as error:
        assert "unloaded" in str(error)
    except (OSError, ValueError):
        pass  # The web UI may end the stream with an error of its own.
    assert server.text() == greedy_text and server.info()["model_name"] == "demo"


def test_two_loads_at_once_leave_one_model(server, greedy_text):
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(server.load, ctx_size=512, cache_type=c) for c in ("q8", "q4")]
        assert [load.result() for load in loads] == ["OK", "OK"]
    assert server.text()
    assert server.load(ctx_size=512, cache_4bit=True) == "OK" and server.text() == greedy_text


@pytest.mark.parametrize(
    ("args", "cache_type"),
    [({"cache_type": "q8_0"}, "q8"), ({"cache_type": "fp8"}, "q8"), ({"cache_type": "Q4"}, "q4"),
     ({"cache_type": "q4_0"}, "q4"), ({"cache_type": "q8_q4"}, "q8_q4"),
     ({"cache_8bit": True}, "q8"), ({"cache_8bit": True, "cache_4bit": True}, "q8"),
     ({"cache_type": "q6", "cache_4bit": True}, "q6")])
def test_spellings_of_the_cache_type(server, webui_models, args, cache_type):
    # Up to v4.3 the web UI keeps the options of an earlier load.
    plain = {"cache_type": "fp16", "cache_8bit": False, "cache_4bit": False}
    assert server.load(ctx_size=512, **plain | args) == "OK"
    assert server.reserved_bytes()[-1] == exl_loader.plan(
        webui_models / "demo", ctx_size=512, cache_type=cache_type).total_bytes


def test_refusals_leave_no_model_and_the_reason_in_the_log(server, webui_models):
    server.load(ctx_size=512)
    assert server.load(cache_type="q5") in (400, 500)
    assert "expected one of" in server.said()
    assert server.load(name="absent") in (400, 500)
    shutil.copytree(webui_models / "demo", webui_models / "vanishing")
    assert server.load("vanishing", ctx_size=512, cache_type="fp16") == "OK"
    shutil.rmtree(webui_models / "vanishing")
    assert server.load("vanishing", ctx_size=512) in (400, 500)
    assert server.info()["model_name"] in ("None", "vanishing")
    # Up to v4.3 the web UI keeps the options of a load that failed.
    assert server.load(ctx_size=512, cache_type="fp16") == "OK" and server.text()


def refused(server, name="demo", **args):
    """Start a load that fails; return the reason that the client gets."""
    asked = {"model_name": name, "args": {"loader": "ExLlamav2", "ctx_size": 512} | args}
    status, answer = server.ask("internal/model/load", **asked, settings={})
    assert status in (400, 500)
    head, _, reason = answer["detail"].partition(": ")
    assert head == "Failed to load the model" and "report" not in reason
    return reason


def test_a_load_that_fails_tells_the_client_why(server, webui_models):
    for value in (-5, "abc", 512.5):
        assert refused(server, ctx_size=value).startswith("ctx_size: expected")
    assert refused(server, cache_8bit="maybe").startswith("cache_8bit: expected true or false")
    assert refused(server, alpha_value=-1).startswith("alpha_value: expected")
    assert refused(server, loader="nonsense").startswith("loader: expected")
    assert "absent" in refused(server, "absent")
    damaged = webui_models / "damaged"
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copytree(webui_models / "demo", damaged)
        text = (damaged / name).read_text()
        (damaged / name).write_text(text[: len(text) // 2])
        reason = refused(server, "damaged")
        assert name in reason and "valid JSON" in reason and "Download" in reason
        shutil.rmtree(damaged)
    (webui_models / "single.gguf").write_bytes(GGUF)
    try:
        assert "llama.cpp" in refused(server, "single.gguf")
    finally:
        (webui_models / "single.gguf").unlink()
    assert server.load(ctx_size=512) == "OK" and server.text()


def test_a_request_that_fails_tells_the_client_why(server):
    for loader in ("ExLlamav2", "ExLlamav2_HF"):
        assert server.load(loader=loader, ctx_size=512) == "OK"
        for wish, word in (({"grammar_string": "root ::= missing"}, "grammar_string"),
                           ({"temperature": -3}, "temperature")):
            status, answer = server.ask("completions", **GREEDY | wish)
            assert status == 400 and word in answer["error"]["message"]
            status, answer = server.ask(
                "chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=4,
                **wish)
            assert status == 400 and word in answer["error"]["message"]
            with pytest.raises(StreamError, match=word):
                list(server.stream(**wish))
        assert server.text()


def test_a_folder_without_tokenizer_answers_a_chat_with_an_error(server, webui_models):
    mute = shutil.copytree(webui_models / "demo", webui_models / "mute")
    try:
        for path in mute.glob("tokenizer*"):
            path.unlink()
        assert server.load("mute", ctx_size=512) == "OK"
        assert any("tokenizer" in warning for warning in server.info()["warnings"])
        for path, body in (("completions", GREEDY), ("internal/encode", {"text": "x"}), (
                "chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})):
            status, answer = server.ask(path, **body)
            assert status == 400 and "tokenizer" in answer["error"]["message"]
        assert "tokenizer" in refused(server, "mute", loader="ExLlamav2_HF")
    finally:
        shutil.rmtree(mute)


def test_a_question_that_fits_is_kept_whole_and_the_answer_gets_the_rest(server):
    question = "x = 1\n" * 80
    long = {"prompt": question, "max_tokens": 900, "temperature": 0, "ban_eos_token": True}
    texts = []
    for loader in ("ExLlamav2", "ExLlamav2_HF"):
        assert server.load(loader=loader, ctx_size=512) == "OK"
        count = server.post("internal/token-count", text=question)["length"]
        assert 256 < count < 512
        before = server.said().count("is full: the answer ends")
        choice = server.post("completions", **long)["choices"][0]
        assert choice["finish_reason"] == "length" and choice["text"]
        assert f"room for only {512 - count} of the 900 new tokens asked for" in server.said()
        assert server.said().count("is full: the answer ends") == before + 1
        # The answer differs if the prompt has been cut.
        texts.append(choice["text"])
        server.post("completions", **long | {"prompt": question * 4, "max_tokens": 100})
        assert "its last 412 tokens were kept" in server.said().rpartition("CONTEXT LENGTH")[2]
    assert texts[0] == texts[1]


def test_a_context_beyond_the_models_own_length_is_reported(server):
    assert server.load(ctx_size=2048) == "OK"
    (warning,) = server.info()["warnings"]
    assert "alpha_value 2.6 or compress_pos_emb 2" in warning
    assert f"exl_loader: {warning}" in server.said()
    assert server.load(ctx_size=1024) == "OK" and "warnings" not in server.info()


@pytest.mark.parametrize("loader", ["ExLlamav2", "ExLlamav2_HF"])
def test_loras(server, greedy_text, webui_models, loras, loader):
    server.load(loader=loader, ctx_size=512, cache_4bit=True)
    assert server.get("internal/lora/list") == {"lora_names": ["mine", "other"]}
    assert server.post("internal/lora/load", lora_names=["mine"]) == "OK"
    assert server.info()["lora_names"] == ["mine"]
    options = {"ctx_size": 512, "cache_type": "q4", "loras": [loras / "mine"]}
    with exl_loader.load(webui_models / "demo", **options) as model:
        settings = {"temperature": 0, "max_new_tokens": GREEDY["max_tokens"]}
        expected = "".join(model.generate(PROMPT, settings))
        assert server.reserved_bytes()[-1] == model.reservation.total_bytes
    assert server.text() == expected != greedy_text
    status, answer = server.ask("internal/lora/load", lora_names=["other"])
    assert status == 400 and "model.layers.9.self_attn.o_proj" in answer["detail"]
    assert server.info()["lora_names"] == ["mine"] and server.text() == expected
    assert server.post("internal/lora/unload") == "OK"
    assert server.info()["lora_names"] == [] and server.text() == greedy_text


def test_the_flag_of_loras(webui, webui_models, loras, greedy_text):
    flags = ["--model", "demo", "--ctx-size", "512", "--cache-4bit", "--lora-dir", str(loras)]
    with Server(webui, webui_models, *flags, "--lora", "mine") as server:
        assert server.info()["lora_names"] == ["mine"] and server.text() != greedy_text
    with Server(webui, webui_models, *flags, "--lora", "other") as server:
        assert server.info()["lora_names"] == [] and server.text() == greedy_text
        assert "no LoRA was applied" in server.said()


def test_an_error_of_a_generation_is_one_line_in_the_log(server, greedy_text):
    server.load(ctx_size=512, cache_4bit=True)
    before = server.said().count("exl_loader: grammar_string")
    server.post("completions", **GREEDY, grammar_string="root ::= missing")
    assert server.said().count("exl_loader: grammar_string") == before + 1
    assert server.text() == greedy_text


def test_the_command_line(webui, webui_models, greedy_text):
    flags = ["--model", "demo", "--loader", "exllama-v2", "--cache-4bit", "--ctx-size", "512"]
    with Server(webui, webui_models, *flags) as server:
        assert server.info() == {"model_name": "demo", "lora_names": [], "loader": "ExLlamav2"}
        assert server.text() == greedy_text


def test_the_command_line_recognises_the_model_and_saved_settings(
    webui, webui_models, greedy_text
):
    settings = "demo$:\n  loader: ExLlamav2_HF\n  max_seq_len: 512\n  cache_4bit: true\n"
    (webui_models / saved_settings.CONFIG).write_text(settings)
    try:
        with Server(webui, webui_models, "--model", "demo") as server:
            assert server.info()["loader"] == "ExLlamav2_HF"
            assert server.text() == greedy_text
    finally:
        (webui_models / saved_settings.CONFIG).unlink()


def test_idle_models_are_unloaded_and_reloaded_with_their_options(
    webui, webui_models, greedy_text
):
    """Opening the page, or asking for another model's settings, overwrites the options."""
    with Server(webui, webui_models, "--idle-timeout", "1") as server:
        server.load(ctx_size=512, cache_4bit=True, loader="ExLlamav2_HF")
        first = server.reserved_bytes()
        assert server.text() == greedy_text, server.said()[-3000:]
        # The web UI checks once a minute.
        server.wait_for("Unloading the model for inactivity", 200)
        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda _: server.text(), range(3)))
        assert texts == [greedy_text] * 3, server.said()[-3000:]
        assert server.reserved_bytes() == first * 2, "reloaded once, not three times"
