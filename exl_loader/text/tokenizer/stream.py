"""Decode one token at a time; text that was returned never changes afterwards."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Iterable

from .vocabulary import SPACE_MARK, Vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, hence four tokens. If the text of more tokens still ends in a
# replacement character, it is damaged text and not the beginning of a character.
_MAX_HELD_TOKENS = 4
_BYTE_MARKS = "exl_loader.byte_marks"

# The replacements of transformers' clean_up_tokenization, in three passes. Within a pass no
# replacement creates or removes a match of another one.
_CLEAN_UPS = (
    {" .": ".", " ?": "?", " !": "!", " ,": ","},
    {" ' ": "'"},
    {" n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"},
)


def _byte_marks(error: UnicodeError) -> tuple[str, int]:
    """Decode each byte that is not UTF-8 to a replacement character."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_BYTE_MARKS, _byte_marks)


def utf8_errors(has_byte_tokens: bool) -> str:
    """Return how bytes that are not UTF-8 are decoded, as an `errors` argument of Python's codecs.

    Byte tokens: a replacement character for each byte, as in sentencepiece and the tokenizers
    library. Byte-level vocabularies: one for each broken character, as in the tokenizers library.
    """
    return _BYTE_MARKS if has_byte_tokens else "replace"


def decode_bytes(vocabulary: Vocabulary, ids: Iterable[int], skip_special: bool) -> str:
    """Decode ids of a vocabulary with `bytes_known` by joining the bytes of its tokens."""
    skip_ids = vocabulary.special_ids if skip_special else frozenset()
    data = b"".join(vocabulary.token_bytes(i) for i in ids if i not in skip_ids)
    text = data.decode("utf-8", utf8_errors(vocabulary.has_byte_tokens))
    return text[1:] if vocabulary.strips_space and text.startswith(" ") else text


def clean_up(text: str) -> str:
    """Remove spaces before punctuation, as transformers' `clean_up_tokenization` does."""
    for replacements in _CLEAN_UPS:
        for old, new in replacements.items():
            text = text.replace(old, new)
    return text


class StreamDecoder:
    """Converts token ids to text piece by piece; every `push` takes the same time.

    The joined pieces are what `Tokenizer.decode` returns for all ids at once.

    Args:
        vocabulary: tokens and the rules that find them.
        skip_special: leave special tokens out.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skip_ids = vocabulary.special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        self._at_start = True
        self._num_shown = 0
        errors = utf8_errors(vocabulary.has_byte_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        # Only for vocabularies without `bytes_known`: ids that are decoded together. The text of
        # the first `_num_returned` of them has been returned.
        self._recent_ids: list[int] = []
        self._num_returned = 0
        passes = _CLEAN_UPS if vocabulary.cleans_up else ()
        self._clean_ups = [_CleanUpPass(replacements) for replacements in passes]

    def copy(self) -> StreamDecoder:
        """Return a decoder that continues from here on its own."""
        other = copy.copy(self)
        other._utf8 = copy.copy(self._utf8)
        other._recent_ids = self._recent_ids.copy()
        other._clean_ups = [copy.copy(clean_up_pass) for clean_up_pass in self._clean_ups]
        return other

    @property
    def num_held(self) -> int:
        """Number of characters that have begun and were not returned.

        Of a character that is incomplete, one is counted.
        """
        if self._vocabulary.bytes_known:
            held = 1 if self._utf8.getstate()[0] else 0
        else:
            text = self._new_text()
            whole = text.rstrip(_REPLACEMENT)
            held = len(whole) + (whole != text)
        return held + sum(clean_up_pass.num_held for clean_up_pass in self._clean_ups)

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now final, which may be empty."""
        if token_id in self._skip_ids or not 0 <= token_id < self._vocabulary.vocab_size:
            return ""
        if not self._vocabulary.bytes_known:
            return self._cleaned(self._push_dependent(token_id))
        data = self._vocabulary.token_bytes(token_id)[self._num_shown :]
        self._num_shown = 0
        return self._cleaned(self._trim(self._utf8.decode(data)))

    def hidden_text(self, token_id: int) -> str:
        """Return the text of a token that `push` leaves out; empty for any other token."""
        return self._vocabulary.decode([token_id], False) if token_id in self._skip_ids else ""

    def spellings(self, text: str) -> set[str]:
        """Return the spellings of a text in the output of `push`: itself, and with special tokens
        as they are decoded.

        sentencepiece vocabularies decode the space mark in a token's text to a space.
        """
        if SPACE_MARK not in text:
            return {text}
        shown = text
        for token_id in self._vocabulary.special_ids:
            content = self._vocabulary.content(token_id)
            if SPACE_MARK in content and content in text:
                shown = shown.replace(content, self._vocabulary.decode([token_id], False))
        return {text, shown}

    def continue_after(self, token_id: int, num_shown: int = 0) -> None:
        """Begin after a token whose text has been returned; the next token is not the first.

        Args:
            num_shown: bytes at the start of the next token that have been returned as well;
                above 0 only in vocabularies with `bytes_known`.
        """
        self._at_start = False
        self._num_shown = num_shown
        self._recent_ids, self._num_returned = [token_id], 1

    def flush(self) -> str:
        """End the stream; return the text that was held back."""
        if not self._vocabulary.bytes_known:
            text = self._new_text()
            self._recent_ids, self._num_returned = [], 0
        else:
            text = self._trim(self._utf8.decode(b"", final=True))
            self._utf8.reset()
        for clean_up_pass in self._clean_ups:
            text = clean_up_pass.push(text) + clean_up_pass.flush()
        return text

    def _cleaned(self, text: str) -> str:
        for clean_up_pass in self._clean_ups:
            text = clean_up_pass.push(text)
        return text

    def _trim(self, text: str) -> str:
        if not (self._at_start and text):
            return text
        self._at_start = False
        return text[1:] if self._vocabulary.strips_space and text.startswith(" ") else text

    def _push_dependent(self, token_id: int) -> str:
        """Add a token whose text depends on the tokens before it."""
        self._recent_ids.append(token_id)
        text = self._new_text()
        held = len(self._recent_ids) - self._num_returned
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        # The tokens of the returned text remain as context of the next token.
        self._recent_ids = self._recent_ids[self._num_returned :]
        self._num_returned = len(self._recent_ids)
        return text

    def _new_text(self) -> str:
        returned = self._recent_ids[: self._num_returned]
        before = self._vocabulary.decode(returned, self._skip_special)
        return self._vocabulary.decode(self._recent_ids, self._skip_special)[len(before) :]


class _CleanUpPass:
    """One pass of `clean_up` over text that arrives in pieces.

    Args:
        replacements: text -> its replacement. Each text begins with a space and has no other
            space except at its end, so at most one of them matches at a position.
    """

    def __init__(self, replacements: dict[str, str]) -> None:
        self._replacements = replacements
        self._held = ""

    @property
    def num_held(self) -> int:
        return len(self._held)

    def push(self, piece: str) -> str:
        """Add text; return the part that is final, with its replacements made."""
        text, self._held = self._held + piece, ""
        parts: list[str] = []
        start = 0
        while (space := text.find(" ", start)) >= 0:
            parts.append(text[start:space])
            start = space
            old = next((old for old in self._replacements if text.startswith(old, space)), None)
            if old is not None:
                parts.append(self._replacements[old])
                start = space + len(old)
            elif any(old.startswith(text[space:]) for old in self._replacements):
                self._held = text[space:]
                return "".join(parts)
            else:
                parts.append(" ")
                start = space + 1
        return "".join([*parts, text[start:]])

    def flush(self) -> str:
        """End the text; return the part that was held back."""
        text, self._held = self._held, ""
        return text
