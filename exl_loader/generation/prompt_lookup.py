"""Guesses how a text goes on from where it said the same before (prompt lookup decoding)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# The longest match says most; two tokens are the fewest that make a guess worth its rows.
_NGRAM_SIZES = (4, 3, 2)


def look_up(history: npt.NDArray[np.int64], count: int) -> list[int]:
    """Return `count` ids, as they followed the last place with the text's last ids; or none.

    Args:
        history: int64 [tokens so far].
        count: 0 for none.
    """
    if count <= 0:
        return []
    for size in _NGRAM_SIZES:
        starts = len(history) - size
        if starts < 1:
            continue
        same = history[:starts] == history[-size]
        for i in range(1, size):
            same &= history[i : i + starts] == history[i - size]
        places = np.flatnonzero(same)
        if len(places):
            first = int(places[-1]) + size
            # What follows may end before `count`: such a text repeats itself, so on it goes.
            return np.resize(history[first:], count).tolist()
    return []
