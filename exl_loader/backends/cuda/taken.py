"""What kernels and graphs take of a card, by the driver's own figures.

Neither is in a buffer of ours, and the driver says of neither how large it is. So the card's
free memory is read before and after.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .context import Context

# A single graph or module takes less. A larger difference is what another thread or process
# took at the same moment.
_MOST_BYTES = 64 << 20


@dataclass
class Taken:
    """Bytes of a card.

    Args:
        held_bytes: what kernels and graphs of this process take now.
        most_bytes: the most that they took at a time.
        graphs: how many graphs were measured.
    """

    held_bytes: int = 0
    most_bytes: int = 0
    graphs: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes that were taken, or given back where negative."""
        self.held_bytes += nbytes
        self.most_bytes = max(self.most_bytes, self.held_bytes)


_taken: dict[str, Taken] = {}


def taken_of(card: str) -> Taken:
    """Return what is counted of a card, such as `cuda:0`."""
    return _taken.setdefault(card, Taken())


class Measured:
    """`nbytes`: by how much the card's free memory has gone down."""

    nbytes = 0


@contextmanager
def measured(context: Context, card: str) -> Iterator[Measured]:
    """Measure what a block of calls takes of a card, and count it where the block succeeds.

    Args:
        context: of the card, and current.
        card: its name.
    """
    result, before = Measured(), _free_bytes(context)
    yield result
    difference = before - _free_bytes(context)
    result.nbytes = difference if 0 < difference <= _MOST_BYTES else 0
    taken_of(card).add(result.nbytes)


def _free_bytes(context: Context) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    context.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value
