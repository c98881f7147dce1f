"""The sampler of a request: distribution, draw, seeds, special tokens, damaged logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.sampling import Candidates, Sampler, TokenRoles, draw
from exl_loader.generation.settings import SamplingSettings
from exl_loader.utils.errors import InvalidCheckpoint, InvalidSettings
from support.fake_model import fake_engine


def defined_distribution(logits, history, options: SamplingSettings, banned=()) -> dict[int, float]:
    """Compute the distribution by its definition, one token at a time in double precision."""
    row = [float(x) for x in logits]
    if options.repetition_penalty != 1:
        for i in set(list(history)[-options.repetition_penalty_range :]):
            penalty = np.float32(options.repetition_penalty)
            seen = np.float32(row[i])
            row[i] = float(seen / penalty if seen > 0 else seen * penalty)
    ranked = sorted((i for i in range(len(row)) if i not in banned), key=lambda i: (-row[i], i))
    if options.greedy:
        return {ranked[0]: 1.0}
    if options.top_k > 0:
        ranked = ranked[: options.top_k]
    weights = {i: math.exp((row[i] - row[ranked[0]]) / options.temperature) for i in ranked}
    total = math.fsum(weights.values())
    probabilities = {i: weight / total for i, weight in weights.items()}
    if options.top_p < 1:
        kept, reached = {}, 0.0
        for i in ranked:
            if kept and reached >= options.top_p:
                break
            kept[i] = probabilities[i]
            reached += probabilities[i]
        probabilities = kept
    if options.min_p > 0:
        largest = max(probabilities.values())
        probabilities = {i: p for i, p in probabilities.items() if p >= options.min_p * largest}
    total = math.fsum(probabilities.values())
    return {i: p / total for i, p in probabilities.items()}


def sampled_distribution(logits, history, options, banned=()) -> dict[int, float]:
    """Return the distribution that a sampler draws from."""
    sampler = Sampler(options, 0, TokenRoles(banned_ids=tuple(banned)))
    left = sampler.candidates(LogitsRow(logits), history)
    if options.greedy:
        return {sampler.sample(LogitsRow(logits), history): 1.0}
    weights = np.exp(left.logits.astype(np.float64) - float(left.logits.max()))
    pairs = zip(left.ids, weights / weights.sum(), strict=True)
    return {int(i): float(p) for i, p in pairs if p > 0}


# Multiples of an eighth, so that ties are common and no result depends on rounding.
LOGITS = st.lists(
    st.integers(-80, 80).map(lambda n: n / 8), min_size=1, max_size=400
)


@settings(max_examples=300)
@given(data=st.data())
def test_the_distribution_agrees_with_the_definition(data):
    logits = np.array(data.draw(LOGITS), np.float32)
    size = len(logits)
    options = SamplingSettings(
        temperature=data.draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, 2 * size)),
        # Sums of these distributions do not hit these numbers.
        top_p=data.draw(st.sampled_from([1.0, 0.0, 0.1234567, 0.5432167, 0.9123457])),
        min_p=data.draw(st.sampled_from([0.0, 0.0123457, 0.3141593])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.25, 2.0])),
        repetition_penalty_range=data.draw(st.integers(0, 6)),
    )
    history = data.draw(st.lists(st.integers(0, size - 1), max_size=8))
    banned = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    expected = defined_distribution(logits, history, options, banned)
    actual = sampled_distribution(logits, history, options, banned)
    assert actual.keys() == expected.keys()
    for token, probability in expected.items():
        assert actual[token] == pytest.approx(probability, rel=1e-5)


@settings(max_examples=100)
@given(logits=LOGITS, uniform=st.floats(0, 1, exclude_max=True))
def test_the_draw_inverts_the_summed_probability(logits, uniform):
    row = np.array(logits, np.float32)
    token = draw(Candidates.from_row(row), uniform)
    weights = np.exp(row.astype(np.float64) - row.max())
    reached = np.cumsum(weights) / weights.sum()
    below = reached[token - 1] if token else 0.0
    assert below - 1e-6 <= uniform <= reached[token] + 1e-6


def skewed_distribution(probabilities: dict[int, float], skew: float) -> dict[int, float]:
    """Return the probabilities of a skewed draw: those of u^(e^-skew) in a token's interval."""
    skewed, reached = {}, 0.0
    for token in sorted(probabilities, key=lambda i: (-probabilities[i], i)):
        before, reached = reached, min(1.0, reached + probabilities[token])
        skewed[token] = reached ** math.exp(skew) - before ** math.exp(skew)
    return skewed


@settings(max_examples=300)
@given(logits=LOGITS, uniform=st.floats(0, 1, exclude_max=True),
       skew=st.sampled_from([-100, -2.0, -0.5, 0.01, 0.7, 3.0, 12.0, 100]))
def test_a_skewed_draw_inverts_the_sum_of_falling_probabilities(logits, uniform, skew):
    row = np.array(logits, np.float32)
    weights = np.exp(row.astype(np.float64) - row.max())
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    reached = np.cumsum(weights[ranked]) / weights.sum()
    rank = ranked.index(draw(Candidates.from_row(row), uniform, skew))
    power = uniform ** math.exp(-skew)
    below = reached[rank - 1] if rank else 0.0
    assert below - 1e-6 <= power <= reached[rank] + 1e-6
    # The order of the candidates does not matter.
    falling = Candidates.from_row(row).reordered(row)
    assert draw(falling, uniform, skew) == ranked[rank]


def assert_draws_follow(
    expected: dict[int, float], logits: np.ndarray, options: SamplingSettings
) -> None:
    """Draw from logits with top_k 20, and compare with the probability of each id."""
    sampler, draws = Sampler(options), 20000
    row = LogitsRow(logits)
    counts = np.bincount([sampler.sample(row, []) for _ in range(draws)], minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(expected)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    # 19 degrees of freedom: mean 19, standard deviation 6.2; eight of them never by chance.
    assert chi_square < 19 + 8 * 6.2


@pytest.mark.parametrize("skew", [-1.0, 0.4, 1.5])
def test_skewed_draws_follow_the_closed_form(skew):
    # Some tokens are equally likely, and their order matters.
    logits = np.random.default_rng().standard_normal(300).round(1).astype(np.float32)
    options = SamplingSettings(
        top_k=20, skew=skew, seed=int(np.random.default_rng().integers(1 << 40)))
    expected = skewed_distribution(defined_distribution(logits, [], options), skew)
    assert_draws_follow(expected, logits, options)


def test_a_skewed_draw_of_a_vocabulary_is_that_of_sorting_it():
    rng = np.random.default_rng()
    row = (rng.standard_normal(100_000) * 2).round(2).astype(np.float32)
    row[rng.integers(0, len(row), 1000)] = -np.inf
    weights = np.exp(row.astype(np.float64) - row.max())
    ranked = np.lexsort((np.arange(len(row)), -row))
    reached = np.cumsum(weights[ranked]) / weights.sum()
    for uniform, skew in [(0.0, 1.0), (0.3, 0.5), (0.9, 1.0), (0.999, 3.0), (1 - 1e-16, 100.0)]:
        rank = int(np.flatnonzero(ranked == draw(Candidates.from_row(row), uniform, skew))[0])
        below = reached[rank - 1] if rank else 0.0
        assert below - 1e-6 <= uniform ** math.exp(-skew) <= reached[rank] + 1e-6
        assert row[ranked[rank]] > -np.inf


def test_draws_follow_the_distribution():
    logits = np.random.default_rng().standard_normal(300).astype(np.float32)
    options = SamplingSettings(top_k=20, seed=int(np.random.default_rng().integers(1 << 40)))
    expected = defined_distribution(logits, [], options)
    assert_draws_follow(expected, logits, options)


def test_the_last_random_number_does_not_draw_a_banned_token():
    row = np.full(1000, -np.inf, np.float32)
    row[:500] = 0
    largest = float(np.nextafter(1.0, 0.0))
    assert draw(Candidates.from_row(row), largest) == 499
    assert draw(Candidates.from_row(row[::-1].copy()), 0.0) == 500


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_k": 1, "top_p": 0.5}])
def test_greedy_takes_the_lowest_of_equal_ids(options):
    row = np.array([0, 3, 1, 3, 3], np.float32)
    for seed in range(5):
        assert Sampler(SamplingSettings(**options), seed).sample(LogitsRow(row), []) == 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    row = np.array([1, 9, 2, 8.5], np.float32)
    assert Sampler(SamplingSettings(temperature=temperature), 1).sample(LogitsRow(row), []) == 1


def test_a_huge_temperature_is_uniform():
    row = np.array([1, 9, -5, 3], np.float32)
    actual = sampled_distribution(row, [], SamplingSettings(temperature=1e30))
    assert actual == pytest.approx(dict.fromkeys(range(4), 0.25))


def test_top_k_of_equal_logits_keeps_the_lowest_ids():
    row = np.zeros(5000, np.float32)
    row[4000] = 1
    kept = sampled_distribution(row, [], SamplingSettings(top_k=5))
    assert sorted(kept) == [0, 1, 2, 3, 4000]


def test_top_p_over_a_flat_vocabulary():
    """Far more tokens are kept than are sorted first."""
    row = np.zeros(20000, np.float32)
    kept = sampled_distribution(row, [], SamplingSettings(top_p=0.50001))
    assert sorted(kept) == list(range(10001))


def test_the_row_is_not_changed():
    row = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    before = row.copy()
    options = SamplingSettings(repetition_penalty=2.0, top_k=3)
    Sampler(options, 1, TokenRoles(banned_ids=(5,))).sample(LogitsRow(row), [1, 2, 3])
    assert (row == before).all()


def test_the_repetition_penalty_counts_the_last_tokens_only():
    row = np.array([2, 2, 2, -2], np.float32)
    options = SamplingSettings(repetition_penalty=2.0, repetition_penalty_range=2)
    actual = sampled_distribution(row, [0, 1, 3, 3, 1], options)
    weights = np.exp([2, 1, 2, -4.0])
    assert actual == pytest.approx(dict(enumerate(weights / weights.sum())))


def test_padding_is_never_drawn():
    row = np.zeros(100, np.float32)
    row[90:] = 50
    for options in ({}, {"temperature": 0}, {"top_k": 5}, {"repetition_penalty": 1.5}):
        sampler = Sampler(SamplingSettings(**options), 3, TokenRoles(vocab_size=90))
        assert all(sampler.sample(LogitsRow(row), [95, 1]) < 90 for _ in range(20))


def test_the_same_seed_gives_the_same_tokens():
    row = np.random.default_rng(2).standard_normal(1000).astype(np.float32)

    def tokens(sampler: Sampler) -> list[int]:
        return [sampler.sample(LogitsRow(row), []) for _ in range(50)]

    options = SamplingSettings(seed=7)
    assert tokens(Sampler(options)) == tokens(Sampler(options))
    assert tokens(Sampler(options)) != tokens(Sampler(options, seed=8))
    random = Sampler(SamplingSettings())
    assert tokens(random) == tokens(Sampler(SamplingSettings(), seed=random.seed))
    assert Sampler(SamplingSettings()).seed != random.seed


def test_the_generator_is_the_same_on_every_machine():
    """Recorded once, because a seed must keep giving the same text."""
    row = np.zeros(1000, np.float32)
    sampler = Sampler(SamplingSettings(seed=1234))
    assert [sampler.sample(LogitsRow(row), []) for _ in range(5)] == [557, 223, 293, 579, 811]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}])
def test_damaged_logits_are_an_error(value, options):
    row = np.zeros(100, np.float32)
    row[40] = value
    with pytest.raises(InvalidCheckpoint, match="NaN or infinity"):
        Sampler(SamplingSettings(**options), 1).sample(LogitsRow(row), [])


def test_large_finite_logits_are_valid():
    row = np.full(100, 3e38, np.float32)
    row[7] = 3.2e38
    assert Sampler(SamplingSettings(), 1).sample(LogitsRow(row), []) == 7


def roles_of(options, tokenizer, eos_ids=(2,)) -> TokenRoles:
    return TokenRoles.from_request(
        SamplingSettings(**options), tokenizer, vocab_size=300, eos_ids=eos_ids, prompt_ids=[7]
    )


def test_roles_are_looked_up_in_the_tokenizer(byte_tokenizer):
    def ids(text: str) -> set[int]:
        return set(byte_tokenizer.encode(text, add_bos=False))

    roles = roles_of({"dry_multiplier": 1}, byte_tokenizer)
    assert roles.breaker_ids == ids("\n") | ids(":") | ids('"') | ids("*")
    roles = roles_of({"dry_multiplier": 1, "dry_sequence_breakers": '"one;"'}, byte_tokenizer)
    assert roles.breaker_ids == ids(";")
    assert roles_of({"xtc_probability": 0.5}, byte_tokenizer).spared_ids == ids("\n") | {2}
    assert roles_of({"xtc_probability": 0.5}, None).spared_ids == {2}
    assert roles_of({}, byte_tokenizer).banned_ids == ()
    roles = roles_of({"custom_token_bans": "9,4", "ban_eos_token": True}, byte_tokenizer)
    assert roles.banned_ids == (2, 4, 9)


def test_breakers_are_tokens_inside_a_text(spm_tokenizer):
    """SentencePiece has tokens for the beginning of a word, which include a space."""
    def last(text: str) -> list[int]:
        return spm_tokenizer.encode(text, add_bos=False)[-1:]

    letter = next(c for c in "tabcdeho" if last(c) != last("a" + c))
    options = {"dry_multiplier": 1, "dry_sequence_breakers": [letter]}
    assert roles_of(options, spm_tokenizer).breaker_ids == set(last("a" + letter))


def test_breakers_need_a_tokenizer():
    assert roles_of({}, None).breaker_ids == frozenset()
    assert roles_of({"dry_multiplier": 1, "dry_sequence_breakers": []}, None).breaker_ids == set()
    with pytest.raises(InvalidSettings, match="dry_sequence_breakers.*no tokenizer"):
        roles_of({"dry_multiplier": 1}, None)


def test_bans_and_biases_reach_a_generation():
    engine, _, _ = fake_engine(lambda text: text[-1] + 1)
    plain = {"max_new_tokens": 3, "temperature": 0}
    assert list(engine.generate_ids([5], plain)) == [6, 7, 8]
    banned = {**plain, "custom_token_bans": "6,0"}
    assert list(engine.generate_ids([5], banned))[0] == 1
    assert list(engine.generate_ids([5], {**plain, "logit_bias": {"9": 20}})) == [9, 9, 9]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"custom_token_bans": [300]}, "custom_token_bans"),
     ({"logit_bias": {"300": 1}}, "logit_bias")],
)
def test_ids_outside_the_vocabulary_are_refused(options, name):
    engine, _, _ = fake_engine(lambda text: 1)
    with pytest.raises(InvalidSettings, match=f"{name}.*0 to 299.*300"):
        engine.generate_ids([5], options)


def test_the_same_seed_and_settings_give_the_same_ids():
    engine, _, _ = fake_engine(lambda text: text[-1] % 7 + 1)
    options = {
        "temperature": 3, "top_p": 0.95, "mirostat_mode": 2, "mirostat_tau": 4,
        "xtc_probability": 0.5, "xtc_threshold": 0.001, "dry_multiplier": 1,
        "dry_sequence_breakers": [], "frequency_penalty": 0.5, "max_new_tokens": 60,
        "ban_eos_token": True,
    }
    first = engine.generate_ids([5, 6], options)
    ids = list(first)
    assert len(ids) == 60 and len(set(ids)) > 10
    assert list(engine.generate_ids([5, 6], {**options, "seed": first.seed})) == ids
    assert list(engine.generate_ids([5, 6], {**options, "seed": first.seed + 1})) != ids
