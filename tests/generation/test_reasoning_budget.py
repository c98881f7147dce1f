"""A reasoning budget: reasoning is ended by force, compared with a definition token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_loader
from exl_loader import InvalidSettings
from exl_loader.text.tokenizer import Tokenizer
from support import in_threads
from support.fake_model import fake_engine
from support.stepped import texts_together
from support.tiny import write_tokenizer
from support.tokenizer_folders import added_token
from support.webui_server import DEMO

GREEDY = {"temperature": 0, "ban_eos_token": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte, and the tags of a reasoning as tokens."""
    folder = tmp_path_factory.mktemp("reasoning")
    write_tokenizer(folder, 300)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {
        "259": added_token("<think>"), "260": added_token("</think>", special=False)}
    path.write_text(json.dumps(config))
    return Tokenizer.from_dir(folder)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_bos=False)


def random_script(choices: list[int], seed: int) -> Callable[[list[int]], int]:
    """A script whose next token depends on the whole text."""
    return lambda text: random.Random(f"{seed} {text}").choice(choices)


def defined_answer(
    script, prompt: list[int], count: int, budget: int, forced: list[int], is_open: bool,
    starts: Callable[[list[int]], bool], ends: Callable[[list[int]], bool],
    is_cut: Callable[[list[int]], bool] = lambda ids: False,
) -> list[int]:
    """Return the ids of an answer.

    Args:
        starts, ends: whether the last of these ids, all since the last tag, completes a tag.
        is_cut: whether these ids end inside of a character.
    """
    ids: list[int] = []
    since_tag: list[int] = []
    used = 0
    while len(ids) < count:
        if is_open and used >= budget and not is_cut(since_tag):
            ids += forced
            since_tag, is_open = [], False
            continue
        token = script([*prompt, *ids])
        ids.append(token)
        since_tag.append(token)
        if (ends if is_open else starts)(since_tag):
            since_tag, is_open = [], not is_open
        elif is_open:
            used += 1
    return ids[:count]


def answer(tokenizer, script, prompt, count, **options) -> list[int]:
    engine, _, _ = fake_engine(script, 300, tokenizer)
    generation = engine.generate_ids(prompt, GREEDY | {"max_new_tokens": count} | options)
    ids = list(generation)
    assert generation.token_ids == ids and generation.stats.new_tokens == len(ids)
    return ids


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 12), start=st.sampled_from(
    ["auto", "always", "never"]), message=st.sampled_from(["", "\nEnough. ", "</think>."]))
def test_tags_that_are_tokens(tokenizer, seed, budget, start, message):
    begin, end = ids_of(tokenizer, "<think>")[0], ids_of(tokenizer, "</think>")[0]
    script = random_script([begin, end, 40, 41, 42, 43, 44, 45], seed)
    prompt = [50, begin, *ids_of(tokenizer, " \n")] if seed % 2 else [50, begin, 51]
    expected = defined_answer(
        script, prompt, 80, budget,
        ids_of(tokenizer, message if "</think>" in message else message + "</think>"),
        start == "always" or start == "auto" and seed % 2 == 1,
        lambda ids: ids[-1] == begin, lambda ids: ids[-1] == end,
    )
    assert answer(
        tokenizer, script, prompt, 80, reasoning_budget_tokens=budget,
        reasoning_budget_message=message, start_in_reasoning=start,
    ) == expected


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 12), is_open=st.booleans())
def test_tags_of_several_tokens_and_characters_of_several_bytes(
    tokenizer, seed, budget, is_open
):
    letters = {text: ids_of(tokenizer, text)[0] for text in "abcdx"}
    accent = ids_of(tokenizer, "é")
    script = random_script([*letters.values(), *accent], seed)
    prompt = ids_of(tokenizer, "xab \n" if is_open else "xab \nx")

    def ends_in(text: str) -> Callable[[list[int]], bool]:
        return lambda ids: ids[-2:] == ids_of(tokenizer, text)

    expected = defined_answer(
        script, prompt, 80, budget, ids_of(tokenizer, "é!cd"), is_open, ends_in("ab"),
        ends_in("cd"), lambda ids: ids[-1:] == accent[:1],
    )
    assert answer(
        tokenizer, script, prompt, 80, reasoning_budget_tokens=budget,
        reasoning_budget_message="é!", reasoning_start_token="ab", reasoning_end_token="cd",
    ) == expected


THINKING = {"start_in_reasoning": "always", "reasoning_budget_tokens": 5}


def test_without_a_budget_the_settings_of_reasoning_do_nothing(tokenizer):
    script = random_script([259, 260, 40, 41], 1)
    plain = answer(tokenizer, script, [50], 30)
    assert answer(tokenizer, script, [50], 30, start_in_reasoning="always",
                  reasoning_budget_message="x", reasoning_end_token="") == plain


def test_forced_tokens_are_shown_counted_and_have_log_probabilities(tokenizer):
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    letter = tokenizer.decode([40])
    generation = engine.generate([50], GREEDY | THINKING | {
        "reasoning_budget_message": " Enough.", "max_new_tokens": 17, "logprobs": 1})
    assert "".join(generation) == letter * 5 + " Enough.</think>" + letter * 3
    assert generation.stats.new_tokens == len(generation.token_ids) == 17
    assert [entry.token_id for entry in generation.logprobs] == generation.token_ids
    # Their probability is the model's own: 10 is the logit of the token that it wanted.
    assert generation.logprobs[5].logprob == pytest.approx(generation.logprobs[0].logprob - 10)


def test_bans_and_samplers_do_not_hold_for_forced_tokens(tokenizer):
    end = ids_of(tokenizer, "</think>")
    script = random_script([40, 41, 42], 3)
    for options in ({"custom_token_bans": end}, {"allowed_tokens": [40, 41, 42]},
                    {"stop_token_ids": [2], "min_new_tokens": 30}):
        ids = answer(tokenizer, script, [50], 20, **THINKING, **options)
        assert [i for i in ids if i not in (40, 41, 42)] == end and ids[5] == end[0]


@pytest.mark.parametrize("options", [
    {"mirostat_mode": 2}, {"adaptive_target": 0.3}, {"top_k": 3, "xtc_probability": 0.5},
])
def test_samplers_with_a_state_go_on_after_forced_tokens(tokenizer, options):
    """No random number is taken for a forced token, so the draws after it are the same."""
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    options = options | {"seed": 4, "max_new_tokens": 20, "ban_eos_token": True,
                         "allowed_tokens": list(range(40, 60))}
    plain = list(engine.generate_ids([50], options))
    ids = list(engine.generate_ids([50], options | THINKING))
    assert ids == [*plain[:5], *ids_of(tokenizer, "</think>"), *plain[5:19]]


def test_a_stop_string_in_the_message_ends_the_text(tokenizer):
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    generation = engine.generate([50], GREEDY | THINKING | {
        "reasoning_budget_message": " Enough.", "stop": "ough"})
    assert "".join(generation) == tokenizer.decode([40]) * 5 + " En"
    assert generation.finish_reason == "stop"


def test_max_new_tokens_may_end_a_message(tokenizer):
    ids = answer(tokenizer, lambda text: 40, [50], 7, **THINKING,
                 reasoning_budget_message="Enough")
    assert ids == [40] * 5 + ids_of(tokenizer, "En")


def test_a_grammar_begins_after_a_reasoning_that_was_ended(tokenizer):
    pytest.importorskip("llguidance")
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    text = "".join(engine.generate([50], GREEDY | THINKING | {
        "ban_eos_token": False, "reasoning_budget_message": "!", "grammar_trigger": "</think>",
        "regex_pattern": "<think>abcdefgh"}))
    # Tags in the grammar's text begin no reasoning.
    assert text == tokenizer.decode([40]) * 5 + "!</think><think>abcdefgh"


def test_a_healed_token_comes_before_a_forced_one(tokenizer):
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    generation = engine.generate("xy", GREEDY | THINKING | {
        "reasoning_budget_tokens": 0, "token_healing": True, "max_new_tokens": 3})
    assert "".join(generation) == "</think>" + tokenizer.decode([40]) * 2
    assert generation.token_ids[:2] == ids_of(tokenizer, "y</think>")


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), budget=st.integers(0, 12))
def test_tokens_that_banned_strings_take_back_do_not_count(tokenizer, seed, budget):
    """Some go back beyond a tag, others beyond the forced text."""
    begin, end = ids_of(tokenizer, "<think>")[0], ids_of(tokenizer, "</think>")[0]
    script = random_script([begin, end, *ids_of(tokenizer, "aabb")], seed)
    banned = ["aba", "bb", "</think>a", "<think>b", "!</think>b"]
    ids = answer(
        tokenizer, script, [50], 60, reasoning_budget_tokens=budget, banned_strings=banned,
        reasoning_budget_message="!", skip_special_tokens=False)
    text = tokenizer.decode(ids, skip_special=False)
    assert not any(string in text for string in banned) and len(ids) == 60
    # What was not forced may be any text; what was forced stands where it has to.
    assert ids == defined_answer(
        lambda text: ids[len(text) - 1], [50], 60, budget, ids_of(tokenizer, "!</think>"), False,
        lambda ids: ids[-1] == begin, lambda ids: ids[-1] == end)


@pytest.mark.parametrize(("options", "words"), [
    ({"banned_strings": ["</THINK"]}, "banned_strings"),
    ({"reasoning_end_token": ""}, "^reasoning_end_token: expected a text"),
    ({"regex_pattern": "a"}, "^reasoning_budget_tokens: .*Set grammar_trigger"),
    ({"regex_pattern": "a", "grammar_trigger": "</think>",
      "reasoning_budget_message": "</think> so"}, "^reasoning_budget_message: .* found ' so'"),
])
def test_settings_that_exclude_each_other_are_refused(tokenizer, options, words):
    engine, _, _ = fake_engine(lambda text: 40, 300, tokenizer)
    with pytest.raises(InvalidSettings, match=words):
        engine.generate_ids([50], THINKING | options)


def test_without_a_tokenizer_it_is_refused():
    engine, _, _ = fake_engine(lambda text: 40, 300)
    with pytest.raises(exl_loader.InvalidTokenizer):
        engine.generate_ids([50], THINKING)


# With the shipped model

REASONING = {
    "temperature": 0, "ban_eos_token": True, "start_in_reasoning": "always",
    "reasoning_budget_message": "\n# Enough.\n", "reasoning_end_token": "def answer",
}
PROMPTS = ["import os\n", "class Parser:\n", "def read(path):\n", "x = [1, 2"]


def test_together_with_guesses_and_without_pages_the_answers_are_those_alone():
    budgets = [0, 7, 40, 300]
    requests = [
        (prompt, REASONING | {"reasoning_budget_tokens": budget, "max_new_tokens": 600})
        for prompt, budget in zip(PROMPTS, budgets, strict=True)
    ]

    def ask(model, index: int, **more) -> str:
        prompt, options = requests[index]
        generation = model.generate(prompt, options | more)
        text = "".join(generation)
        preemptions.append(generation.stats.preemptions)
        return text

    preemptions: list[int] = []
    sizes = {"ctx_size": 1024, "max_batch_size": 4}
    with exl_loader.load(DEMO, cache_size=4096, **sizes) as model:
        alone = [ask(model, index) for index in range(4)]
        assert in_threads(lambda index: ask(model, index), range(4)) == alone
        assert in_threads(
            lambda index: ask(model, index, prompt_lookup_num_tokens=4), range(4)) == alone
    for index, text in enumerate(alone):
        before, _, after = text.partition("\n# Enough.\ndef answer")
        assert after and text.count("# Enough.") == 1
        assert (before == "") == (budgets[index] == 0)
    assert sum(preemptions) == 0
    with exl_loader.load(DEMO, cache_size=1024, **sizes) as model:
        texts, jobs = texts_together(model, requests)
    assert texts == alone
    assert sum(job.stats.preemptions for job in jobs) > 0


def test_a_message_continues_the_text_without_a_space_before_it():
    """SentencePiece puts one before every text that it encodes."""
    with exl_loader.load(DEMO, ctx_size=512) as model:
        text = "".join(model.generate(PROMPTS[0], REASONING | {
            "reasoning_budget_tokens": 0, "reasoning_budget_message": "so", "max_new_tokens": 8}))
    assert text.startswith("sodef answer")
