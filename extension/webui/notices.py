"""Warnings of the engine's logger: kept for the page of a load, and in the web UI's own log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from exl_loader.utils.output import warn_once

from . import host
from .host import Patches

_logger = logging.getLogger("exl_loader")


class _Collector(logging.Handler):
    """Keeps the warnings that one thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = threading.get_ident()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.getMessage() not in self.found:
            self.found.append(record.getMessage())


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collect what the engine warns of in this thread; the list grows meanwhile."""
    collector = _Collector()
    # What a plan of the same folder has warned of before belongs to this load as well.
    warn_once.cache_clear()
    _logger.addHandler(collector)
    try:
        yield collector.found
    finally:
        _logger.removeHandler(collector)


class _HostLog(logging.Handler):
    """Writes records in the web UI's log, named as the plugin's."""

    def emit(self, record: logging.LogRecord) -> None:
        is_error = record.levelno >= logging.ERROR
        host.say(record.getMessage(), level="error" if is_error else "warning")


def write_to_host_log(patches: Patches) -> None:
    """Have the engine's warnings in the web UI's log; without a handler Python prints them."""
    handler = _HostLog(logging.WARNING)
    _logger.addHandler(handler)
    patches.later(lambda: _logger.removeHandler(handler))
    patches.set(_logger, "propagate", False)
    # The web UI lets nothing below an error through the loggers of others.
    level = _logger.level
    _logger.setLevel(logging.WARNING)
    patches.later(lambda: _logger.setLevel(level))
