"""The text of a running generation: what may be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from ..tokenizer import StreamDecoder


class StopStrings:
    """Looks for stop strings in text that arrives in pieces.

    Text that could be the beginning of a stop string is held back until that is decided, so
    that no part of one is ever shown.

    Args:
        stop_strings: texts of at least one character; perhaps none.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that may be shown now, and whether a stop string was found behind it.
        """
        text = self._held + piece
        places = [text.find(stop) for stop in self._stop_strings]
        found = [place for place in places if place >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """End the text; return what was held back for nothing."""
        text, self._held = self._held, ""
        return text

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


class TextStream:
    """Token ids in, text that may be shown out.

    Args:
        decoder: turns ids into text.
        stop_strings: what ends the text.
    """

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = StopStrings(stop_strings)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one token; return text to show, and whether a stop string was found."""
        piece = self._decoder.push(token_id)
        return self._stops.push(piece) if piece else ("", False)

    def flush(self) -> str:
        """End the stream; return what is left to show."""
        piece, found = self._stops.push(self._decoder.flush())
        return piece if found else piece + self._stops.flush()
