"""The text of a running generation: which part of it may be shown, and where it ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from ..text.tokenizer import StreamDecoder


class StopStrings:
    """Finds stop strings in text that arrives in pieces.

    Two texts are searched. One includes special tokens that are not shown, so that a stop string
    with a control token ends the generation whether or not such tokens are shown. The other is
    the shown text, so that no stop string ever appears in it. Text that may be the beginning of
    a stop string is held back until that is decided.

    Args:
        stop_strings: texts of at least one character; may be empty.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        # The undecided end of the text with hidden tokens, and a flag per character: shown.
        self._text = ""
        self._is_shown: list[bool] = []

    def copy(self) -> StopStrings:
        """Return an object that continues from here on its own."""
        other = copy.copy(self)
        other._is_shown = self._is_shown.copy()
        return other

    @property
    def num_held(self) -> int:
        """Number of characters to show that are held back."""
        return sum(self._is_shown)

    def push(self, piece: str, hidden: str = "") -> tuple[str, bool]:
        """Add a piece of text.

        Args:
            piece: text to show.
            hidden: text of a special token before the piece that is not shown.

        Returns:
            The text that may be shown now, and whether a stop string was found after it.
        """
        if not self._stop_strings:
            return piece, False
        self._text += hidden + piece
        self._is_shown += [False] * len(hidden) + [True] * len(piece)
        starts = [self._shown_until(start) for start in _starts(self._text, self._stop_strings)]
        shown = self._shown()
        starts += _starts(shown, self._stop_strings)
        if starts:
            self._drop(len(self._text))
            return shown[: min(starts)], True
        keep_from = len(self._text) - self._undecided(self._text)
        certain = min(self._shown_until(keep_from), len(shown) - self._undecided(shown))
        # Hidden characters directly before the kept text may begin a stop string with it.
        while keep_from > 0 and self._shown_until(keep_from) > certain:
            keep_from -= 1
        self._drop(keep_from)
        return shown[:certain], False

    def flush(self) -> str:
        """End the text; return the text that was held back."""
        text = self._shown()
        self._drop(len(self._text))
        return text

    def _shown(self) -> str:
        return "".join(self._visible(self._text, self._is_shown))

    @staticmethod
    def _visible(text: str, is_shown: Sequence[bool]) -> Iterator[str]:
        return (character for character, shown in zip(text, is_shown, strict=True) if shown)

    def _shown_until(self, end: int) -> int:
        """Return the number of shown characters among the first `end` ones."""
        return sum(self._is_shown[:end])

    def _drop(self, end: int) -> None:
        self._text = self._text[end:]
        del self._is_shown[:end]

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


def _starts(text: str, stop_strings: Sequence[str]) -> list[int]:
    """Return the first index of each stop string that the text contains."""
    return [start for start in map(text.find, stop_strings) if start >= 0]


def spellings(decoder: StreamDecoder, texts: Sequence[str]) -> tuple[str, ...]:
    """Return all spellings of texts that the decoder may write."""
    return tuple(set().union(*map(decoder.spellings, texts)))


class TextStream:
    """Turns token ids into text that may be shown.

    Args:
        decoder: turns ids into text.
        stop_strings: texts that end the generation.
    """

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = StopStrings(spellings(decoder, stop_strings))

    def copy(self) -> TextStream:
        """Return a stream that continues from here on its own."""
        other = copy.copy(self)
        other._decoder = self._decoder.copy()
        other._stops = self._stops.copy()
        return other

    @property
    def num_held(self) -> int:
        """Number of characters to show that have begun and were not returned."""
        return self._decoder.num_held + self._stops.num_held

    def push(self, token_id: int) -> tuple[str, bool]:
        """Add one token; return text to show, and whether a stop string was found."""
        hidden = self._decoder.hidden_text(token_id)
        piece = self._decoder.push(token_id)
        return self._stops.push(piece, hidden) if piece or hidden else ("", False)

    def flush(self) -> str:
        """End the stream; return the remaining text to show."""
        piece, found = self._stops.push(self._decoder.flush())
        return piece if found else piece + self._stops.flush()
