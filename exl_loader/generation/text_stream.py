"""The text of a running generation: what may be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..text.tokenizer import StreamDecoder


class StopStrings:
    """Finds stop strings in text that arrives in pieces.

    Special tokens that are not shown are text here as well, so that a stop string with a control
    token in it ends the generation whether or not such tokens are shown. The text that is shown
    is searched on its own, too: no stop string ever appears in it. Text that could be the
    beginning of a stop string is held back until that is decided.

    Args:
        stop_strings: texts of at least one character; perhaps none.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        # The undecided end of the text with hidden tokens, and which of its characters are shown.
        self._text = ""
        self._is_shown: list[bool] = []

    def push(self, piece: str, hidden: str = "") -> tuple[str, bool]:
        """Take more text.

        Args:
            piece: text to show.
            hidden: text of a special token in front of it that is not shown.

        Returns:
            The text that may be shown now, and whether a stop string was found behind it.
        """
        if not self._stop_strings:
            return piece, False
        self._text += hidden + piece
        self._is_shown += [False] * len(hidden) + [True] * len(piece)
        places = [self._shown_until(place) for place in _places(self._text, self._stop_strings)]
        shown = self._shown()
        places += _places(shown, self._stop_strings)
        if places:
            self._forget(len(self._text))
            return shown[: min(places)], True
        keep_from = len(self._text) - self._undecided(self._text)
        certain = min(self._shown_until(keep_from), len(shown) - self._undecided(shown))
        # The hidden characters in front of what is kept may begin a stop string with it.
        while keep_from > 0 and self._shown_until(keep_from) > certain:
            keep_from -= 1
        self._forget(keep_from)
        return shown[:certain], False

    def flush(self) -> str:
        """End the text; return what was held back for nothing."""
        text = self._shown()
        self._forget(len(self._text))
        return text

    def _shown(self) -> str:
        return "".join(self._visible(self._text, self._is_shown))

    @staticmethod
    def _visible(text: str, is_shown: Sequence[bool]) -> Iterator[str]:
        return (character for character, shown in zip(text, is_shown, strict=True) if shown)

    def _shown_until(self, end: int) -> int:
        """Count the shown characters before a place of the text."""
        return sum(self._is_shown[:end])

    def _forget(self, end: int) -> None:
        self._text = self._text[end:]
        del self._is_shown[:end]

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


def _places(text: str, stop_strings: Sequence[str]) -> list[int]:
    """Return where each stop string that the text holds begins first."""
    return [place for place in map(text.find, stop_strings) if place >= 0]


class TextStream:
    """Token ids in, text that may be shown out.

    Args:
        decoder: turns ids into text.
        stop_strings: what ends the text.
    """

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = decoder
        spelled = [decoder.spellings(stop) for stop in stop_strings]
        self._stops = StopStrings(tuple(set().union(*spelled)))

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one token; return text to show, and whether a stop string was found."""
        hidden = self._decoder.hidden_text(token_id)
        piece = self._decoder.push(token_id)
        return self._stops.push(piece, hidden) if piece or hidden else ("", False)

    def flush(self) -> str:
        """End the stream; return what is left to show."""
        piece, found = self._stops.push(self._decoder.flush())
        return piece if found else piece + self._stops.flush()
