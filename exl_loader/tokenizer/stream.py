"""Decoding one token at a time, so that what is shown never has to be taken back."""

from __future__ import annotations

import codecs

from .backend import Backend

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, hence four tokens. A longer tail that still ends in a
# replacement character is damaged text, not the beginning of a character.
_MAX_HELD_TOKENS = 4


class StreamDecoder:
    """Turns token ids into text piece by piece; every `push` costs the same.

    The pieces joined are what decoding all ids at once gives, apart from bytes that are no
    UTF-8: a piece is given out as soon as its characters are complete, where decoding at
    once may give up a whole run of byte tokens for one stray byte.

    Args:
        backend: the vocabulary.
        skip_special: leave special tokens out.
    """

    def __init__(self, backend: Backend, skip_special: bool = True) -> None:
        self._backend = backend
        self._skip_ids = backend.special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        self._at_start = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Only for vocabularies whose tokens are no plain bytes: ids decoded together, of
        # which the first `_shown` stand for text that is out already.
        self._window: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, perhaps none."""
        if token_id in self._skip_ids:
            return ""
        if not self._backend.bytes_known:
            return self._push_window(token_id)
        return self._trim(self._utf8.decode(self._backend.token_bytes(token_id)))

    def flush(self) -> str:
        """End the stream; return what was held back."""
        if not self._backend.bytes_known:
            text = self._new_text()
            self._window, self._shown = [], 0
            return text
        text = self._trim(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _trim(self, text: str) -> str:
        if not (self._at_start and text):
            return text
        self._at_start = False
        return text[1:] if self._backend.strips_space and text.startswith(" ") else text

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._new_text()
        held = len(self._window) - self._shown
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        # What stood before this token stays as context of the next, and no more than that.
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def _new_text(self) -> str:
        before = self._backend.decode(self._window[: self._shown], self._skip_special)
        return self._backend.decode(self._window, self._skip_special)[len(before) :]
