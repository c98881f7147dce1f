"""What kernels and graphs take of a card: measured, and remembered for the next process.

A plan is made before kernels are loaded and steps are captured. So it counts on what these took
of the same card before, under the same driver: in this process, or in an earlier one, which has
left the figure in a file beside the compiled kernels. Where there is no figure one is assumed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from ...utils.errors import ExlLoaderError
from ...utils.json_keys import read_json_object_if_there
from ..build.store import kernel_dirs, writable_dir

MIB = 1 << 20
# All kernels of an architecture; and `model.MAX_STEPS` graphs, each in a page of the driver's.
ASSUMED_KERNEL_BYTES = 32 * MIB
ASSUMED_GRAPH_BYTES = 32 * 2 * MIB

_FILE = "taken_of_cards.json"
_MOST_FILE_BYTES = 1 << 16
_MOST_CARDS = 64
# A figure that is larger is none of ours.
_MOST_BYTES = 1 << 30


def known_taken(name: str) -> int | None:
    """Return what kernels and graphs are known to take of a card; None before any was measured.

    Args:
        name: of the card, such as `cuda:0`.
    """
    from .taken import taken_of

    taken = taken_of(name)
    if taken.graphs:
        return max(taken.most_bytes, _remembered().get(_key(name), 0))
    return _remembered().get(_key(name))


def held_taken(name: str) -> int:
    """Return what kernels and graphs of this process take of a card now."""
    from .taken import taken_of

    return taken_of(name).held_bytes


def remember_taken(name: str) -> None:
    """Keep a card's figure where it is the largest so far. A folder that is full keeps none."""
    from .taken import taken_of

    most, key = taken_of(name).most_bytes, _key(name)
    if not taken_of(name).graphs or key is None:
        return
    figures = _remembered()
    if most <= figures.pop(key, -1):
        return
    # The newest last, so that cards that are gone make room.
    figures = {**dict(list(figures.items())[1 - _MOST_CARDS :]), key: most}
    try:
        _write(writable_dir() / _FILE, json.dumps(figures))
    except (OSError, ExlLoaderError):
        return


def _key(name: str) -> str | None:
    """Name a card and its driver; None where the monitoring library does not know the card."""
    from .device import card_identity
    from .driver import driver_release

    uuid, driver = card_identity(name), driver_release()
    return None if uuid is None or driver is None else f"{uuid} {driver[0]}.{driver[1]}"


def _remembered() -> dict[str | None, int]:
    """Read the figures; none where the file is damaged."""
    try:
        for folder in kernel_dirs():
            values = read_json_object_if_there(folder / _FILE, limit=_MOST_FILE_BYTES)
            if values:
                return {
                    key: value for key, value in values.items()
                    if type(value) is int and 0 <= value <= _MOST_BYTES
                }
    except (OSError, ExlLoaderError):
        pass
    return {}


def _write(path: Path, text: str) -> None:
    """Replace a file at once: another process may be reading it."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
