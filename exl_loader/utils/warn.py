"""Warnings, through the logger `exl_loader`."""

from __future__ import annotations

import logging
from functools import lru_cache

from .errors import printable

_log = logging.getLogger("exl_loader")


def warn(message: str) -> None:
    """Log a warning.

    Args:
        message: one line. It may quote untrusted files and names of files, so what a terminal
            would obey, and what no stream can encode, is escaped.
    """
    _log.warning("%s", printable(message))


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning the first time that a process has it.

    A plan is made anew with every move of a slider; what it warns about stays the same.
    """
    warn(message)
