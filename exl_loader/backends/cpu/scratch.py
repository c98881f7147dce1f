"""Scratch memory of each operation, in bytes; integers only, no PyTorch.

`CpuBackend.scratch_bytes` takes the largest. The reference operations need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...cache.layout import CacheType
    from ..base import AttentionShape


# Constants of csrc/cpu/linear.h and linear_dense.cpp, in the largest form any target has.
_PASS_ROWS = 256
_DENSE_PASS_ROWS = 120
_MAX_DIRECT_ROWS = 8
_CHUNK_ROWS = 2048
_PANEL_COLUMNS = 32
_BLOCK_ROWS = 32
_PLANES = 2
_SPAN_BYTES = 28
_CARVE_ALIGNMENT = 64
_FLOAT_BYTES = 4


def linear_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what `Ops.linear` needs for up to `rows` rows of `in_features` inputs.

    The larger of two: quantised layers hold their activations as two planes of int8 with a
    scale and a sum per 32 rows at worst, and per thread a buffer of unpacked codes and
    float32 sums; unquantised ones hold regrouped float32 activations.
    """
    return max(_packed_scratch_bytes(rows, in_features), _dense_scratch_bytes(rows, in_features))


def _packed_scratch_bytes(rows: int, in_features: int) -> int:
    from .library import default_threads

    blocks = -(-in_features // _BLOCK_ROWS)
    held_rows = min(max(rows, _MAX_DIRECT_ROWS), _PASS_ROWS)
    codes = held_rows * blocks * _BLOCK_ROWS * _PLANES
    table = held_rows * blocks * _FLOAT_BYTES
    total = sum(map(_carved, (blocks * _SPAN_BYTES, codes, table, table)))
    if rows > 1:
        buffer = _CHUNK_ROWS * _PANEL_COLUMNS + _PASS_ROWS * _PANEL_COLUMNS * _FLOAT_BYTES
        total += default_threads() * buffer
    return total


def _dense_scratch_bytes(rows: int, in_features: int) -> int:
    return min(rows, _DENSE_PASS_ROWS) * in_features * _FLOAT_BYTES if rows > 1 else 0


def _carved(nbytes: int) -> int:
    return -(-nbytes // _CARVE_ALIGNMENT) * _CARVE_ALIGNMENT


def write_cache_scratch_bytes(rows: int, shape: AttentionShape, cache_type: CacheType) -> int:
    """Return what `Ops.write_cache` needs for `rows` rows: a head fits on a thread's stack."""
    return 0


# Constants of csrc/cpu/attention.h.
_TILE_TOKENS = 64
_SPLIT_TOKENS = 512
_TASK_ROWS = 128
_LANES = 16


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `Ops.attention` needs.

    Every thread expands tiles and gathers sums for the rows of one task; a decoding sequence
    leaves one partial result for each of its splits of 512 tokens. There is room for those of
    one sequence of ctx_size tokens, or of max_batch_size sequences that share so many pages;
    where sequences share their beginnings and need more, they take turns.

    Args:
        rows: rows of a call, of all its sequences together.
        max_batch_size: sequences of a call.
        ctx_size: tokens of the longest sequence.
    """
    from .library import default_threads

    sharing = shape.num_heads // shape.num_kv_heads
    task_rows = max(1, _TASK_ROWS // sharing) * sharing
    stride = -(-shape.head_dim // _LANES) * _LANES
    thread = sum(
        _carved(count * _FLOAT_BYTES)
        for count in (
            shape.head_dim * _TILE_TOKENS,
            _TILE_TOKENS * stride,
            task_rows * _TILE_TOKENS,
            task_rows * shape.head_dim,
            task_rows,
            task_rows,
        )
    )
    thread += 2 * _partial_bytes(task_rows, stride)
    slots = -(-ctx_size // _SPLIT_TOKENS) + max_batch_size
    return default_threads() * thread + slots * _partial_bytes(shape.num_heads, stride)


def _partial_bytes(rows: int, stride: int) -> int:
    return sum(_carved(rows * width * _FLOAT_BYTES) for width in (stride, _LANES, 1))
