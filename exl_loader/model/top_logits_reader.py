"""Reads the top logits that a device has computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..backends.top_logits import HEADER_WORDS, MOST_TAKEN
from ..generation.forward_model import TopLogits

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from ..backends.cpu_access import CpuAccess


class TopLogitsReader:
    """Reads the results of the operation `top_logits`.

    Args:
        cpu: CPU access to the device's tensors.
        results: int32 [most rows, RESULT_WORDS], in the layout of `backends/top_logits.py`.
    """

    def __init__(self, cpu: CpuAccess, results: torch.Tensor):
        self._cpu, self._results = cpu, results
        self._mirror = cpu.mirror(results)

    def read(self, rows: int, vocab_size: int) -> list[TopLogits | None]:
        """Wait for the operation and copy its results to the CPU.

        Args:
            rows: number of rows it has processed.
            vocab_size: number of tokens of a row that it has considered.

        Returns:
            The top logits of each row; None for rows that have none.
        """
        mirror = self._mirror[:rows]
        self._cpu.collect(self._results[:rows], mirror)
        return [read_result(words, vocab_size) for words in mirror.numpy()]


def read_result(words: npt.NDArray[np.int32], vocab_size: int) -> TopLogits | None:
    """Decode a row's result, int32 [RESULT_WORDS].

    Returns:
        The top logits, in memory of their own. None if a logit is not finite, if too many are
        equal to the largest, or if all of a small vocabulary were taken.
    """
    finite, taken = words[:2].tolist()
    if not finite or not 0 < taken < vocab_size:
        return None
    _, weight_sum = words[2:HEADER_WORDS].view(np.float32).tolist()
    ids = words[HEADER_WORDS : HEADER_WORDS + taken].astype(np.int64)
    first = HEADER_WORDS + MOST_TAKEN
    logits = words[first : first + taken].view(np.float32).copy()
    return TopLogits(ids, logits, vocab_size, weight_sum)
