"""Scratch memory of attention on CUDA, in bytes; integers only, no PyTorch.

Only decoding needs any: where what a row sees is cut into splits (csrc/cuda/attention_decode.cu),
each split leaves its sums of head_dim float32, its largest score and its total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...cache.layout import PAGE_LEN, pages_for

if TYPE_CHECKING:
    from ...cache.layout import CacheType
    from ..base import AttentionShape

# Rows of a sequence that are decoding, csrc/cuda/attention.cuh; one with more is a prompt. As
# many as a draft may have: with it and without it a text is the same, bit for bit.
DECODE_ROWS = 32
# Rows of all sequences that scratch has room for at least; drafts beyond that take turns.
HELD_ROWS = 16
# Blocks that a card's multiprocessors hold at once, two each, of the largest cards. Not the
# card's own number: a row's result should not depend on the card more than it must.
_BLOCKS = 264
_LEAST_SPLITS = 8
_MOST_SPLITS = 64
# A window of w tokens touches one split more than w tokens from a split's beginning, and rows
# of one sequence begin at places apart.
_WINDOW_SPLITS = 2
_FLOAT_BYTES = 4


def most_splits(num_kv_heads: int) -> int:
    """Return into how many splits what a row sees is cut at most, a window's edge not counted.

    A function of the shape alone: the order of sums must not depend on the batch.
    """
    return min(max(_BLOCKS // num_kv_heads, _LEAST_SPLITS), _MOST_SPLITS)


def slots(num_kv_heads: int, window: int, max_pages: int) -> int:
    """Return the splits that a launch has room for, with page tables of `max_pages` pages."""
    most = most_splits(num_kv_heads) + (_WINDOW_SPLITS if window else 0)
    return min(most, max_pages)


def row_bytes(shape: AttentionShape, max_pages: int) -> int:
    """Return what the splits of one row leave behind, all its heads together."""
    count = slots(shape.num_kv_heads, shape.window, max_pages)
    return count * shape.num_heads * (shape.head_dim + 2) * _FLOAT_BYTES if count > 1 else 0


def write_cache_scratch_bytes(rows: int, shape: AttentionShape, cache_type: CacheType) -> int:
    """Return what `write_cache` needs: a head fits into shared memory."""
    return 0


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `attention` needs.

    There is room for a row of each of max_batch_size sequences, and for HELD_ROWS; where drafts
    have more, they take turns.

    Args:
        rows: rows of a call, of all its sequences together.
        max_batch_size: sequences of a call.
        ctx_size: tokens of the longest sequence.
        shape: its window may be 0 for layers that have one: the need is the larger of both.
    """
    held = min(rows, max(max_batch_size, HELD_ROWS))
    # A layer with a window needs up to two slots more than one without.
    most = min(most_splits(shape.num_kv_heads) + _WINDOW_SPLITS, pages_for(ctx_size))
    if most < 2:
        return 0
    return held * most * shape.num_heads * (shape.head_dim + 2) * _FLOAT_BYTES


assert PAGE_LEN == 256, "splits are whole pages, see attention_decode.cu"
