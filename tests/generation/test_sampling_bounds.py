"""Settings that bound a text or its penalties, each compared with an independent definition."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

import support.samplers_defined as defined
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.sampling import Sampler, TokenRoles
from exl_loader.generation.settings import SamplingSettings
from exl_loader.utils.errors import InvalidSettings
from support.fake_model import endless, fake_engine
from support.tiny import write_tokenizer

VOCAB = 300
GREEDY = {"temperature": 0}


@pytest.fixture(params=[0, 1, None], ids=["first", "second", "fresh"])
def drawn(request) -> tuple[np.ndarray, np.ndarray]:
    """A row of logits, and a history with repeats."""
    rng = np.random.default_rng(request.param)
    row = (rng.standard_normal(VOCAB) * 4).astype(np.float32)
    return row, rng.integers(0, 30, 200)


def probabilities(row, history, roles=None, **settings) -> np.ndarray:
    """The distribution of the next token."""
    sampler = Sampler(SamplingSettings(**settings), seed=1, roles=roles)
    return defined.distribution(sampler.candidates(LogitsRow(row), history), len(row))


def check(actual: np.ndarray, logits: np.ndarray) -> None:
    np.testing.assert_allclose(actual, defined.softmax(logits), rtol=1e-5, atol=1e-9)


# min_new_tokens


def ends_at_once(text: list[int]) -> int:
    return 0


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("options", [GREEDY, {"seed": 3}])
def test_no_end_token_before_min_new_tokens(count, options):
    engine, _, _ = fake_engine(ends_at_once, VOCAB)
    chosen = {"min_new_tokens": count, "max_new_tokens": 250} | options
    generation = engine.generate_ids([5], chosen)
    ids = list(generation)
    assert generation.finish_reason == "eos" and 0 not in ids
    assert len(ids) == count if options is GREEDY else len(ids) >= count


def test_stop_tokens_wait_as_end_tokens_do_and_max_new_tokens_wins():
    engine, _, _ = fake_engine(endless, VOCAB)
    options = GREEDY | {"stop_token_ids": [7], "min_new_tokens": 4}
    generation = engine.generate_ids([5], options)
    assert len(list(generation)) == 4 and generation.finish_reason == "stop"
    generation = engine.generate_ids([5], options | {"max_new_tokens": 2})
    assert len(list(generation)) == 2 and generation.finish_reason == "length"


def test_a_stop_string_ends_the_text_before_min_new_tokens(byte_tokenizer):
    token = byte_tokenizer.encode("a", add_bos=False)[0]
    engine, _, _ = fake_engine(lambda text: token, VOCAB, tokenizer=byte_tokenizer)
    generation = engine.generate([5], GREEDY | {"stop": "aaa", "min_new_tokens": 50})
    assert "".join(generation) == "" and generation.finish_reason == "stop"


def test_end_tokens_are_impossible_before_min_new_tokens(drawn):
    row, history = drawn
    logits = row.astype(np.float64)
    logits[[4, 9, 11]] = -math.inf
    roles = TokenRoles(banned_ids=(4,), end_ids=(9, 11))
    check(probabilities(row, history, roles, min_new_tokens=1), logits)
    logits[[9, 11]] = row[[9, 11]]
    check(probabilities(row, history, roles, min_new_tokens=0), logits)


# allowed_tokens


def test_only_allowed_tokens_are_possible(drawn):
    row, history = drawn
    logits = np.full(VOCAB, -math.inf)
    allowed = [200, 3, 17, 3, 250]
    logits[allowed] = row[allowed]
    check(probabilities(row, history, allowed_tokens=allowed), logits)
    check(probabilities(row, history, allowed_tokens="200, 3,17,250"), logits)
    logits[17] = -math.inf
    roles = TokenRoles(banned_ids=(17,))
    check(probabilities(row, history, roles, allowed_tokens=allowed), logits)
    kept = defined.softmax(logits) >= 0.5 * defined.softmax(logits).max()
    actual = probabilities(row, history, roles, allowed_tokens=allowed, min_p=0.5)
    check(actual, np.where(kept, logits, -math.inf))


def test_allowed_tokens_that_leave_none_are_refused():
    engine, _, cache = fake_engine(endless, VOCAB)
    assert list(engine.generate_ids([5], GREEDY | {"allowed_tokens": [9], "max_new_tokens": 3})) \
        == [9, 9, 9]
    with pytest.raises(InvalidSettings, match="allowed_tokens: expected 0 to 299"):
        engine.generate_ids([5], {"allowed_tokens": [VOCAB]})
    with pytest.raises(InvalidSettings, match="at least one token"):
        list(engine.generate_ids([5], {"allowed_tokens": [9], "custom_token_bans": [9]}))
    padded = Sampler(SamplingSettings(allowed_tokens=(299,)), roles=TokenRoles(vocab_size=200))
    with pytest.raises(InvalidSettings, match="allowed_tokens: expected a token"):
        padded.sample(LogitsRow(np.zeros(VOCAB, np.float32)), [5])
    assert cache.num_free_pages == cache.num_pages


# dry_range


@pytest.mark.parametrize(("penalty_range", "dry_range", "looked_at"), [
    (50, -1, 50), (0, -1, 200), (50, 0, 200), (0, 20, 20), (20, 100, 100), (1, 500, 200),
])
def test_dry_looks_back_over_its_own_range(drawn, penalty_range, dry_range, looked_at):
    row, history = drawn
    settings = {"dry_multiplier": 0.7, "dry_allowed_length": 1, "dry_sequence_breakers": [],
                "repetition_penalty_range": penalty_range, "dry_range": dry_range}
    logits = row.astype(np.float64)
    for token, amount in defined.dry_amounts(history[-looked_at:], 0.7, 1.75, 1).items():
        logits[token] -= amount
    check(probabilities(row, history, **settings), logits)


# repetition_decay


def penalised(row, history, sustain, decay, repetition, presence, frequency) -> np.ndarray:
    """Walk back from the end of the text, with penalties that fall after `sustain` tokens."""
    logits, seen = row.astype(np.float64), set()
    strength = 1.0
    for passed, token in enumerate(reversed(history.tolist())):
        if passed >= sustain + decay:
            break
        if token not in seen:
            factor = 1 + (repetition - 1) * strength
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            logits[token] -= presence * strength
            seen.add(token)
        logits[token] -= frequency * strength
        if passed >= sustain:
            strength -= 1 / decay
    return logits


@pytest.mark.parametrize("sustain", [1, 20, 150, 300])
@pytest.mark.parametrize("decay", [1, 30, 100, 1000])
@pytest.mark.parametrize(("repetition", "presence", "frequency"), [
    (1.5, 0, 0), (0.7, 0, 0), (1, 1.5, 0), (1, 0, 0.4), (1.3, 0.5, 0.2),
])
def test_penalties_fall_over_repetition_decay(
    drawn, sustain, decay, repetition, presence, frequency
):
    row, history = drawn
    settings = {"repetition_penalty": repetition, "presence_penalty": presence,
                "frequency_penalty": frequency, "repetition_penalty_range": sustain,
                "repetition_decay": decay}
    check(probabilities(row, history, **settings),
          penalised(row, history, sustain, decay, repetition, presence, frequency))


def test_without_an_end_of_the_range_nothing_decays(drawn):
    row, history = drawn
    settings = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "repetition_penalty_range": 0}
    assert (probabilities(row, history, repetition_decay=50, **settings)
            == probabilities(row, history, **settings)).all()


# regex_pattern


PATTERNS = [
    r"[0-9]{2,4}(-[a-f]+)?", r"(yes|no|maybe)\.", r'"([^"\\]|\\["nt]){0,8}"', r"a/b/[c-e]{3}",
    r"(?i:abc) [A-Z]{3}", r"\d\d:\d\d", r"(ü|ö){2,5}",
]


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A model of random logits over bytes."""
    from exl_loader.text.tokenizer import Tokenizer

    pytest.importorskip("llguidance")
    folder = tmp_path_factory.mktemp("regex")
    write_tokenizer(folder, VOCAB)
    rng = random.Random(5)
    return fake_engine(lambda text: rng.randrange(3, VOCAB), VOCAB,
                       tokenizer=Tokenizer.from_dir(folder))[0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texts_match_the_whole_pattern(writer, pattern):
    texts = set()
    for seed in range(8):
        generation = writer.generate([5], {"regex_pattern": pattern, "seed": seed,
                                           "max_new_tokens": 100})
        text = "".join(generation)
        if generation.finish_reason != "length":
            assert re.fullmatch(pattern, text), text
            texts.add(text)
    assert len(texts) >= 2


def test_a_pattern_that_cannot_be_followed_or_is_one_of_two_is_refused(writer):
    for pattern in ("(", "a{3", "(?=a)b"):
        with pytest.raises(InvalidSettings, match="regex_pattern: expected a regular expression"):
            writer.generate([5], {"regex_pattern": pattern})
    with pytest.raises(InvalidSettings, match="only one of regex_pattern and json_schema"):
        SamplingSettings(regex_pattern="a", json_schema="{}")


def test_allowed_tokens_and_a_pattern_hold_together(writer):
    ids = [writer.tokenizer.encode(letter, add_bos=False)[0] for letter in "246"]
    options = {"regex_pattern": "[0-4]{6}", "allowed_tokens": ids}
    assert set("".join(writer.generate([5], options))) <= set("24")
    with pytest.raises(InvalidSettings, match="allowed_tokens"):
        list(writer.generate([5], options | {"regex_pattern": "[a-c]"}))


# grammar_trigger


@pytest.mark.parametrize("grammar", [
    {"regex_pattern": "[0-4]{3}"}, {"grammar_string": "root ::= [0-4] [0-4] [0-4]"},
    {"json_schema": {"type": "integer", "minimum": 100, "maximum": 444}},
])
def test_a_grammar_begins_after_its_trigger(tmp_path, grammar):
    """Before the trigger everything is written, what the grammar forbids included."""
    from exl_loader.text.tokenizer import Tokenizer

    pytest.importorskip("llguidance")
    write_tokenizer(tmp_path, VOCAB)
    tokenizer = Tokenizer.from_dir(tmp_path)
    before = tokenizer.encode("wait 9;", add_bos=False)
    engine, _, _ = fake_engine(
        lambda text: before[len(text) - 1] if len(text) <= len(before) else 5, VOCAB,
        tokenizer=tokenizer,
    )
    options = GREEDY | grammar | {"grammar_trigger": ";"}
    generation = engine.generate([1], options)
    text = "".join(generation)
    assert re.fullmatch("wait 9;[0-4]{3}", text) and generation.finish_reason in ("stop", "eos")
    assert re.fullmatch("[0-4]{3}", "".join(engine.generate([1], GREEDY | grammar)))
    # Without the trigger the grammar never begins.
    other = engine.generate([1], options | {"grammar_trigger": "@", "max_new_tokens": 7})
    assert "".join(other) == "wait 9;"
    with pytest.raises(InvalidSettings, match="grammar_trigger: expected the text of one token"):
        engine.generate([1], options | {"grammar_trigger": "two"})
