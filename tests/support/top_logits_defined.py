"""The definition of the operation `top_logits` in numpy, and rows that have top logits."""

from __future__ import annotations

import numpy as np

from exl_loader.backends.top_logits import HEADER_WORDS, MOST_TAKEN, RESULT_WORDS
from exl_loader.generation.forward_model import LogitsRow, TopLogits
from exl_loader.model.top_logits_reader import read_result

BINS_PER_UNIT, NUM_BINS = np.float32(64), 2048


def defined_top_ids(row, most=MOST_TAKEN):
    """Return the ids that the operation takes of a finite row, and the others' sum of weights.

    It sorts logits into bins of 1/64, the first at the largest logit, and takes as many bins as
    hold `most` logits or fewer. The ids are sorted by falling logits, equal ones by rising id.
    """
    distance = (row.max() - row) * BINS_PER_UNIT
    bins = np.minimum(distance, NUM_BINS).astype(np.int64)
    reached = np.cumsum(np.bincount(bins, minlength=NUM_BINS + 1)[:NUM_BINS])
    num_bins = int(np.searchsorted(reached, most, side="right"))
    taken = np.flatnonzero(bins < num_bins)
    others = row[bins >= num_bins].astype(np.float64) - float(row.max())
    return taken[np.lexsort((taken, -row[taken]))], float(np.exp(others).sum())


def defined_top_logits(row, most=MOST_TAKEN, error=0.0) -> TopLogits | None:
    """Return the top logits of a finite row, with a relative `error` in the others' sum."""
    ids, weight_sum = defined_top_ids(row, most)
    words = np.zeros(RESULT_WORDS, np.int32)
    words[:2] = 1, len(ids)
    words[2:HEADER_WORDS].view(np.float32)[:] = row.max(), weight_sum * (1 + error)
    words[HEADER_WORDS : HEADER_WORDS + len(ids)] = ids
    words[HEADER_WORDS + MOST_TAKEN :].view(np.float32)[: len(ids)] = row[ids]
    return read_result(words, len(row))


class CountedRow(LogitsRow):
    """A row that counts how often its values are copied, in `copies`."""

    def __init__(self, values, top_logits):
        self.copies = 0
        super().__init__(lambda: self._count(values), top_logits)

    def _count(self, values):
        self.copies += 1
        return values
