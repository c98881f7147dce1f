"""What the operation `top_logits` means, in numpy: for its own tests and those of samplers."""

from __future__ import annotations

import numpy as np

from exl_loader.backends.cuda.top_logits import HEADER_WORDS, MOST_TAKEN, RESULT_WORDS
from exl_loader.generation.sampling import Candidates, LazyRow
from exl_loader.model.likeliest import read_result

BINS_PER_UNIT, NUM_BINS = np.float32(64), 2048


def defined_top_logits(row, most=MOST_TAKEN):
    """The ids that are taken of a finite row, float32 [n], and the others' sum of weights.

    As many bins of 1/64 below the largest logit as hold `most` or fewer; sorted by falling
    logits, equal ones by rising id.
    """
    distance = (row.max() - row) * BINS_PER_UNIT
    bins = np.minimum(distance, NUM_BINS).astype(np.int64)
    reached = np.cumsum(np.bincount(bins, minlength=NUM_BINS + 1)[:NUM_BINS])
    num_bins = int(np.searchsorted(reached, most, side="right"))
    taken = np.flatnonzero(bins < num_bins)
    others = row[bins >= num_bins].astype(np.float64) - float(row.max())
    return taken[np.lexsort((taken, -row[taken]))], float(np.exp(others).sum())


def defined_likeliest(row, most=MOST_TAKEN, error=0.0) -> Candidates | None:
    """What a card would say of a finite row, its sum wrong by the share `error`."""
    ids, weight_sum = defined_top_logits(row, most)
    words = np.zeros(RESULT_WORDS, np.int32)
    words[:2] = 1, len(ids)
    words[2:HEADER_WORDS].view(np.float32)[:] = row.max(), weight_sum * (1 + error)
    words[HEADER_WORDS : HEADER_WORDS + len(ids)] = ids
    words[HEADER_WORDS + MOST_TAKEN :].view(np.float32)[: len(ids)] = row[ids]
    return read_result(words, len(row))


class CountedRow(LazyRow):
    """A row whose `fetches` are counted."""

    def __init__(self, row, likeliest):
        self.fetches = 0
        super().__init__(lambda: self._count(row), likeliest)

    def _count(self, row):
        self.fetches += 1
        return row
