"""Scratch memory of the CUDA operations, in bytes; integers only, no PyTorch.

Counters
--------
Where several blocks share a sum, the last one to arrive adds their parts. The counters for
that are the first `COUNTER_BYTES` of scratch, int32, and 0 before and after every operation:
the last block sets its own back. What an operation needs besides begins behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import scratch_attention, scratch_linear

if TYPE_CHECKING:
    from ...cache import CacheType
    from ..interface import AttentionShape

COUNTER_BYTES = 1 << 16

# A tile of 32 columns at 8 bits takes so many bytes an input feature: what a raw tensor needs
# on its way into the packed layout, where the cache is smaller than that.
_STAGED_TILE_BYTES = 32


def linear_scratch_bytes(rows: int, in_features: int, out_features: int) -> int:
    """Return what `linear` needs for up to `rows` rows, and packing one tile of the layer."""
    need = scratch_linear.linear_scratch_bytes(rows, in_features, out_features)
    return COUNTER_BYTES + max(need, _STAGED_TILE_BYTES * in_features)


def write_cache_scratch_bytes(rows: int, shape: AttentionShape, cache_type: CacheType) -> int:
    """Return what `write_cache` needs for up to `rows` rows."""
    return COUNTER_BYTES + scratch_attention.write_cache_scratch_bytes(rows, shape, cache_type)


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `attention` needs; arguments as those of `kernels/scratch.py`."""
    return COUNTER_BYTES + scratch_attention.attention_scratch_bytes(
        rows, max_batch_size, ctx_size, shape, cache_type
    )
