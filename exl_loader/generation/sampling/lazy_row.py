"""Rows of logits that are on a device, and of which little is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .candidates import Candidates
from .values import Floats


class LazyRow:
    """A row of logits that comes over when somebody looks at it: `np.asarray(row)`.

    Args:
        fetch: brings the row, float32 [vocab_size]; called once at most.
        likeliest: its likeliest tokens, with a rest; None where only the row will do.
    """

    def __init__(self, fetch: Callable[[], Floats], likeliest: Candidates | None) -> None:
        self.likeliest = likeliest
        self._fetch = fetch
        self._row: Floats | None = None

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Any:
        if self._row is None:
            self._row = self._fetch()
        if copy:
            return np.array(self._row, dtype)
        return np.asarray(self._row, dtype)


def argmax(row: npt.ArrayLike, vocab_size: int) -> int:
    """Return the id below `vocab_size` with the largest logit, of equal ones the lowest.

    Args:
        row: float32 [at least vocab_size], or a `LazyRow`.
    """
    likeliest = getattr(row, "likeliest", None)
    if likeliest is not None:
        ids = likeliest.ids[likeliest.ids < vocab_size]
        if len(ids):
            return int(ids[0])
    return int(np.asarray(row)[:vocab_size].argmax())
