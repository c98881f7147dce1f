"""The models of both loaders, ExLlamav2 and ExLlamav2_HF, on a real, tiny model."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

import exl_loader
from exl_loader.utils.errors import InvalidSettings, PromptTooLong
from extension.patching import Patches
from extension.webui import loading, problems, request
from extension.webui.native_model import Exllamav3Model
from extension.webui.text_generation import extend_lengths
from support import in_threads
from support.tiny import write_tiny_model

STATE = {
    "temperature": 0, "max_new_tokens": 8, "truncation_length": 512, "auto_max_new_tokens": False,
    "add_bos_token": True, "ban_eos_token": True, "skip_special_tokens": True, "seed": 1,
    "repetition_penalty_range": -1, "sampler_priority": "temperature\ntop_k", "top_k": 0,
    "custom_token_bans": None, "dry_sequence_breakers": '"\\n", ":"', "penalty_alpha": 0.6,
    "grammar_string": "", "guidance_scale": 1.0, "negative_prompt": "", "stream": True,
    "mode": "chat",
}
PROMPT = "Hello there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    with exl_loader.load(folder, ctx_size=512) as model:
        yield model


@pytest.fixture
def shared(monkeypatch):
    """The part of the web UI's `shared` that a generation reads."""
    module = SimpleNamespace(stop_everything=False)
    monkeypatch.setitem(sys.modules, "modules.shared", module)
    return module


@pytest.fixture
def model(loaded, shared):
    return Exllamav3Model(loaded)


def test_streams_the_engines_text_cumulatively(model, loaded):
    steps = list(model.generate_with_streaming(PROMPT, STATE))
    assert len(steps) > 1 and all(b.startswith(a) for a, b in zip(steps, steps[1:], strict=False))
    greedy = {"temperature": 0, "max_new_tokens": 8, "ban_eos_token": True}
    with loaded.generate(PROMPT, greedy) as generation:
        assert steps[-1] == "".join(generation)
    assert model.generate(PROMPT, STATE) == steps[-1]
    assert model.last_prompt_token_count == len(loaded.encode(PROMPT))


def test_the_prompt_keeps_its_end_and_one_bos(loaded):
    tokenizer, bos = loaded.tokenizer, loaded.tokenizer.bos_token_id
    plain = request.prompt_ids(tokenizer, PROMPT, STATE, 512)
    assert plain[0] == bos and plain.count(bos) == 1
    twice = request.prompt_ids(tokenizer, "<s><s>" + PROMPT, STATE, 512)
    assert twice == plain
    assert request.prompt_ids(tokenizer, PROMPT, STATE | {"add_bos_token": False}, 512) == plain[1:]
    short = request.prompt_ids(tokenizer, PROMPT, STATE | {"truncation_length": 12}, 512)
    assert short == [bos, *plain[-3:]]
    long = request.prompt_ids(tokenizer, "x " * 2000, STATE | {"truncation_length": 9999}, 512)
    assert len(long) == 504


@pytest.mark.parametrize(("ctx_size", "length", "asked", "prompt_len", "kept"), [
    # The prompt fits, so it is kept whole for any length of the answer.
    (256, 256, 200, 200, 200), (256, 256, 256, 255, 255), (512, 0, 4096, 511, 511),
    (256, 9999, 512, 40, 40), (512, 100, 90, 99, 99),
    # It does not fit: the web UI's rule applies, but a quarter of the context is kept.
    (256, 256, 100, 256, 156), (256, 256, 100, 900, 156), (512, 100, 20, 600, 80),
    (256, 256, 250, 900, 64), (256, 256, 256, 900, 64), (256, 256, 9999, 900, 64),
    (2, 2, 5, 9, 1), (1, 1, 5, 9, 1),
])
def test_a_shortened_question_is_reported(
    loaded, capsys, ctx_size, length, asked, prompt_len, kept
):
    tokenizer = loaded.tokenizer
    state = {"truncation_length": length, "max_new_tokens": asked}
    text = "".join(chr(97 + i % 26) for i in range(prompt_len - 1))
    whole = tokenizer.prompt_ids(text, add_bos=True)
    assert len(whole) == prompt_len
    found = request.prompt_ids(tokenizer, text, state, ctx_size)
    assert len(found) == kept and (kept == 1 or found[0] == tokenizer.bos_token_id)
    assert found[1:] == whole[1:][prompt_len - kept :]
    said = capsys.readouterr().err
    assert (f"its last {kept:,} tokens were kept" in said) == (kept < prompt_len)
    limit = min(length or ctx_size, ctx_size)
    assert kept < limit or limit == 1
    new_tokens = request.settings(state, kept, ctx_size)["max_new_tokens"]
    assert new_tokens == min(asked, max(1, limit - kept))
    assert ("has room for" in capsys.readouterr().err) == (new_tokens < asked)


@pytest.mark.parametrize("name", ["truncation_length", "max_new_tokens"])
@pytest.mark.parametrize("value", ["abc", -5, 1.5, True, [3], float("inf"), float("nan")])
def test_invalid_lengths_are_refused_by_name(loaded, name, value):
    with pytest.raises(InvalidSettings, match=name):
        request.prompt_ids(loaded.tokenizer, PROMPT, STATE | {name: value}, 512)


def test_an_answer_that_fills_the_context_is_reported(model, capsys):
    state = STATE | {"max_new_tokens": 400}
    model.generate("x" * 300, state)
    said = capsys.readouterr().err
    assert "has room for only 211 of the 400 new tokens asked for" in said
    assert "the context of 512 tokens is full: the answer ends after 211 tokens" in said
    model.generate("x" * 100, STATE | {"truncation_length": 120, "max_new_tokens": 40})
    assert "the context of 120 tokens is full" in capsys.readouterr().err
    model.generate(PROMPT, STATE)
    assert capsys.readouterr().err == ""


def test_the_webuis_prompt_length_is_a_number_that_knows_the_context(loaded):
    room = request.PromptRoom.from_request({"truncation_length": 256, "max_new_tokens": 100}, 512)
    assert room == 156 and room.length == 256 and f"{room}" == "156"


def test_the_state_becomes_settings_without_hidden_samplers():
    chosen = request.settings(STATE, 10, 512)
    assert not {"penalty_alpha", "mode"} & set(chosen)
    assert chosen["repetition_penalty_range"] == 0 and chosen["seed"] == 1
    assert request.settings(STATE | {"auto_max_new_tokens": True}, 10, 512)["max_new_tokens"] == 502
    biased = request.settings(STATE | {"logit_bias": {"5": 3}}, 10, 512)
    assert biased["logit_bias"] == {5: 3.0}


def test_guidance_grammar_and_bans_reach_the_engine(model, loaded):
    pytest.importorskip("llguidance")
    wishes = {"guidance_scale": 2.0, "negative_prompt": "Something else",
              "custom_token_bans": "70, 71", "grammar_string": "root ::= [a-z]+"}
    greedy = {"temperature": 0, "max_new_tokens": 8, "ban_eos_token": True}
    texts = set()
    for names in ((), ("guidance_scale", "negative_prompt"), ("grammar_string",), tuple(wishes)):
        chosen = {name: wishes[name] for name in names}
        with loaded.generate(PROMPT, greedy | chosen) as generation:
            expected = "".join(generation)
        assert model.generate(PROMPT, STATE | chosen) == expected
        texts.add(expected)
    assert len(texts) > 2 and expected.isalpha()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stops", [
    {"custom_stopping_strings": '"<s>"'},
    {"custom_stopping_strings": "'never', '<s><s>'"},
    {"custom_stopping_strings": ["<s>"]},
    {"custom_stopping_strings": "", "exl_loader_stopping_strings": ["<s>", "never"]},
])
def test_a_control_token_in_a_stopping_string_stops(stops, skip, model, loaded):
    bos = loaded.tokenizer.bos_token_id
    state = STATE | {"logit_bias": {bos: 100}, "skip_special_tokens": skip, "logprobs": 1} | stops
    assert model.generate(PROMPT, state) == ""
    expected = 2 if "<s><s>" in str(stops) else 1
    assert len(model.last_completion_probabilities) == expected
    unstopped = state | {"custom_stopping_strings": '"never"', "exl_loader_stopping_strings": None}
    model.generate(PROMPT, unstopped)
    assert len(model.last_completion_probabilities) == STATE["max_new_tokens"]


def test_nothing_of_a_stopping_string_is_shown(model, loaded):
    (letter,) = loaded.encode("a", add_bos=False)
    state = STATE | {"logit_bias": {letter: 100}, "custom_stopping_strings": '"b", "aaa"'}
    assert list(model.generate_with_streaming(PROMPT, state)) == []
    state |= {"custom_stopping_strings": '"aaaaab"'}
    steps = list(model.generate_with_streaming(PROMPT, state))
    assert steps[-1] == "a" * STATE["max_new_tokens"]


@pytest.mark.parametrize("wrong", ['"a', "a b", "[1, 2]", "5", 7, ["a", 5], {"a": 1}, "(" * 300])
def test_invalid_stopping_strings_are_named(wrong, model):
    with pytest.raises(InvalidSettings, match="custom_stopping_strings"):
        model.generate(PROMPT, STATE | {"custom_stopping_strings": wrong})


class CountedEvent:
    """An event that counts as set after a number of questions."""

    def __init__(self, left):
        self.left = left

    def is_set(self):
        self.left -= 1
        return self.left < 0


def test_a_stop_is_noticed_after_hidden_tokens_as_well(model, loaded):
    (unknown,) = loaded.encode("<unk>", add_bos=False)
    state = STATE | {"logit_bias": {unknown: 100}, "max_new_tokens": 400, "logprobs": 1}
    assert model.generate(PROMPT, state) == ""
    assert len(model.last_completion_probabilities) == 400
    assert model.generate(PROMPT, state | {"stop_event": CountedEvent(10)}) == ""
    assert len(model.last_completion_probabilities) < 20


def test_stopping_by_event_and_by_the_webuis_flag(model, loaded, shared):
    long = STATE | {"max_new_tokens": 400}
    event = threading.Event()
    steps = model.generate_with_streaming(PROMPT, long | {"stop_event": event})
    next(steps)
    event.set()
    assert len(list(steps)) <= 1
    steps = model.generate_with_streaming(PROMPT, long)
    next(steps)
    shared.stop_everything = True
    assert len(list(steps)) <= 1


def test_stopping_while_the_prompt_is_read(model, loaded, shared):
    event = threading.Event()
    event.set()
    state = STATE | {"stop_event": event, "truncation_length": 512, "max_new_tokens": 1}
    assert list(model.generate_with_streaming("new words " * 200, state)) == []


def test_closing_frees_the_pages(model, loaded):
    long = STATE | {"max_new_tokens": 400}
    for _ in range(5):
        steps = model.generate_with_streaming(PROMPT, long)
        next(steps)
        steps.close()
    assert len(loaded.prompt_logits([1] * 500)) == 500


def test_requests_at_once_give_what_each_gives_alone(model):
    states = [STATE | {"temperature": 1, "seed": seed, "logprobs": 1} for seed in range(4)]
    alone = [model.generate(f"{PROMPT} {i}", s) for i, s in enumerate(states)]

    def run(i):
        text = model.generate(f"{PROMPT} {i}", states[i])
        return text, len(model.last_completion_probabilities)

    assert in_threads(run, range(4)) == [(text, 8) for text in alone]


def test_figures_are_per_thread_and_the_page_reads_its_own(model, loaded):
    """The web UI shows the page's counts in a thread that may have served the API before."""
    api = STATE | {"stop_event": threading.Event(), "max_new_tokens": 3}
    prompt_len = len(loaded.encode(PROMPT))
    counts = []

    def read():
        counts.append((model.last_prompt_token_count, model.last_completion_token_count))

    answer = model.generate_with_streaming(PROMPT + PROMPT, STATE)
    next(answer)
    model.generate(PROMPT, api)
    read()
    model.read_as_page()
    read()
    assert counts[0] == (prompt_len, 3)
    assert counts[1][0] > prompt_len and 1 <= counts[1][1] < 8
    list(answer)
    read()
    assert counts[2] == (counts[1][0], 8)
    in_threads(lambda _: read(), [None])
    assert counts[3] == (0, 0), "it sent no request"


def test_log_probabilities_and_logits_agree(model, loaded):
    model.generate(PROMPT, STATE | {"logprobs": 3})
    entries = model.last_completion_probabilities
    assert len(entries) == 8 and all(len(e["top_logprobs"]) == 3 for e in entries)
    ids = model.encode(PROMPT)
    assert ids.shape[0] == 1 and ids.dtype == torch.int64
    last = model.get_logits(ids)
    assert last.shape == (1, 1, loaded.config.vocab_size)
    expected = torch.log_softmax(last[-1][-1].double(), -1).max().item()
    assert entries[0]["logprob"] == pytest.approx(expected, abs=1e-3)
    prompt = model.get_prompt_logits(ids)
    assert prompt.shape == (1, ids.shape[1], loaded.config.vocab_size)
    assert torch.allclose(prompt[0, -1], last[0, 0], atol=2e-2)


def test_the_webuis_logits_processors_are_served(model):
    listener = SimpleNamespace(
        logprobs=2, token_alternatives={}, token_alternatives_history=[])
    old_listener = SimpleNamespace(logprobs=2, token_alternatives={})
    model.generate(PROMPT, STATE | {"logits_processor": [old_listener]})
    assert len(old_listener.token_alternatives) == 2
    bias = SimpleNamespace(logit_bias={"70": 100.0})
    model.generate(PROMPT, STATE | {"logits_processor": [bias, listener]})
    assert len(listener.token_alternatives_history) == 8
    assert listener.token_alternatives == listener.token_alternatives_history[-1]
    assert model.generate(PROMPT, STATE | {"logits_processor": [bias]}) == model.decode([70] * 8)


def test_sampled_scores_are_stored_for_the_page(model, loaded, monkeypatch):
    hijack = SimpleNamespace(global_scores=None)
    monkeypatch.setitem(sys.modules, "modules.sampler_hijack", hijack)
    model.generate(PROMPT, STATE | {"max_new_tokens": 1, "temperature": 1, "top_k": 5})
    scores = hijack.global_scores[-1]
    assert scores.shape == (loaded.config.vocab_size,)
    assert int(torch.isfinite(scores).sum()) == 5


def test_decode_accepts_the_webuis_kinds_of_ids(model):
    ids = model.encode("Hello")[0]
    expected = model.decode(ids.tolist())
    assert model.decode(ids) == model.decode(list(ids)) == expected
    assert model.decode(ids[1]) == model.decode([int(ids[1])])
    assert model.batch_decode([[int(i)] for i in ids[1:]]) == list("Hello")
    assert "<s>" not in model.decode(ids, skip_special_tokens=True)


def test_perplexity_is_the_mean_over_the_labels(model):
    ids = model.encode("Hello there, how are you?")
    labels = ids.clone()
    labels[:, :4] = -100
    logits = model.get_prompt_logits(ids)[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    out = model(input_ids=ids, labels=labels)
    assert out.loss.item() == pytest.approx(losses[3:].mean().item(), rel=1e-4)


def test_errors_reach_the_log_in_one_line_and_the_model_tab(model, capsys):
    with pytest.raises(exl_loader.utils.errors.InvalidSettings):
        model.generate(PROMPT, STATE | {"temperature": "hot"})
    assert capsys.readouterr().err.count("exl_loader: temperature") == 1
    assert "Generation failed" in problems.last_html() and "hot" in problems.last_html()
    model.generate(PROMPT, STATE)
    assert problems.last_html() == ""


def test_an_unexpected_error_is_one_line_with_its_traceback_folded(model, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("moved")

    monkeypatch.setattr(type(model.loaded), "generate_ids", fail)
    with pytest.raises(RuntimeError):
        model.generate(PROMPT, STATE)
    said = capsys.readouterr().err
    assert "Unexpected RuntimeError: moved" in said and "Traceback" not in said
    line, _, details = problems.last_html().partition("<details>")
    assert "Traceback" in details and "Traceback" not in line
    problems.clear()


def test_hf_gives_the_same_greedy_tokens(loaded, shared):
    from extension.webui.hf_model import Exllamav3HF

    hf = Exllamav3HF(loaded)
    ids = torch.tensor([loaded.encode(PROMPT)])
    (eos,) = loaded.eos_token_ids
    out = hf.generate(
        inputs=ids, max_new_tokens=8, do_sample=False, eos_token_id=[eos], suppress_tokens=[eos])
    with loaded.generate_ids(ids[0], {"temperature": 0, "max_new_tokens": 8,
                                      "ban_eos_token": True}) as generation:
        assert out[0, ids.shape[1]:].tolist() == list(generation)
    labels = ids.clone()
    loss = hf(input_ids=ids, labels=labels).loss
    assert loss.item() == pytest.approx(
        Exllamav3Model(loaded)(input_ids=ids, labels=labels).loss.item())
    past = hf(input_ids=ids[:, :3]).past_key_values
    further = hf(input_ids=ids[:, 3:], past_key_values=past).logits
    assert torch.equal(further, hf(input_ids=ids).logits)
    with pytest.raises(PromptTooLong) as raised:
        hf(input_ids=torch.ones(1, 600, dtype=torch.int64))
    assert hf.take_error() is raised.value and hf.take_error() is None


def test_next_logits_reuse_changes_nothing(loaded):
    ids = loaded.encode("a text that grows")
    grown = [loaded.next_logits(ids[: n + 1]) for n in range(len(ids))]
    whole = loaded.prompt_logits(ids)
    assert len(whole) > 10
    for row, expected in zip(grown, whole, strict=True):
        assert torch.allclose(row, expected, atol=2e-2)


@pytest.fixture
def hf(loaded, shared):
    from extension.webui.hf_model import Exllamav3HF

    return Exllamav3HF(loaded)


@pytest.fixture
def text_generation(loaded, hf, shared, monkeypatch):
    """A module with the web UI's functions that cut prompts, extended by the plugin."""
    module = ModuleType("modules.text_generation")

    def encode(prompt, add_bos_token=True, truncation_length=None):
        ids = torch.tensor([loaded.tokenizer.prompt_ids(prompt, add_bos=add_bos_token)])
        return ids if truncation_length is None else ids[:, -truncation_length:]

    def get_max_prompt_length(state):
        return state["truncation_length"] - state["max_new_tokens"]

    module.encode, module.get_max_prompt_length = encode, get_max_prompt_length
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(loading, "_loaded", loaded)
    shared.model = hf
    patches = Patches()
    extend_lengths(patches, module)
    yield module
    patches.undo()
    assert module.encode is encode and module.get_max_prompt_length is get_max_prompt_length


@pytest.mark.parametrize(("asked", "prompt_len", "kept"), [
    (200, 300, 300), (600, 511, 511), (100, 512, 412), (100, 900, 412), (600, 900, 128)])
def test_hf_prompts_are_cut_like_native_ones(text_generation, loaded, asked, prompt_len, kept):
    state = STATE | {"max_new_tokens": asked}
    text = "y" * (prompt_len - 1)
    found = text_generation.encode(
        text, add_bos_token=True,
        truncation_length=text_generation.get_max_prompt_length(state))
    assert found.shape == (1, kept) and found[0, 0] == loaded.tokenizer.bos_token_id
    assert found[0].tolist() == request.prompt_ids(loaded.tokenizer, text, state, 512)


def test_a_chat_keeps_room_for_its_question_for_any_answer_length(text_generation, shared):
    length = text_generation.get_max_prompt_length
    assert length(STATE | {"max_new_tokens": 112}) == 400
    assert length(STATE | {"max_new_tokens": 512}) == length(STATE | {"max_new_tokens": 9}) - 375
    assert length(STATE | {"max_new_tokens": 4096}) == 128
    shared.model = object()
    assert length(STATE | {"max_new_tokens": 512}) == 0, "prompts of another loader are unchanged"


def test_hf_answers_get_the_rest_of_the_context(hf, loaded, capsys):
    ids = torch.tensor([loaded.tokenizer.prompt_ids("x" * 499)])
    (eos,) = loaded.eos_token_ids
    options = {"do_sample": False, "eos_token_id": [eos], "suppress_tokens": [eos]}
    out = hf.generate(inputs=ids, max_new_tokens=40, **options)
    assert out.shape[1] == 512 and hf.ended_by_length
    assert "room for only 12 of the 40 new tokens asked for" in capsys.readouterr().err
    (notice,) = hf.take_notices()
    assert "the context of 512 tokens is full: the answer ends after 12 tokens" in notice
    assert hf.take_notices() == []
    assert hf.generate(inputs=ids, max_new_tokens=3, **options).shape[1] == 503
    assert hf.take_notices() == [] and capsys.readouterr().err == ""


def test_settings_that_transformers_refuses_are_named(hf, loaded):
    ids = torch.tensor([loaded.encode(PROMPT)])
    with pytest.raises(ValueError):
        hf.generate(inputs=ids, max_new_tokens=3, do_sample=True, temperature=-1.0)
    named = problems.named_generation_error(hf.take_error())
    assert isinstance(named, InvalidSettings) and "temperature" in str(named)
    other = RuntimeError("a bug")
    assert problems.named_generation_error(other) is other
