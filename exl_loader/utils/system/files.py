"""Files: owners and modes, reading at an offset, and renaming what another program has open."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

# Pauses between attempts to rename a folder on Windows, while a virus scanner reads a file in it.
_SCANNER_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)

# Held while a file's position is set and read from, where reads at an offset need both.
_positioning = threading.Lock()


def has_owners() -> bool:
    """Return whether files have an owner and modes that decide who may write them (POSIX)."""
    return sys.platform != "win32"


def has_access_lists() -> bool:
    """Return whether access control lists can be read as extended attributes (Linux)."""
    return sys.platform == "linux"


def read_at(file: BinaryIO, offset: int, target: memoryview) -> int:
    """Read bytes at an offset. Several threads may read one file at once.

    Args:
        file: opened unbuffered.
        offset: of the first byte.
        target: is filled.

    Returns:
        The bytes read: fewer than `target` has only where the file ends.

    Raises:
        OSError: the system refuses.
    """
    done = 0
    while done < len(target):
        count = _read_once(file, offset + done, target[done:])
        if not count:
            break
        done += count
    return done


def _read_once(file: BinaryIO, offset: int, target: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [target], offset)
    # Windows and some builds of Python for macOS have no such call. Threads take turns.
    with _positioning:
        file.seek(offset)
        count: int | None = file.readinto(target)  # type: ignore[attr-defined]
    return count or 0


def rename_folder(folder: Path, target: Path) -> None:
    """Rename a folder; on Windows try again for a while, because a scanner may read files in it.

    Raises:
        OSError: the system refuses.
    """
    for pause_s in _SCANNER_PAUSES_S if sys.platform == "win32" else ():
        try:
            folder.rename(target)
            return
        except PermissionError:
            time.sleep(pause_s)
    folder.rename(target)
