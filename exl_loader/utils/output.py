"""Text for people: log lines and terminals, which untrusted text must not drive.

Models, templates and files can hold escape sequences that move the cursor, change the window's
title, or put text into the clipboard. So every control character but tab and line feed is written
as Python would write it (`\\x1b`). Pipes and files get the text as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TextIO

from .errors import printable

_log = logging.getLogger("exl_loader")

# `printable` leaves these, which belong to a text's lines.
_LINE_CONTROLS = re.compile("[\v\f\r]")


def for_terminal(text: str) -> str:
    """Escape the control characters of a text that is written to a terminal.

    A carriage return before a line feed is left out, because it belongs to the line's end.
    """
    shown = _LINE_CONTROLS.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))
    return printable(shown)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right.

    Args:
        rows: cells, as many in each row; headings first if there are any.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (row[0].ljust(widths[0]) + "".join(
            "  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )).rstrip()
        for row in rows
    ]


class TerminalWriter:
    """Writes a text piece by piece, each at once.

    Args:
        stream: the target. The text is escaped only where it is a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        # A carriage return at a piece's end: the next piece may begin with the line feed.
        self._held = ""

    def write(self, piece: str) -> None:
        """Write a piece."""
        if self._is_terminal:
            text = self._held + piece
            self._held = "\r" if text.endswith("\r") else ""
            piece = for_terminal(text.removesuffix("\r"))
        self._stream.write(piece)
        self._stream.flush()

    def end(self) -> None:
        """Write what was held back."""
        held, self._held = self._held, ""
        self._stream.write(for_terminal(held))
        self._stream.flush()


class TerminalFormatter(logging.Formatter):
    """Formats log lines for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def warn(message: str) -> None:
    """Log a warning through the logger `exl_loader`.

    Args:
        message: one line. It may quote untrusted files and their names, so it is escaped.
    """
    _log.warning("%s", printable(message))


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, but only the first time in a process.

    A plan is made again with every move of a slider; its warnings stay the same.
    """
    warn(message)
