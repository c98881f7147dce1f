"""Files: owners and modes, and renaming what another program has open."""

from __future__ import annotations

import sys
import time
from pathlib import Path

# Pauses between attempts to rename a folder on Windows, while a virus scanner reads a file in it.
_SCANNER_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)


def has_owners() -> bool:
    """Return whether files have an owner and modes that decide who may write them (POSIX)."""
    return sys.platform != "win32"


def has_access_lists() -> bool:
    """Return whether access control lists can be read as extended attributes (Linux)."""
    return sys.platform == "linux"


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
