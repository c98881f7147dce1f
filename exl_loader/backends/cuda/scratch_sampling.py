"""Sizes of `top_logits` on CUDA; integers only, no PyTorch.

Constants of csrc/cuda/sampling.cu, which says what stands where.
"""

from __future__ import annotations

WORD_BYTES = 4

# Of a row's result: a header, the ids of the largest logits, the logits.
HEADER_WORDS = 4
MOST_TAKEN = 1024
RESULT_WORDS = HEADER_WORDS + 2 * MOST_TAKEN

# Logits of a row that a block reads at a time, and most blocks that share a row: with as many
# as a card has multiprocessors, or half, the last to arrive has few others' sums to add.
TILE_LOGITS = 4096
MAX_BLOCKS = 64

_BINS = 2048
_FIXED_WORDS = 2 * MOST_TAKEN + _BINS + 4


def blocks_for(vocab_size: int) -> int:
    """Return how many blocks share a row."""
    return min(-(-vocab_size // TILE_LOGITS), MAX_BLOCKS)


def top_logits_scratch_bytes(rows: int, vocab_size: int) -> int:
    """Return what `top_logits` needs for up to `rows` rows."""
    row_words = _FIXED_WORDS + -(-2 * blocks_for(vocab_size) // 4) * 4
    return WORD_BYTES * rows * row_words
