"""The matrices of key feedback are found when a model is loaded, and the search leaves no trace."""

from __future__ import annotations

import gc

import pytest
import torch

import exl_loader
from exl_loader.backends.reference.codec import rotation_matrix
from exl_loader.backends.reference.feedback import BLOCK, feedback_matrix
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import MAX_BIAS_PAIRS, has_feedback
from exl_loader.memory import buffers as memory
from exl_loader.model import forward, key_sample
from exl_loader.model.key_feedback import (
    POSITIONS,
    RIDGE,
    MeanOverPositions,
    layer_feedback,
)
from exl_loader.model.key_sample import (
    FEWEST_TEXT_IDS,
    MOST_TEXT_IDS,
    SAMPLE_LEN,
    SAMPLE_TEXT,
    sample_ids,
)
from support import model_builder as builder
from support.hf_models import make_model
from support.tiny import write_tiny_model

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2}


def turn(x: torch.Tensor, frequencies: torch.Tensor, position: int, interleaved: bool):
    """Turn rows as `Ops.rope` defines it, float64 [rows, head_dim]."""
    x, pairs = x.clone(), len(frequencies)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    cos, sin = (frequencies * position).cos(), (frequencies * position).sin()
    x[:, first], x[:, second] = (
        x[:, first] * cos - x[:, second] * sin, x[:, second] * cos + x[:, first] * sin
    )
    return x


def random_moments(head_dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(head_dim // 2 + 1, head_dim, generator=generator, dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(16, 8), (17, 4), (12, 5)])
def test_the_closed_form_is_the_mean_of_all_positions(head_dim, pairs, interleaved):
    # Equal ones, slow ones, none, and several turns a position.
    frequencies = torch.rand(pairs, dtype=torch.float64)
    frequencies[:4] = torch.tensor([1.0, 1.0, 1e-7, 0.0])
    frequencies[-1] = 2 * torch.pi + 1e-6
    moments = random_moments(head_dim)
    expected = torch.zeros_like(moments)
    for position in range(POSITIONS):
        half = turn(moments, frequencies, position, interleaved)
        expected += turn(half.T, frequencies, position, interleaved) / POSITIONS
    found = MeanOverPositions(head_dim, frequencies.tolist(), interleaved)(moments)
    assert (found - expected).abs().max() <= 1e-9 * moments.abs().max()


def test_a_frequency_of_zero_changes_nothing():
    moments = random_moments(8)
    assert torch.equal(MeanOverPositions(8, [0.0] * 4, False)(moments), moments)


@pytest.mark.parametrize("head_dim", [72, 32, 6, 3])
def test_one_factor_gives_the_shares_of_all_blocks(head_dim):
    moments = random_moments(head_dim) + torch.eye(head_dim, dtype=torch.float64)
    found = feedback_matrix(moments)
    for first in range(0, head_dim, BLOCK):
        end = first + BLOCK
        rest = moments[end:, end:]
        expected = torch.linalg.solve(rest, moments[end:, first:end]).T
        assert torch.allclose(found[first:end, end:], expected, rtol=1e-9, atol=1e-11)
        assert not found[first:end, :end].any()


def test_the_matrix_of_a_head_is_that_of_its_own_queries():
    queries = torch.randn(10, 6, 40)
    out = torch.full((3, 40, 64), 9.0, dtype=torch.float16)
    layer_feedback(queries, out, None)
    rotation = rotation_matrix(40)
    for head in range(3):
        rows = queries[:, 2 * head : 2 * head + 2].reshape(20, 40).double() @ rotation
        moments = rows.T @ rows / 20
        moments += RIDGE * moments.diagonal().mean() * torch.eye(40, dtype=torch.float64)
        expected = feedback_matrix(moments)
        assert (out[head, :, :40].double() - expected).abs().max() <= 1e-3
        assert not out[head, :, 40:].any() and out[head].any()


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_head_without_usable_queries_has_no_feedback(value):
    queries = torch.randn(8, 4, 32)
    queries[:, 2:] = 0.0
    queries[3, 2, 5] = value
    out = torch.full((2, 32, 32), 9.0, dtype=torch.float16)
    layer_feedback(queries, out, MeanOverPositions(32, [1.0, 0.1], False))
    assert out[0].any() and not out[1].any()


def test_equal_queries_give_finite_matrices():
    """The moments have one direction only, which the ridge makes invertible."""
    queries = (torch.randn(1, 1, 128) * 1e15).expand(64, 8, 128)
    out = torch.empty(1, 128, 128, dtype=torch.float16)
    layer_feedback(queries, out, None)
    assert out.isfinite().all() and out.abs().max() <= (10 * 128 + 1) ** 0.5


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 64, 32000])
def test_sample_ids_are_in_the_vocabulary_and_always_the_same(vocab_size):
    ids = sample_ids((), vocab_size, 1000)
    assert len(ids) == SAMPLE_LEN and ids == sample_ids((), vocab_size, 1000)
    assert 0 <= min(ids) and max(ids) < vocab_size
    assert sample_ids((), vocab_size, 10) == ids[:10]


def test_a_text_takes_the_place_of_random_ids():
    text = list(range(7, 7 + FEWEST_TEXT_IDS))
    assert sample_ids(text, 1000, 256) == text
    # Of the ids of a draft model's larger vocabulary, the model knows those below its size.
    assert sample_ids([*text, 900], 500, 256) == text
    assert sample_ids(text, 1000, 10) == text[:10]
    assert sample_ids(list(range(1000)), 1000, 256) == list(range(MOST_TEXT_IDS))
    assert sample_ids(text[1:], 1000, 256) == sample_ids((), 1000, 256)


def test_a_loaded_model_samples_the_text_where_it_has_a_tokenizer(tmp_path, monkeypatch):
    seen = []

    def look(*args):
        seen.append(sample_ids(*args))
        return seen[-1]

    monkeypatch.setattr(forward, "sample_ids", look)
    for name, has_tokenizer in (("with", True), ("without", False)):
        folder = write_tiny_model(tmp_path / name, **SIZES, tokenizer=has_tokenizer)
        options = {"ctx_size": 300, "cache_type": "q4", "model_draft": str(folder)}
        expected = sample_ids((), 288, 256)
        with exl_loader.load(folder, **options) as model:
            if has_tokenizer:
                expected = model.encode(SAMPLE_TEXT)[:MOST_TEXT_IDS]
                other = model.run_alone(lambda run, cache: iter([run.with_cache(cache)]))
                assert list(other)
        assert seen == [expected] * len(seen) and len(seen) == 2 + has_tokenizer
        seen.clear()


def matrices(cache) -> torch.Tensor:
    return torch.stack([layer.key_feedback for layer in cache.layers])


class WatchingOps(ReferenceOps):
    """Reference operations that keep the queries of each call of `attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[torch.Tensor] = []

    def attention(self, q, *args):
        self.queries.append(q.clone())
        super().attention(q, *args)


@pytest.mark.parametrize("cache_type", ["q6", "q4", "q3", "q4_q8", "q8_q4", "q8", "fp16"])
def test_a_model_has_the_matrices_of_its_queries(tmp_path, cache_type):
    folder, ops = write_tiny_model(tmp_path / "m", **SIZES), WatchingOps()
    _, cache = builder.build_model(folder, ops, cache_type=cache_type)
    if not has_feedback(cache.layers[0].cache_type.k_bits):
        assert not ops.queries and cache.layers[0].key_feedback is None
        return
    assert [len(q) for q in ops.queries] == [SAMPLE_LEN] * 2
    mean = MeanOverPositions(32, [10000 ** (-2 * i / 32) for i in range(16)], False)
    for layer, queries in zip(cache.layers, ops.queries, strict=True):
        expected = torch.zeros_like(layer.key_feedback)
        layer_feedback(queries, expected, mean)
        assert torch.equal(layer.key_feedback, expected) and expected.any(dim=(1, 2)).all()


@pytest.mark.parametrize("options", [
    {"chunk_size": 7}, {"chunk_size": 1}, {"chunk_size": 64}, {"sequences": 3},
    {"ctx_size": 256}, {"device": builder.split(1, 1)}, {},
])
def test_the_same_matrices_however_a_model_is_loaded(tmp_path, options):
    folder = write_tiny_model(tmp_path / "m", **SIZES)
    _, cache = builder.build_model(folder, ReferenceOps(), cache_type="q4")
    _, again = builder.build_model(folder, ReferenceOps(), cache_type="q4", **options)
    assert torch.equal(matrices(again), matrices(cache))


@pytest.mark.parametrize("sizes", [
    {"vocab_size": 2}, {"max_position_embeddings": 256},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
])
def test_small_vocabularies_short_models_and_frequencies_by_length(tmp_path, sizes):
    folder = write_tiny_model(tmp_path / "m", **SIZES, **sizes, tokenizer=False)
    model, cache = builder.build_model(folder, ReferenceOps(), cache_type="q4", ctx_size=256)
    assert matrices(cache).isfinite().all() and matrices(cache).any()
    found = matrices(cache).clone()
    ids = [i % 2 for i in range(100)]
    logits = builder.run_chunks(model, cache, ids, 50)
    assert logits.isfinite().all() and torch.equal(matrices(cache), found)


def test_a_model_with_fewer_positions_than_the_sample(tmp_path):
    make_model("gpt2", 30, tmp_path / "m", max_position_embeddings=40, vocab_size=331)
    ops = WatchingOps()
    _, cache = builder.build_model(tmp_path / "m", ops, cache_type="q4", ctx_size=40)
    assert {len(q) for q in ops.queries} == {40} and matrices(cache).any()


def test_the_search_leaves_no_trace(tmp_path):
    folder = write_tiny_model(tmp_path / "m", **SIZES)
    model, cache = builder.build_model(folder, ReferenceOps(), cache_type="q4", sequences=2)
    assert cache.num_free_pages == cache.num_pages and not model._local.steps
    ids = sample_ids((), 288, SAMPLE_LEN)
    sequence = cache.acquire(300, [*ids, 5])
    assert sequence.past_len == 0 and sequence.pages == [0, 1] and sequence.open_page == 0
    cache.release(sequence)


def test_another_cache_of_the_same_type_gets_the_same_matrices(tmp_path):
    folder = write_tiny_model(tmp_path / "m", **SIZES)
    model, cache = builder.build_model(folder, ReferenceOps(), cache_type="q4")
    expected = matrices(cache).clone()
    for layer in cache.layers:
        layer.key_feedback.fill_(torch.nan)
    model.with_cache(cache)
    assert torch.equal(matrices(cache), expected)


def sampled_bytes(kv_heads: int, head_dim: int, padded: int) -> int:
    """Bytes of two layers' matrices, means, and rooms for a bias."""
    of_head = head_dim * padded * 2 + head_dim * 4 + 3 * MAX_BIAS_PAIRS * 4
    return 2 * kv_heads * of_head


@pytest.mark.parametrize("cache_type", ["q6", "q4", "q3", "q4_q8", "q8_q4", "q8"])
@pytest.mark.parametrize("cache_window", [0, 256])
def test_the_plan_counts_the_matrices(tmp_path, cache_type, cache_window):
    options = {"ctx_size": 600, "cache_type": cache_type, "cache_window": cache_window}
    folder = write_tiny_model(tmp_path / "m", **SIZES, head_dim=40)
    (device,) = exl_loader.plan(folder, **options).devices
    expected = 0 if cache_type.startswith("q8") else sampled_bytes(2, 40, 64)
    assert device.key_feedback_bytes == expected
    with exl_loader.load(folder, **options) as loaded:
        assert loaded.allocated_bytes() == device.total_bytes


def test_a_draft_model_has_matrices_of_its_own(tmp_path):
    folder = write_tiny_model(tmp_path / "m", **SIZES)
    options = {"ctx_size": 600, "cache_type": "q4", "model_draft": str(folder)}
    (device,) = exl_loader.plan(folder, **options).devices
    assert device.key_feedback_bytes == 2 * sampled_bytes(2, 32, 32)
    with exl_loader.load(folder, **options) as loaded:
        assert loaded.allocated_bytes() == device.total_bytes
        ids = loaded.generate_ids([5, 6, 7], max_new_tokens=4, ban_eos_token=True)
        assert len(list(ids)) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("call", [0, 1])
def test_a_search_that_is_interrupted_frees_everything(tmp_path, monkeypatch, error, call):
    folder, calls = write_tiny_model(tmp_path / "m"), []

    def fail(*args):
        if len(calls) == call:
            raise error
        calls.append(args)

    gc.collect()
    before = memory.live_bytes()
    monkeypatch.setattr(key_sample, "layer_feedback", fail)
    with pytest.raises(type(error)):
        exl_loader.load(folder, ctx_size=256, cache_type="q4")
    calls.clear()
    gc.collect()
    assert memory.live_bytes() == before
