"""Finds texts whose last tokens only repeat a pattern, as small models write them without end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Looking costs a pass over the window, so it is done once for so many tokens.
STRIDE = 16


def is_loop(ids: npt.NDArray[np.int64], window: int) -> bool:
    """Return whether the last tokens of an answer repeat a pattern at least twice.

    The result depends on the tokens alone, so nothing has to be restored when tokens are taken
    back. An answer is looked at when it has `window` tokens and after each `STRIDE` more.

    Args:
        ids: the answer so far, int64 [tokens].
        window: number of last tokens that the pattern has to fill; 0 or 1 never finds one.
    """
    if window < 2 or len(ids) < window or (len(ids) - window) % STRIDE:
        return False
    return shortest_period(ids[-window:].tolist()) <= window // 2


def shortest_period(ids: Sequence[int]) -> int:
    """Return the least number by which a text can be shifted so that it agrees with itself.

    It is the length of the text where no shorter one does.
    """
    # The prefix function of Knuth, Morris and Pratt: of each beginning of the text, the length of
    # its longest proper beginning that is also its end.
    borders = [0] * len(ids)
    length = 0
    for index in range(1, len(ids)):
        while length and ids[index] != ids[length]:
            length = borders[length - 1]
        if ids[index] == ids[length]:
            length += 1
        borders[index] = length
    return len(ids) - (borders[-1] if borders else 0)
