"""The result of the operation `top_logits`: the largest logits of a row and the rest's weight.

A sampler mostly needs the largest logits and the sum of all others. A row's result is int32
[RESULT_WORDS]:

    [0] 1 where all logits are finite, else 0; the rest is undefined then
    [1] number of logits taken, at most MOST_TAKEN
    [2] float32, the largest logit
    [3] float32, the sum of exp(logit - largest) of all logits that were not taken
    ids of the taken logits from HEADER_WORDS on, falling logits, equal ones by rising id
    float32 logits from HEADER_WORDS + MOST_TAKEN on

Logits are taken by bins of 1/BINS_PER_UNIT below the largest: as many whole bins as hold up to
MOST_TAKEN logits. Constants of csrc/cuda/sampling.cu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HEADER_WORDS = 4
MOST_TAKEN = 1024
RESULT_WORDS = HEADER_WORDS + 2 * MOST_TAKEN
BINS_PER_UNIT = 64
NUM_BINS = 2048


def take_largest(
    row: npt.NDArray[np.float32], most: int = MOST_TAKEN
) -> tuple[npt.NDArray[np.int64], float]:
    """Define which ids are taken of a row, and the others' sum of weights.

    Args:
        row: float32 [n], finite.
        most: ids that may be taken.
    """
    import numpy as np

    distance = (row.max() - row) * np.float32(BINS_PER_UNIT)
    bins = np.minimum(distance, NUM_BINS).astype(np.int64)
    reached = np.cumsum(np.bincount(bins, minlength=NUM_BINS + 1)[:NUM_BINS])
    num_bins = int(np.searchsorted(reached, most, side="right"))
    taken = np.flatnonzero(bins < num_bins)
    others = row[bins >= num_bins].astype(np.float64) - float(row.max())
    return taken[np.lexsort((taken, -row[taken]))], float(np.exp(others).sum())


def write_result(row: npt.NDArray[np.float32], words: npt.NDArray[np.int32]) -> None:
    """Write the result of a row, float32 [n], to int32 [RESULT_WORDS]."""
    import numpy as np

    words[0] = np.isfinite(row).all()
    if not words[0]:
        return
    ids, weight_sum = take_largest(row)
    words[1] = len(ids)
    words[2:HEADER_WORDS].view(np.float32)[:] = row.max(), weight_sum
    words[HEADER_WORDS : HEADER_WORDS + len(ids)] = ids
    words[HEADER_WORDS + MOST_TAKEN :].view(np.float32)[: len(ids)] = row[ids]
