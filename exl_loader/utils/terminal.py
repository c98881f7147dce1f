"""Write text of models, templates and files to a terminal without letting it drive the terminal.

Escape sequences can move the cursor, change the window's title, or put text into the clipboard.
So every control character but tab and line feed is shown as Python would write it (`\\x1b`). Pipes
and files get the text as it is.
"""

from __future__ import annotations

import logging
import re
from typing import TextIO

from .errors import printable

# `printable` leaves these, which belong to a text's lines.
_LINE_CONTROLS = re.compile("[\v\f\r]")


def for_terminal(text: str) -> str:
    """Return a text as a terminal may get it: with control characters shown, not obeyed.

    A carriage return before a line feed is left out, because it belongs to the line's end.
    """
    shown = _LINE_CONTROLS.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))
    return printable(shown)


class TerminalWriter:
    """Writes a text piece by piece, at once.

    Args:
        stream: where to; only where it is a terminal is the text changed.
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
