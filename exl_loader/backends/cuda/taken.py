"""The memory that kernels and graphs take of a card: measured, and remembered between processes.

Neither is in a buffer of ours, and the driver does not report the size of either. So the card's
free memory is read before and after loading a module and instantiating a graph.

A plan is made before kernels are loaded and steps are captured. It uses the figure of the same
card with the same driver from before: of this process, or of an earlier one, which left it in a
file beside the compiled kernels. Without a figure the plan assumes one.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...utils.byte_counts import GIB, MIB
from ...utils.errors import ExlLoaderError
from ...utils.json_keys import read_json_object_if_there
from ..build.store import kernel_dirs, writable_dir
from .cards import card_identity
from .driver import Context, driver_release

# All kernels of an architecture; and `forward.MAX_STEPS` graphs, each in a page of the driver's.
ASSUMED_KERNEL_BYTES = 32 * MIB
ASSUMED_GRAPH_BYTES = 32 * 2 * MIB

# A single graph or module takes less. A larger difference is what another thread or process
# took at the same moment.
_MOST_MEASURED_BYTES = 64 * MIB

_FILE = "taken_of_cards.json"
_MOST_FILE_BYTES = 1 << 16
_MOST_CARDS = 64
# A larger figure in the file was not written by us.
_MOST_REMEMBERED_BYTES = GIB


@dataclass
class Taken:
    """Bytes of a card that kernels and graphs of this process take.

    Args:
        held_bytes: now.
        most_bytes: the most at any time.
        graphs: number of graphs that were measured.
    """

    held_bytes: int = 0
    most_bytes: int = 0
    graphs: int = 0

    def add(self, nbytes: int) -> None:
        """Count bytes that were taken, or freed where negative."""
        self.held_bytes += nbytes
        self.most_bytes = max(self.most_bytes, self.held_bytes)


_taken: dict[str, Taken] = {}


def taken_of(card: str) -> Taken:
    """Return the count of a card, such as `cuda:0`."""
    return _taken.setdefault(card, Taken())


class Measured:
    """`nbytes`: the decrease of the card's free memory."""

    nbytes = 0


@contextmanager
def measured(context: Context, card: str) -> Iterator[Measured]:
    """Measure what a `with` block takes of a card, and count it if the block succeeds.

    Args:
        context: of the card, and current.
        card: such as `cuda:0`.
    """
    result, before = Measured(), _free_bytes(context)
    yield result
    difference = before - _free_bytes(context)
    result.nbytes = difference if 0 < difference <= _MOST_MEASURED_BYTES else 0
    taken_of(card).add(result.nbytes)


def _free_bytes(context: Context) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    context.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def known_taken(name: str) -> int | None:
    """Return the most that kernels and graphs took of a card so far; None if never measured.

    Args:
        name: such as `cuda:0`.
    """
    taken = taken_of(name)
    if taken.graphs:
        return max(taken.most_bytes, _remembered().get(_key(name), 0))
    return _remembered().get(_key(name))


def held_taken(name: str) -> int:
    """Return the bytes of a card that kernels and graphs of this process take now."""
    return taken_of(name).held_bytes


def remember_taken(name: str) -> None:
    """Write a card's figure to the file if it is the largest so far. A full disk is ignored."""
    most, key = taken_of(name).most_bytes, _key(name)
    if not taken_of(name).graphs or key is None:
        return
    figures = _remembered()
    if most <= figures.pop(key, -1):
        return
    # The newest last, because the first are dropped when there are too many.
    figures = {**dict(list(figures.items())[1 - _MOST_CARDS :]), key: most}
    try:
        _write(writable_dir() / _FILE, json.dumps(figures))
    except (OSError, ExlLoaderError):
        return


def _key(name: str) -> str | None:
    """Name a card and its driver; None if the monitoring library does not know the card."""
    uuid, driver = card_identity(name), driver_release()
    return None if uuid is None or driver is None else f"{uuid} {driver[0]}.{driver[1]}"


def _remembered() -> dict[str | None, int]:
    """Read the figures of all cards; none if the file is damaged."""
    try:
        for folder in kernel_dirs():
            values = read_json_object_if_there(folder / _FILE, limit=_MOST_FILE_BYTES)
            if values:
                return {
                    key: value for key, value in values.items()
                    if type(value) is int and 0 <= value <= _MOST_REMEMBERED_BYTES
                }
    except (OSError, ExlLoaderError):
        pass
    return {}


def _write(path: Path, text: str) -> None:
    """Replace a file atomically, because another process may be reading it."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
