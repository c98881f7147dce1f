"""The largest logits of rows, as launches of compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from .ops_rows import Launch, nothing, pointer
from .scratch import COUNTER_BYTES
from .scratch_sampling import (
    MOST_TAKEN,
    RESULT_WORDS,
    blocks_for,
    top_logits_scratch_bytes,
)

if TYPE_CHECKING:
    import torch

    from .launcher import Launcher

# Constants of csrc/cuda/sampling.cu.
_THREADS = 512
_WARPS = _THREADS // 32
_BINS = 2048
_WORD_BYTES, _KEY_BYTES = 4, 8


class SamplingOps:
    """What samplers want of logits before these leave the device.

    Args:
        launcher: runs kernels.
    """

    def __init__(self, launcher: Launcher):
        self.launcher = launcher

    def prepare_top_logits(self, logits: torch.Tensor, vocab_size: int, out: torch.Tensor,
                           scratch: torch.Tensor) -> Launch:
        """Take up to 1024 of each row's largest logits, and the sum of all others.

        Equal logits are taken together or not at all. A row's result depends on that row alone,
        bit for bit.

        Args:
            logits: float32 [T, at least vocab_size]; columns from vocab_size on do not count.
            out: int32 [T, RESULT_WORDS], as csrc/cuda/sampling.cu says.
        """
        rows = logits.shape[0]
        assert 0 < vocab_size <= logits.shape[1] and out.shape == (rows, RESULT_WORDS)
        if rows == 0:
            return nothing
        work = scratch[COUNTER_BYTES:]
        assert work.nbytes >= top_logits_scratch_bytes(rows, vocab_size)
        grid = (blocks_for(vocab_size), rows, 1)
        read = (pointer(logits), ctypes.c_int64(logits.shape[1]), ctypes.c_int32(vocab_size),
                pointer(work))
        prepare = self.launcher.prepare
        survey = prepare("survey_logits_kernel", grid, _THREADS, _WARPS * _WORD_BYTES, *read)
        count = prepare("count_logits_kernel", grid, _THREADS, _BINS * _WORD_BYTES, *read)
        take = prepare("take_logits_kernel", grid, _THREADS, MOST_TAKEN * _KEY_BYTES, *read,
                       pointer(out))

        def launch() -> None:
            survey()
            count()
            take()

        return launch
