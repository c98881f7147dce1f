"""Banned strings: what the text is by an independent definition, and that everything goes back."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_loader
import support.tokenizer_folders as make
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.generation import rewind
from exl_loader.generation.forward_model import LogitsRow, TopLogits
from exl_loader.generation.grammar.masks import Grammars
from exl_loader.generation.logprobs import token_logprobs
from exl_loader.generation.rewind import BannedStrings
from exl_loader.generation.sampling import Sampler, guide
from exl_loader.generation.settings import SamplingSettings
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import InvalidSettings, InvalidTokenizer
from support.banned_defined import VOCAB, define, first_complete, invented, letters_of
from support.fake_model import endless, fake_engine, settle, spell

GREEDY = {"temperature": 0}


# ---- The definition ----

ALPHABETS = {"letters": "abcAB ", "characters of several bytes": "aéÉ€ "}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@settings(max_examples=60)
@given(data=st.data())
def test_greedy_texts_are_those_of_the_definition(byte_tokenizer, alphabet, data):
    letters = ALPHABETS[alphabet]
    banned = data.draw(st.lists(st.text(letters, min_size=1, max_size=4), min_size=1, max_size=4))
    min_new = data.draw(st.sampled_from([0, 9]))
    # "-" is never banned, so that there is always a way on. 0 ends a text, 1 is not shown.
    logits = invented([*letters_of(byte_tokenizer, letters + "-"), 0, 1],
                      data.draw(st.integers(0, 1000)))
    engine, model, cache = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
    expected = define(byte_tokenizer, lambda ids: logits([5, *ids]), banned, 40,
                      engine.eos_token_ids, min_new)
    generation = engine.generate([5], GREEDY | {
        "max_new_tokens": 40, "banned_strings": banned, "min_new_tokens": min_new, "logprobs": 1})
    text = "".join(generation)
    assert generation.token_ids == expected.ids
    assert text == byte_tokenizer.decode(expected.ids)
    assert not any(word.casefold() in text.casefold() for word in banned)
    ended = generation.finish_reason == "eos"
    assert generation.stats.new_tokens == len(expected.ids) + ended
    assert ended or generation.finish_reason == "length"
    # Every token was drawn from the logits after the text before it.
    assert generation.logprobs == [
        token_logprobs(logits([5, *expected.ids[:i]]).numpy()[: engine.tokenizer.vocab_size],
                       token_id, 1)
        for i, token_id in enumerate(expected.ids)
    ]
    assert cache.num_free_pages == cache.num_pages
    # Nothing was computed twice.
    assert sum(map(sum, model.calls)) == expected.num_texts


def test_the_definition_goes_back_often_enough(byte_tokenizer):
    logits = invented(letters_of(byte_tokenizer, "ab-"))
    found = define(byte_tokenizer, logits, ["aba", "bb"], 200, ())
    assert found.num_excluded > 20 and found.num_lost > 10


@pytest.fixture(scope="module")
def long_text(byte_tokenizer):
    """Return a script of logits, banned strings, and the definition's text of 600 tokens."""
    logits = invented(letters_of(byte_tokenizer, "ab-"))
    banned = ["aba", "bb", "a--b"]
    return logits, banned, define(byte_tokenizer, lambda ids: logits([5, *ids]), banned, 600, ())


@pytest.mark.parametrize("chosen", [{"KEPT_ROWS": 0}, {"DRAWS_IN_STEP": 1}, {"KEPT_ROWS": 1}])
def test_logits_that_are_not_kept_are_computed_again(
    byte_tokenizer, long_text, monkeypatch, chosen
):
    for name, value in chosen.items():
        monkeypatch.setattr(rewind, name, value)
    logits, banned, expected = long_text
    engine, model, _ = fake_engine(logits, VOCAB, ctx_size=1024, tokenizer=byte_tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 600, "banned_strings": banned})
    assert "".join(generation) == byte_tokenizer.decode(expected.ids)
    assert sum(map(sum, model.calls)) > expected.num_texts


def test_a_text_of_sentencepiece_tokens(spm_tokenizer):
    """Tokens of several letters, and a space before the text that is not shown."""
    words = spm_tokenizer.encode("The quick brown fox, the lazy dog. and then", add_bos=False)
    logits = invented(words, 3)
    plain = spm_tokenizer.decode(
        define(spm_tokenizer, lambda ids: logits([5, *ids]), [], 60, ()).ids)
    for start, length in [(0, 1), (3, 3), (20, 6), (30, 12), (50, 2)]:
        banned = [plain[start : start + length].upper()]
        engine, _, _ = fake_engine(logits, VOCAB, tokenizer=spm_tokenizer)
        expected = define(spm_tokenizer, lambda ids: logits([5, *ids]), banned, 60,
                          engine.eos_token_ids)
        assert expected.num_excluded
        generation = engine.generate([5], GREEDY | {
            "max_new_tokens": 60, "banned_strings": banned})
        assert "".join(generation) == spm_tokenizer.decode(expected.ids)


def test_texts_of_unusual_vocabularies(tmp_path):
    """Some change their text after the fact: they join pieces, or remove spaces."""
    rng = random.Random(0)
    gone_back = 0
    for name, folder in make.unusual_tokenizers(tmp_path).items():
        tokenizer = Tokenizer.from_dir(folder)
        for seed in range(4):
            logits = invented(range(3, tokenizer.vocab_size), seed)
            engine, model, cache = fake_engine(logits, VOCAB, tokenizer=tokenizer)
            options = {"max_new_tokens": 30, "temperature": seed % 2, "seed": seed}
            plain = "".join(engine.generate([1], options)).replace("\ufffd", "")
            starts = rng.sample(range(len(plain)), 3)
            banned = [plain[start : start + rng.randint(1, 4)] for start in starts]
            model.calls.clear()
            generation = engine.generate([1], options | {"banned_strings": banned})
            text = "".join(generation)
            assert not any(word.casefold() in text.casefold() for word in banned), name
            assert text == tokenizer.decode(generation.token_ids), name
            assert cache.num_free_pages == cache.num_pages
            gone_back += len(model.calls) > 30
    assert gone_back > 20


def test_a_device_copies_the_logits_of_tokens_that_are_held(byte_tokenizer):
    """Otherwise its top logits suffice, for a redraw as well."""
    logits = invented(letters_of(byte_tokenizer, "abcdefghijklmnop-"))
    size = byte_tokenizer.vocab_size
    engine, model, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
    copies = []

    def row_of(values: torch.Tensor) -> LogitsRow:
        row = values.numpy()
        best = np.argsort(-row[:size], kind="stable")
        others = np.exp(row[best[12:]] - row[best[0]]).sum()

        def read():
            copies.append(row)
            return row

        return LogitsRow(read, TopLogits(best[:12], row[best[:12]], size, float(others)))

    forward = model.forward
    model.forward_rows = lambda *args: [row_of(row) for row in forward(*args)]
    banned = ["ab", "a-", "aa"]
    expected = define(byte_tokenizer, lambda ids: logits([5, *ids]), banned, 200, ())
    generation = engine.generate([5], GREEDY | {
        "max_new_tokens": 200, "ban_eos_token": True, "banned_strings": banned})
    assert "".join(generation) == byte_tokenizer.decode(expected.ids)
    assert 0 < expected.num_excluded <= len(copies) < 50


# ---- Searching ----


@given(st.lists(st.text("abAß", max_size=5)), st.lists(st.text("abAßS", min_size=1), min_size=1))
def test_banned_strings_are_found_in_text_that_arrives_in_pieces(pieces, banned):
    found = BannedStrings(banned)
    folded = "".join(pieces).casefold()
    origins = [i for i, c in enumerate("".join(pieces)) for _ in c.casefold()]
    start = first_complete(folded, [word.casefold() for word in banned])
    expected = None if start is None else origins[start]
    actual = None
    for piece in pieces:
        before = found.copy()
        actual = found.push(piece)
        if actual is not None:
            assert before.first_undecided <= actual
            break
        assert found.first_undecided <= found.num_read
    assert actual == expected


def test_case_is_that_of_unicode():
    for banned, text in [("STRASSE", "die Straße"), ("ΣΊΣΥΦΟΣ", "σίσυφος"), ("éa", "ÉA")]:
        start = len(text) - len(text.split()[-1])
        assert BannedStrings([banned]).push(text) == start


def test_many_banned_strings_cost_little_per_character():
    """No work grows with their number, so none is repeated for each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh ", k=30)) for _ in range(3000)]
    found = BannedStrings(words)
    text = "".join(rng.choices("abcdefgh ", k=2000))
    assert found.push(text) is None
    assert found.push(words[7].upper()) == 2000


# ---- Random settings ----


def exact_law(
    rows: Callable[[tuple[str, ...]], dict[str, float]], banned: Iterable[str], length: int
) -> Counter:
    """The probability of each text of one-letter tokens, by following every draw."""
    law: Counter = Counter()

    def follow(text: str, excluded: dict[str, frozenset[str]], p: float) -> None:
        if len(text) == length:
            law[text] += p
            return
        chances = {letter: chance for letter, chance in rows(tuple(text)).items()
                   if letter not in excluded.get(text, ())}
        for letter, chance in chances.items():
            share, longer = p * chance / sum(chances.values()), text + letter
            start = first_complete(longer, banned)
            if start is None:
                follow(longer, excluded, share)
            else:
                kept = longer[:start]
                more = excluded.get(kept, frozenset()) | {longer[start]}
                follow(kept, {k: v for k, v in excluded.items() if k <= kept} | {kept: more}, share)

    follow("", {}, 1.0)
    return law


@pytest.mark.parametrize("banned", [["a"], ["ab"], ["ab", "bb"], ["aab", "ca", "b"]])
def test_random_texts_have_the_law_of_drawing_again_without_what_was_taken_back(
    byte_tokenizer, banned
):
    """The same random number again would favour neighbours of the token that was taken back.

    With so many trials that, keeping only the newest token out and keeping none out are each over
    six standard deviations beyond the bound, in one of the cases at least.
    """
    ids = dict(zip("abc-", letters_of(byte_tokenizer, "abc-"), strict=True))
    chances = {"a": 0.5, "b": 0.3, "c": 0.15, "-": 0.05}
    row = torch.full((VOCAB,), -60.0)
    for letter, chance in chances.items():
        row[ids[letter]] = float(np.log(chance))
    law = exact_law(lambda text: chances, banned, 3)
    assert sum(law.values()) == pytest.approx(1)
    engine, _, _ = fake_engine(lambda text: row, VOCAB, tokenizer=byte_tokenizer)
    trials, found = 1500, Counter()
    for seed in range(trials):
        options = {"seed": seed, "max_new_tokens": 3, "banned_strings": banned}
        found["".join(engine.generate([5], options))] += 1
    assert set(found) <= set(law)
    for text, chance in law.items():
        spread = np.sqrt(trials * chance * (1 - chance))
        assert abs(found[text] - trials * chance) < 5 * spread + 1, text


@pytest.mark.parametrize("options", [
    {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.05}, {"mirostat_mode": 2, "mirostat_tau": 2.0},
    {"adaptive_target": 0.4, "top_k": 4}, {"xtc_probability": 0.5}, {"repetition_penalty": 1.3},
    {"dry_multiplier": 0.8, "dry_sequence_breakers": []},
])
def test_a_redraw_is_a_draw_in_which_the_token_is_banned(byte_tokenizer, monkeypatch, options):
    """All state goes back: the draws that stay are those of a sampler that saw no others."""
    draws: list[tuple[Sampler, int, frozenset, int]] = []
    sample = Sampler.sample

    def spy(self, row, history, excluded=()):
        token_id = sample(self, row, history, excluded)
        draws.append((self, len(history), frozenset(excluded), token_id))
        return token_id

    logits = invented(letters_of(byte_tokenizer, "abcd-"), 5)
    engine, _, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
    chosen = {"seed": 11, "max_new_tokens": 60, "banned_strings": ["ab", "bcd", "d-a"]} | options
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", spy)
        generation = engine.generate([5], chosen)
        text = "".join(generation)
    assert text == "".join(engine.generate([5], chosen)), "the same seed gives the same text"
    history = [5, *generation.token_ids]
    assert len(draws) > 60, "nothing went back"
    plain = Sampler(SamplingSettings(**{k: v for k, v in chosen.items() if k != "banned_strings"}))
    plain._random = generation._job.sampler._random
    for length in range(1, len(history)):
        at = [draw for draw in draws if draw[1] == length]
        excluded = at[-1][2]
        assert at[-1][3] == history[length] and history[length] not in excluded
        row = LogitsRow(logits(history[:length]).numpy())
        left = plain.candidates(row, history[:length], excluded)
        assert not set(left.ids[left.logits > -np.inf]) & excluded
        for feedback in plain._feedback:
            feedback.observe(history[length])
        plain._num_drawn += 1
    for mine, its in zip(plain._feedback, generation._job.sampler._feedback, strict=True):
        mine, its = ({k: v for k, v in vars(one).items() if isinstance(v, float)}
                     for one in (mine, its))
        assert mine == its
    assert plain._num_drawn == generation._job.sampler._num_drawn == 60


# ---- With everything else that ends, bounds or hides text ----


def run(tokenizer, answer: str, **options) -> tuple[str, str | None, list[int]]:
    """Let a model spell an answer; where it may not, it writes the token with id 3, a "!"."""
    script = spell(tokenizer, answer)
    fallback = letters_of(tokenizer, "!")[0]

    def logits(text: list[int]) -> torch.Tensor:
        row = torch.full((VOCAB,), -40.0)
        row[fallback], row[script(text)] = 0.0, 10.0
        return row

    engine, _, cache = fake_engine(logits, VOCAB, tokenizer=tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 50} | options)
    pieces = list(generation)
    settle(engine)
    assert cache.num_free_pages == cache.num_pages
    assert all(pieces)
    return "".join(pieces), generation.finish_reason, generation.token_ids


@pytest.mark.parametrize(("answer", "options", "text", "reason"), [
    # The end, or the last token, comes while text is held back.
    ("one two", {"banned_strings": ["two three"]}, "one two", "eos"),
    ("one two three", {"banned_strings": ["two three"], "max_new_tokens": 9}, "one two t",
     "length"),
    ("one two three", {"banned_strings": ["two three"]}, "one !wo three", "eos"),
    ("one two three", {"banned_strings": ["E"]}, "on! two thr!!", "eos"),
    # A stop string within, around and before a banned string.
    ("one two three", {"banned_strings": ["two"], "stop": "tw"}, "one ", "stop"),
    ("one two three", {"banned_strings": ["two"], "stop": "two"}, "one ", "stop"),
    ("one two three", {"banned_strings": ["two"], "stop": "two three"}, "one ", "stop"),
    ("one two three", {"banned_strings": ["two"], "stop": "two fou"}, "one !wo three", "eos"),
    ("one two", {"banned_strings": ["two"], "stop": "two fou"}, "one !wo", "eos"),
    ("one two", {"banned_strings": ["two"], "stop": "two fou", "max_new_tokens": 7},
     "one !wo", "length"),
    ("one two three", {"banned_strings": ["three"], "stop": " t"}, "one", "stop"),
    # A beginning that is not continued is shown.
    ("aaab", {"banned_strings": ["aab"]}, "a!ab", "eos"),
    ("aabaab", {"banned_strings": ["aabaac"]}, "aabaab", "eos"),
    # Characters of several tokens.
    ("no é é", {"banned_strings": ["é"]}, None, "eos"),
])
def test_ends_while_text_is_held_back(byte_tokenizer, answer, options, text, reason):
    found = run(byte_tokenizer, answer, **options)
    if text is None:
        assert not set(options["banned_strings"]) & set(found[0])
        assert found[0].startswith("no ") and found[1] == reason
    else:
        assert found[:2] == (text, reason)
    shown = byte_tokenizer.decode(found[2])
    assert shown == found[0] if reason != "stop" else shown.startswith(found[0])


def test_a_repeated_text_ends_as_a_loop_without_what_was_taken_back(byte_tokenizer):
    text, reason, ids = run(byte_tokenizer, "ab" * 60, banned_strings=["abababababx"],
                            loop_detect_window=20, max_new_tokens=100)
    assert (text, reason, len(ids)) == ("ab" * 10, "loop", 20)
    # What is taken back does not count: "c" would break the pattern.
    text, reason, ids = run(byte_tokenizer, "c" * 60, banned_strings=["c"],
                            loop_detect_window=20, max_new_tokens=100)
    assert (text, reason, len(ids)) == ("!" * 20, "loop", 20)


def test_only_new_text_counts(byte_tokenizer):
    prompt = byte_tokenizer.encode("one tw", add_bos=False)
    letter = letters_of(byte_tokenizer, "o")[0]
    engine, _, _ = fake_engine(lambda text: letter, VOCAB, tokenizer=byte_tokenizer)
    generation = engine.generate(prompt, GREEDY | {"max_new_tokens": 1, "banned_strings": "two"})
    assert "".join(generation) == "o"


def test_hidden_tokens_hide_no_banned_string(byte_tokenizer):
    a, b, fallback = letters_of(byte_tokenizer, "ab!")
    answer = [a, 1, b, a, 1, 1, b]

    def logits(text: list[int]) -> torch.Tensor:
        row = torch.full((VOCAB,), -40.0)
        row[fallback] = 0.0
        if len(text) <= len(answer):
            row[answer[len(text) - 1]] = 10.0
        return row

    for skip, expected in ((True, "!b!b"), (False, "a<s>ba<s><s>b")):
        engine, _, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
        text = "".join(engine.generate([5], GREEDY | {
            "max_new_tokens": 7, "banned_strings": ["ab"], "skip_special_tokens": skip}))
        assert text == expected
    text = "".join(engine.generate([5], GREEDY | {
        "max_new_tokens": 7, "banned_strings": ["<S>"], "skip_special_tokens": False}))
    assert text == "a!ba!!b"


def test_tokens_are_given_once_they_are_final(byte_tokenizer):
    """A caller sees neither ids nor log probabilities of tokens that may be taken back."""
    script = spell(byte_tokenizer, "xx one two xx")
    engine, _, _ = fake_engine(script, VOCAB, tokenizer=byte_tokenizer)
    options = GREEDY | {"max_new_tokens": 40, "logprobs": 1, "banned_strings": ["one two!"]}
    generation = engine.generate_ids([5], options)
    taken = []
    for token_id in generation:
        taken.append(token_id)
        known = generation.token_ids
        assert known[: len(taken)] == taken
        text = byte_tokenizer.decode(known)
        assert not re.search("(^| )o(n(e( (t(wo?)?)?)?)?)?$", text), text
        assert len(generation.logprobs) >= len(taken)
    assert byte_tokenizer.decode(taken) == "xx one two xx"
    assert [entry.token_id for entry in generation.logprobs] == taken


@pytest.mark.parametrize("options", [
    {"banned_strings": ["onyx", "two" + "." * 200]},
    # Text that may begin a stop string may begin a banned one as well.
    {"banned_strings": ["onyx", "two"], "stop": "two" + "." * 200},
])
def test_a_cancelled_text_ends_before_what_may_be_a_banned_string(byte_tokenizer, options):
    script = spell(byte_tokenizer, "xx one two" + "." * 100)
    engine, model, cache = fake_engine(script, VOCAB, tokenizer=byte_tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 90} | options)
    pieces = [next(generation)]

    def stop() -> None:
        if len(model.calls) > 20:
            generation.stop()

    model.before_call = stop
    pieces += generation
    assert (generation.finish_reason, "".join(pieces)) == ("cancelled", "xx one ")
    assert byte_tokenizer.decode(generation.token_ids) == "xx one "
    assert generation.stats.new_tokens == 7
    settle(engine)
    assert cache.num_free_pages == cache.num_pages


def test_an_error_while_text_is_held_back_loses_no_page(byte_tokenizer):
    script = spell(byte_tokenizer, "xx one two")
    engine, model, cache = fake_engine(script, VOCAB, tokenizer=byte_tokenizer)
    model.fail_at = 7
    generation = engine.generate([5], GREEDY | {"banned_strings": ["one two"]})
    pieces = []
    with pytest.raises(RuntimeError, match="injected"):
        pieces.extend(generation)
    assert "".join(pieces) == "xx " and generation.finish_reason == "failed"
    settle(engine)
    assert cache.num_free_pages == cache.num_pages


def test_what_a_grammar_allows_and_banned_strings_leave(byte_tokenizer):
    pytest.importorskip("llguidance")
    pattern = "([abc]{2}-){6}"
    ids = letters_of(byte_tokenizer, "abc-")
    for seed in range(6):
        logits = invented(ids, seed)
        engine, _, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
        grammars = Grammars(byte_tokenizer, byte_tokenizer.vocab_size, engine.eos_token_ids)

        def may_follow(answer, grammars=grammars):
            matcher = grammars.matcher(SamplingSettings(regex_pattern=pattern))
            for token_id in answer:
                matcher.accept(token_id)
            return matcher.allowed_ids

        banned = ["ab", "c-c", "a-a", "bb-"]
        options = GREEDY | {"regex_pattern": pattern, "banned_strings": banned}
        expected = define(byte_tokenizer, lambda answer: logits([5, *answer]), banned, 18,  # noqa: B023
                          engine.eos_token_ids, may_follow=may_follow)
        text = "".join(engine.generate([5], options))
        assert text == byte_tokenizer.decode(expected.ids) and re.fullmatch(pattern, text)


def test_a_grammar_after_a_token_goes_back_to_before_it(byte_tokenizer):
    pytest.importorskip("llguidance")
    logits = invented(letters_of(byte_tokenizer, "ab-:"), 1)
    engine, _, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
    text = "".join(engine.generate([5], GREEDY | {
        "max_new_tokens": 60, "grammar_trigger": ":", "regex_pattern": "[ab]{5}",
        "banned_strings": [":a", "bab"]}))
    assert re.fullmatch("[^:]*:b[ab]{4}", text) and "bab" not in text


# ---- No way on ----


def test_one_token_more_is_taken_back_where_none_is_left(byte_tokenizer):
    """After "xa" only "b" may come, so the first "x" that is still held goes as well."""
    pytest.importorskip("llguidance")
    text, reason, _ = run(byte_tokenizer, "xabxab", regex_pattern="(xab|!y)+",
                          banned_strings=["ab", "xac"], max_new_tokens=6)
    assert (text, reason) == ("!y!y!y", "length")


@pytest.mark.parametrize("bound", ["regex_pattern", "allowed_tokens"])
def test_an_error_says_that_every_way_on_is_banned(byte_tokenizer, bound):
    (t,) = letters_of(byte_tokenizer, "t")
    engine, _, cache = fake_engine(lambda text: t, VOCAB, tokenizer=byte_tokenizer)
    if bound == "regex_pattern":
        pytest.importorskip("llguidance")
    value = {"regex_pattern": "two", "allowed_tokens": [t]}[bound]
    generation = engine.generate([5], GREEDY | {bound: value, "banned_strings": ["T"]})
    with pytest.raises(InvalidSettings, match="banned_strings: .*completes no banned string"):
        list(generation)
    settle(engine)
    assert cache.num_free_pages == cache.num_pages


def test_a_search_that_finds_no_way_ends(byte_tokenizer, monkeypatch):
    """The end of all 4,096 texts is banned, and all of each may begin a banned string."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(rewind, "MOST_REJECTED", 500)
    engine, _, cache = fake_engine(
        invented(letters_of(byte_tokenizer, "ab!")), VOCAB, tokenizer=byte_tokenizer)
    generation = engine.generate([5], GREEDY | {
        "regex_pattern": "[ab]{12}!",
        "banned_strings": [
            "a!", "b!", *("".join(word) + "?" for word in itertools.product("ab", repeat=12))]})
    with pytest.raises(InvalidSettings, match="banned_strings: .*none among 500 that were tried"):
        list(generation)
    settle(engine)
    assert cache.num_free_pages == cache.num_pages


def test_banned_strings_need_a_tokenizer_and_text():
    engine, _, _ = fake_engine(lambda text: 7, VOCAB)
    with pytest.raises(InvalidTokenizer):
        engine.generate_ids([5], banned_strings=["a"])
    for wrong in ("", [""], ["a", "x" * 1001], [5], {"a"}):
        with pytest.raises(InvalidSettings, match="banned_strings"):
            engine.generate_ids([5], banned_strings=wrong)
    assert SamplingSettings.from_dict({"banned_strings": "a"}).banned_strings == ("a",)
    assert SamplingSettings.from_dict({"banned_strings": None}).banned_strings == ()


# ---- Guidance ----


def test_the_negative_text_goes_back_as_well(byte_tokenizer):
    ids = letters_of(byte_tokenizer, "abc-")
    logits = invented(ids, 4)
    scale, banned = 1.7, ["ab", "ca-", "bb"]
    engine, _, cache = fake_engine(logits, VOCAB, byte_tokenizer, 1024, pages=8)
    # The empty negative prompt is this token.
    engine.config.bos_token_id = 9

    def guided(answer: list[int]) -> torch.Tensor:
        rows = (logits([*text, *answer]).numpy() for text in ([5] * 250, [9]))
        return torch.from_numpy(guide(*rows, scale))

    expected = define(byte_tokenizer, guided, banned, 300, engine.eos_token_ids)
    assert expected.num_lost
    generation = engine.generate([5] * 250, GREEDY | {
        "max_new_tokens": 300, "guidance_scale": scale, "banned_strings": banned})
    assert "".join(generation) == byte_tokenizer.decode(expected.ids)
    assert cache.num_free_pages == cache.num_pages


# ---- Tokens that are not drawn freely ----


@pytest.mark.parametrize("banned", [["]a", "]b"], ["a!", "b!"], ["a!!]b"], ["!]-", "b!!"]])
def test_text_that_is_forced_stays(byte_tokenizer, banned):
    """The token before it or after it is another one."""
    for seed in range(8):
        logits = invented(letters_of(byte_tokenizer, "ab-"), seed)
        engine, _, _ = fake_engine(logits, VOCAB, tokenizer=byte_tokenizer)
        text = "".join(engine.generate([5], GREEDY | {
            "max_new_tokens": 12, "ban_eos_token": True, "banned_strings": banned,
            "start_in_reasoning": "always", "reasoning_budget_tokens": 4,
            "reasoning_budget_message": "!!", "reasoning_end_token": "]"}))
        assert re.fullmatch("[ab-]{4}!![]][ab-]{5}", text), text
        assert not any(word in text for word in banned)


def test_text_that_is_forced_cannot_be_banned(byte_tokenizer):
    engine, _, _ = fake_engine(endless, VOCAB, tokenizer=byte_tokenizer)
    options = {"reasoning_budget_tokens": 4, "reasoning_end_token": "</think>"}
    with pytest.raises(InvalidSettings, match="banned_strings.*ends the reasoning by force"):
        engine.generate([5], options, banned_strings=["</THINK"])
    engine.generate([5], options, banned_strings=["<think>"])


def test_a_healed_token_is_drawn_again_as_well():
    """Its text begins with that of the prompt's last token, and only what follows is searched."""
    with exl_loader.load(DEMO_MODEL, ctx_size=512) as model:
        prompt = "import os\nimport s"
        options = GREEDY | {"token_healing": True, "max_new_tokens": 20}
        plain = "".join(model.generate(prompt, options))
        for banned in ([plain[:2]], [plain[:1].upper(), plain[3:6]], ["imports" + plain[:1]]):
            generation = model.generate(prompt, options | {"banned_strings": banned})
            text = "".join(generation)
            assert model.decode(model.encode(prompt)[:-1] + generation.token_ids) == prompt + text
            assert not any(word.lower() in text.lower() for word in banned)
            assert (text == plain) == (banned[0].startswith("import"))
