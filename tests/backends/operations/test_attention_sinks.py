"""Attention sinks against the reference: logits of heads that join the softmax of their rows."""

from __future__ import annotations

import pytest
import torch

from backends.operations.test_attention import (
    FLOAT_TOLERANCE,
    TOLERANCE,
    assert_like_reference,
    layer_for,
)
from exl_loader.backends.cuda.attention import AttentionOps
from support.attention_cases import attend, shape_of
from support.cache_layers import make_batch, one_of, random_rows
from support.targets import ALL_CPUS, TARGETS, target

pytestmark = pytest.mark.usefixtures("two_threads")

# Below, around and above the largest scores of the rows used here.
SINKS = torch.tensor([-30.0, 0.0, 1.5, 4.0, 8.0, 12.0])


@pytest.fixture(params=[*ALL_CPUS, *TARGETS])
def ops(request):
    return target(request.param, AttentionOps, threads=2)


@pytest.mark.parametrize(("cache_type", "head_dim", "tolerance"), [
    ("q4", 64, TOLERANCE), ("q8_fp16", 128, TOLERANCE), ("fp32", 64, FLOAT_TOLERANCE),
    ("q6", 72, FLOAT_TOLERANCE), ("q3", 80, TOLERANCE),
])  # fmt: skip
@pytest.mark.parametrize("window", [0, 150])
def test_sinks_equal_the_reference(ops, cache_type, head_dim, tolerance, window):
    """A row of one kv_split, rows of several, and a prompt, in one call."""
    batch = make_batch([30, 700, 0, 300], [1, 1, 45, 3])
    shape = shape_of(6, 2, head_dim, window=window)
    assert_like_reference(ops, cache_type, batch, shape, tolerance, sinks=SINKS)


def test_random_sinks(ops):
    seed = torch.seed() % 2**31
    print("seed", seed)
    sinks = 6 * torch.randn(6, generator=torch.Generator().manual_seed(seed))
    batch = make_batch([seed % 900, 0], [2, 40], seed=seed)
    assert_like_reference(ops, "q8", batch, shape_of(6, 3, 64, softcap=20.0), sinks=sinks)


@pytest.mark.parametrize(("cache_type", "head_dim"), [("q4", 64), ("fp16", 72)])
def test_the_least_sinks_change_no_bit_and_the_largest_take_all_the_weight(ops, cache_type,
                                                                           head_dim):
    batch, shape = make_batch([30, 700, 0], [1, 1, 40]), shape_of(4, 2, head_dim)
    layer = layer_for(ops, cache_type, batch, shape)
    q = random_rows(batch.num_rows, 4, head_dim, 3)
    without = attend(ops, q, layer, batch, shape)
    sinks = torch.tensor([-1e30, 1e30, -1e30, 1e30])
    actual = attend(ops, q, layer, batch, shape, sinks)
    assert torch.equal(actual[:, ::2], without[:, ::2])
    assert (actual[:, 1::2] == 0).all()


def test_a_row_with_sinks_has_the_same_bits_alone_and_among_others(ops):
    shape, batch = shape_of(6, 2, 64), make_batch([600, 0, 37], [1, 45, 20])
    layer = layer_for(ops, "q8", batch, shape)
    q = random_rows(batch.num_rows, 6, 64, 3)
    together = attend(ops, q, layer, batch, shape, SINKS)
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        alone = attend(ops, q[first:end].contiguous(), layer, one_of(batch, s), shape, SINKS)
        assert torch.equal(alone, together[first:end])
