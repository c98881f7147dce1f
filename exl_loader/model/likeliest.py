"""The likeliest tokens of rows of logits, as a device hands them over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..backends.cuda.top_logits import HEADER_WORDS, MOST_TAKEN
from ..generation.sampling.candidates import Candidates
from ..generation.sampling.rest import Rest

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from ..backends.host import Host


class LikeliestTokens:
    """Reads what the operation `top_logits` leaves on a device.

    Args:
        host: how to get at it.
        results: int32 [most rows, RESULT_WORDS], laid out as csrc/cuda/sampling.cu says.
    """

    def __init__(self, host: Host, results: torch.Tensor):
        self._host, self._results = host, results
        self._mirror = host.mirror(results)

    def read(self, rows: int, vocab_size: int) -> list[Candidates | None]:
        """Wait for the operation and bring its results over.

        Args:
            rows: how many it had.
            vocab_size: tokens of a row that counted.

        Returns:
            Of each row the likeliest tokens, with a rest; None where they say too little.
        """
        mirror = self._mirror[:rows]
        self._host.collect(self._results[:rows], mirror)
        return [read_result(words, vocab_size) for words in mirror.numpy()]


def read_result(words: npt.NDArray[np.int32], vocab_size: int) -> Candidates | None:
    """Turn a row's result, int32 [RESULT_WORDS], into candidates with a rest.

    Returns:
        Candidates with memory of their own; None for logits that are not finite, where none
        stands out, and where all of a small vocabulary would be known.
    """
    finite, taken = words[:2].tolist()
    if not finite or not 0 < taken < vocab_size:
        return None
    largest, weight_sum = words[2:HEADER_WORDS].view(np.float32).tolist()
    ids = words[HEADER_WORDS : HEADER_WORDS + taken].astype(np.int64)
    first = HEADER_WORDS + MOST_TAKEN
    logits = words[first : first + taken].view(np.float32).copy()
    rest = Rest.of_sum(vocab_size - taken, logits[-1], largest, weight_sum)
    return Candidates(ids, logits, vocab_size, is_sorted=True, rest=rest)
