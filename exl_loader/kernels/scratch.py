"""Scratch memory of each operation, in bytes; integers only, no PyTorch.

`workspace.scratch_bytes` takes the largest for a model. The reference operations need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cache import CacheType
    from .interface import AttentionShape


# Constants of csrc/cpu/linear.h and linear_dense.cpp, in the largest form any target has.
_PASS_ROWS = 256
_DENSE_PASS_ROWS = 120
_MAX_DIRECT_ROWS = 8
_CHUNK_ROWS = 2048
_PANEL_COLUMNS = 32
_BLOCK_ROWS = 32
_SPAN_BYTES = 28
_CARVE_ALIGNMENT = 64
_FLOAT_BYTES = 4


def linear_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what `Ops.linear` needs for up to `rows` rows of `in_features` inputs.

    The larger of two: quantised layers hold their activations as int8 with a scale and a sum
    per 32 rows at worst, and a buffer of unpacked codes and float32 sums per thread;
    unquantised ones hold regrouped float32 activations.
    """
    return max(_packed_scratch_bytes(rows, in_features), _dense_scratch_bytes(rows, in_features))


def _packed_scratch_bytes(rows: int, in_features: int) -> int:
    from .native import default_threads

    blocks = -(-in_features // _BLOCK_ROWS)
    held_rows = min(max(rows, _MAX_DIRECT_ROWS), _PASS_ROWS)
    codes = held_rows * blocks * _BLOCK_ROWS
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
    """Return what `Ops.write_cache` needs for `rows` rows."""
    return 0


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `Ops.attention` needs.

    Args:
        rows: rows of a call, of all its sequences together.
        max_batch_size: sequences of a call.
        ctx_size: tokens of the longest sequence.
    """
    return 0
