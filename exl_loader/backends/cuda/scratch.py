"""Scratch memory of the CUDA operations, in bytes; integers only, no PyTorch.

Counters
--------
Where several blocks share a sum, the last one to arrive adds their parts. The counters for
that are the first `COUNTER_BYTES` of scratch, int32, and 0 before and after every operation:
the last block sets its own back. What an operation needs besides begins behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import scratch_attention, scratch_linear, scratch_sampling

if TYPE_CHECKING:
    from ...cache.layout import CacheType
    from ..base import AttentionShape

COUNTER_BYTES = 1 << 16


def linear_scratch_bytes(rows: int, in_features: int, out_features: int) -> int:
    """Return what `linear` needs for up to `rows` rows, and packing the layer at load."""
    need = scratch_linear.linear_scratch_bytes(rows, in_features, out_features)
    return max(COUNTER_BYTES + need, scratch_linear.least_staging_bytes(in_features))


def write_cache_scratch_bytes(rows: int, shape: AttentionShape, cache_type: CacheType) -> int:
    """Return what `write_cache` needs for up to `rows` rows."""
    return COUNTER_BYTES + scratch_attention.write_cache_scratch_bytes(rows, shape, cache_type)


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `attention` needs; arguments as those of `backends/cpu/scratch.py`."""
    return COUNTER_BYTES + scratch_attention.attention_scratch_bytes(
        rows, max_batch_size, ctx_size, shape, cache_type
    )


def top_logits_scratch_bytes(rows: int, vocab_size: int) -> int:
    """Return what `top_logits` needs for up to `rows` rows."""
    return COUNTER_BYTES + scratch_sampling.top_logits_scratch_bytes(rows, vocab_size)
