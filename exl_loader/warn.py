"""Warnings about a model folder: once each, through the logger `exl_loader`."""

from __future__ import annotations

import logging
from functools import lru_cache

_log = logging.getLogger("exl_loader")


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning the first time that a process has it.

    A plan is made anew with every move of a slider; what it warns about stays the same.
    """
    _log.warning("%s", message)
