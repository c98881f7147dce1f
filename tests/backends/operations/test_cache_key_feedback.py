"""Rounding keys with feedback: against its definition, and what it is for."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from exl_loader.backends.cuda.attention import AttentionOps
from exl_loader.backends.reference.codec import dequantize, quantize, rotate
from exl_loader.backends.reference.feedback import BLOCK, feedback_matrix
from exl_loader.backends.reference.ops import ReferenceOps
from support.cache_layers import make_batch, make_layer, random_rows, write
from support.key_feedback_cases import moments, stored_feedback, written
from support.targets import ALL_CPUS, TARGETS, target

REFERENCE = ReferenceOps()


@pytest.fixture(params=[*ALL_CPUS, *TARGETS])
def ops(request):
    return target(request.param, AttentionOps)


def read(codes, scales, head_dim, bits):
    """Return the vectors that were written, float32 [n, head_dim]."""
    codes, scales = codes.flatten(0, 2), scales.flatten(0, 2)
    found = (codes != 0xFF).any(dim=1)
    return dequantize(codes[found], scales[found], head_dim, bits)


@lru_cache
def written_by_the_reference(cache_type, head_dim):
    """Return a batch, keys, their feedback, and a layer of them, once for all targets."""
    batch = make_batch([0, 250], [60, 40])
    k = random_rows(100, 2, head_dim, 1)
    feedback = stored_feedback(moments(2, head_dim))
    return batch, k, feedback, written(REFERENCE, cache_type, k, batch, feedback)


@pytest.mark.parametrize("cache_type", ["q6", "q4", "q3", "q4_q8", "q6_fp16"])
@pytest.mark.parametrize("head_dim", [4, 20, 64, 72, 80, 96, 128, 256, 300])
def test_keys_are_written_as_the_reference_does(ops, cache_type, head_dim):
    """The rotation's sums differ in the last bit, so that a tie may fall differently, and then all
    further elements of that key may. A CPU may also choose a negated scale, whose levels are as
    good but not the same."""
    batch, k, feedback, theirs = written_by_the_reference(cache_type, head_dim)
    ours = written(ops, cache_type, k, batch, feedback)
    a, b = (read(x.k_codes, x.k_scales, head_dim, x.cache_type.k_bits) for x in (ours, theirs))
    assert len(a) == len(b) == 200
    scales = [x.k_scales.flatten(0, 2) for x in (ours, theirs)]
    written_rows = scales[0].isfinite().all(dim=1)
    same_scales = (scales[0] == scales[1]).all(dim=1)[written_rows]
    assert same_scales.any()
    assert (a == b).all(dim=1)[same_scales].float().mean() >= 0.96
    assert (a - b).norm() <= 0.02 * b.norm()
    if ours.v_scales is not None:
        # Values are rounded element by element.
        bits = ours.cache_type.v_bits
        plain = written(ops, cache_type, k, batch, None)
        assert torch.equal(*(read(x.v_codes, x.v_scales, head_dim, bits) for x in (ours, plain)))


@pytest.mark.parametrize("cache_type", ["q6", "q4", "q3"])
def test_scores_err_less_at_the_same_scales(ops, cache_type):
    batch, k = make_batch([0], [200]), random_rows(200, 2, 128, 3)
    bits, m = int(cache_type[1:]), moments(2, 128, seed=5)
    errors = []
    layers = [written(ops, cache_type, k, batch, f) for f in (None, stored_feedback(m))]
    assert torch.equal(layers[0].k_scales.view(torch.int16), layers[1].k_scales.view(torch.int16))
    exact = rotate(k.double()).transpose(0, 1)
    for layer in layers:
        stored = dequantize(layer.k_codes[0, :, :200].flatten(0, 1),
                            layer.k_scales[0, :, :200].flatten(0, 1), 128, bits)
        error = exact - stored.view(2, 200, 128)
        errors.append(torch.einsum("hni,hij,hnj->", error, m, error))
    assert errors[1] < 0.75 * errors[0]


# Squared errors of the last are infinite, of a key that is finite.
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e21])
@pytest.mark.parametrize("head_dim", [96, 160, 288])
def test_a_fault_in_one_group_leaves_the_codes_of_the_others(ops, value, head_dim):
    k = random_rows(4, 1, head_dim, 2)
    k[1, 0, 40] = value
    batch = make_batch([0], [4])
    with_feedback = written(ops, "q4", k, batch, stored_feedback(moments(1, head_dim)))
    plain = written(ops, "q4", k, batch, None)
    assert torch.equal(with_feedback.k_codes[0, 0, 1], plain.k_codes[0, 0, 1])
    assert not torch.equal(with_feedback.k_codes[0, 0, 0], plain.k_codes[0, 0, 0])
    faulty = with_feedback.k_scales[0, 0, :4].isnan()
    assert faulty.nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("cache_type", ["q6", "q4"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
def test_open_pages_have_the_unmodified_keys(ops, cache_type, head_dim):
    batch, k = make_batch([0, 200], [3, 6]), random_rows(9, 2, head_dim, 4)
    layers = []
    for feedback in (None, stored_feedback(moments(2, head_dim))):
        layer = make_layer(cache_type, int(batch.page_table.max()) + 1, 2, head_dim, 2)
        layer.key_feedback = feedback
        write(ops, k, k, layer, batch)
        layers.append(layer)
    plain, fed = layers
    assert head_dim == 8 or not torch.equal(plain.k_codes, fed.k_codes)
    for a, b in ((plain.k_open, fed.k_open), (plain.v_open, fed.v_open)):
        for ours, theirs in ((a.tokens, b.tokens), (a.first, b.first)):
            assert torch.equal(ours.codes, theirs.codes)
            assert ours.scales is None or torch.equal(
                ours.scales.view(torch.int16), theirs.scales.view(torch.int16))
    assert torch.equal(plain.v_codes, fed.v_codes)


def test_a_key_has_the_same_codes_alone_and_among_others(ops):
    batch, k = make_batch([100, 30, 250], [1, 4, 8]), random_rows(13, 2, 80, 6)
    feedback = stored_feedback(moments(2, 80))
    together = written(ops, "q4", k, batch, feedback)
    single = make_batch([100], [1])
    single.page_table = batch.page_table[:1].contiguous()
    alone = written(ops, "q4", k[:1].contiguous(), single, feedback)
    page = int(batch.page_table[0, 0])
    assert torch.equal(alone.k_codes[page, :, 100], together.k_codes[page, :, 100])


def test_a_matrix_feeds_later_blocks_only():
    feedback = feedback_matrix(moments(1, 24)[0])
    rows, columns = (torch.arange(24) // BLOCK for _ in range(2))
    assert (feedback != 0).equal(rows[:, None] < columns[None, :])


def test_a_blocks_error_is_made_up_for_best():
    """The definition by a search: no other targets of the further elements give smaller scores."""
    m = moments(1, 16)[0]
    feedback = feedback_matrix(m)
    generator = torch.Generator().manual_seed(0)
    error = torch.zeros(16, dtype=torch.float64)
    error[:BLOCK] = torch.randn(BLOCK, generator=generator, dtype=torch.float64)
    # An element that is rounded to a larger target has a more negative error.
    best = error - error @ feedback
    least = best @ m @ best
    for _ in range(50):
        other = best.clone()
        other[BLOCK:] += 0.01 * torch.randn(12, generator=generator, dtype=torch.float64)
        assert other @ m @ other > least


def test_no_feedback_is_the_plain_rounding():
    y = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(30, 64, 64, dtype=torch.float16)
    for ours, plain in zip(quantize(y, 4, zeros), quantize(y, 4), strict=True):
        assert torch.equal(ours, plain)
