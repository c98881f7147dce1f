"""Scratch memory of the linear operations on CUDA, in bytes; integers only, no PyTorch.

A quantised layer's activations lie there as integers: per row 64 bytes for each block of 32
stored rows, and 32 bytes of scale and sums for each window of 128 (csrc/cuda/linear_layout.cuh).
An unquantised layer's, where they are many: per row 16 bytes for each 4 inputs, in stages of 32
inputs, and a float32 for each part of 256 (csrc/cuda/linear_dense.cuh).
"""

from __future__ import annotations

from .layout import BLOCK_ROWS, SCALE_BYTES, TILE_COLUMNS, ZERO_BYTES, blocks_for, windows_for

# Rows that share one set of launches: enough for tensor cores, and scratch stays in proportion.
PASS_ROWS = 1024
BLOCK_CODE_BYTES = 64
NOTE_BYTES = 32
# The same for unquantised layers, whose inputs take twice the room, and how many rows need none.
DENSE_PASS_ROWS = 256
DENSE_DECODE_ROWS = 32
_DENSE_STAGE_FEATURES = 32
_DENSE_PART_FEATURES = 256
_ALIGNMENT = 256


def code_bytes(rows: int, in_features: int) -> int:
    """Bytes of the integers of `rows` rows, aligned."""
    return _aligned(rows * blocks_for(in_features) * BLOCK_CODE_BYTES)


def note_bytes(rows: int, in_features: int) -> int:
    """Bytes of the scales and sums of `rows` rows, aligned."""
    return _aligned(rows * windows_for(in_features) * NOTE_BYTES)


def dense_parts(in_features: int) -> int:
    """Parts that an unquantised layer's sum is cut into."""
    return -(-in_features // _DENSE_PART_FEATURES)


def dense_input_bytes(rows: int, in_features: int) -> int:
    """Bytes of what the inputs of an unquantised layer become, aligned."""
    stages = -(-in_features // _DENSE_STAGE_FEATURES)
    return _aligned(rows * stages * _DENSE_STAGE_FEATURES * 4)


def dense_scale_bytes(rows: int, in_features: int) -> int:
    """Bytes of the scales of `rows` rows of an unquantised layer, aligned."""
    return _aligned(rows * dense_parts(in_features) * 4)


def linear_scratch_bytes(rows: int, in_features: int, out_features: int) -> int:
    """Return what `linear` needs for up to `rows` rows, or pairs of a mixture."""
    held = min(rows, PASS_ROWS)
    dense = min(rows, DENSE_PASS_ROWS) if rows > DENSE_DECODE_ROWS else 0
    return max(
        code_bytes(held, in_features) + note_bytes(held, in_features),
        dense_input_bytes(dense, in_features) + dense_scale_bytes(dense, in_features),
    )


def staged_bytes(words: int, num_groups: int, columns: int) -> int:
    """Return what packing `columns` columns needs on the device beside what it writes.

    Args:
        words: 32-bit words of codes a column.
    """
    tables = num_groups * columns * (SCALE_BYTES + ZERO_BYTES) // TILE_COLUMNS
    return _aligned(words * columns * 4) + _aligned(tables)


def least_staging_bytes(in_features: int) -> int:
    """Return what packing one tile of any layer of `in_features` inputs needs at most."""
    blocks = blocks_for(in_features)
    return staged_bytes(blocks * BLOCK_ROWS * 8 // 32, blocks, TILE_COLUMNS)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
