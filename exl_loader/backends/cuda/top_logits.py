"""The largest logits of each row, found on the card: the call and its sizes.

A sampler mostly needs the largest logits and the sum of all others. That is 8 KiB a row instead
of up to a MiB (csrc/cuda/sampling.cu). The sizes need no PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...utils.integers import ceil_div, round_up
from ..top_logits import MOST_TAKEN, NUM_BINS, RESULT_WORDS
from .launcher import COUNTER_BYTES, KernelOps, pointer

if TYPE_CHECKING:
    import torch

# Constants of csrc/cuda/sampling.cu.
_THREADS = 512
_WARPS = _THREADS // 32
_TILE_LOGITS = 8 * _THREADS
_FIXED_WORDS = 2 * MOST_TAKEN + NUM_BINS + 4
_WORD_BYTES, _KEY_BYTES = 4, 8

# Most blocks that share a row. A card has as many multiprocessors, or twice as many, and the last
# block to arrive has few other blocks' sums to add.
_MAX_BLOCKS = 64


def _blocks_for(vocab_size: int) -> int:
    """Return the blocks that share a row."""
    return min(ceil_div(vocab_size, _TILE_LOGITS), _MAX_BLOCKS)


def top_logits_scratch_bytes(rows: int, vocab_size: int) -> int:
    """Return what `top_logits` needs for up to `rows` rows, counters included."""
    row_words = _FIXED_WORDS + round_up(2 * _blocks_for(vocab_size), 4)
    return COUNTER_BYTES + _WORD_BYTES * rows * row_words


class TopLogitsOps(KernelOps):
    """The operation `top_logits`."""

    def top_logits(self, logits: torch.Tensor, vocab_size: int, out: torch.Tensor,
                   scratch: torch.Tensor) -> None:
        rows = logits.shape[0]
        assert 0 < vocab_size <= logits.shape[1] and out.shape == (rows, RESULT_WORDS)
        if rows == 0:
            return
        assert scratch.nbytes >= top_logits_scratch_bytes(rows, vocab_size)
        grid = (_blocks_for(vocab_size), rows, 1)
        args = (
            pointer(logits), ctypes.c_int64(logits.shape[1]), ctypes.c_int32(vocab_size),
            pointer(scratch[COUNTER_BYTES:]),
        )
        self._launch("survey_logits_kernel", grid, _THREADS, _WARPS * _WORD_BYTES, *args)
        self._launch("count_logits_kernel", grid, _THREADS, NUM_BINS * _WORD_BYTES, *args)
        self._launch("take_logits_kernel", grid, _THREADS, MOST_TAKEN * _KEY_BYTES, *args,
                     pointer(out))
