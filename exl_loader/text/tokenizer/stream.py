"""Decoding one token at a time, so that what is shown never has to be taken back."""

from __future__ import annotations

import codecs

from .vocabulary import SPACE_MARK, Vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, hence four tokens. A longer tail that still ends in a
# replacement character is damaged text, not the beginning of a character.
_MAX_HELD_TOKENS = 4
_BYTE_MARKS = "exl_loader.byte_marks"

# What transformers' clean_up_tokenization takes out, in three passes: within a pass no
# replacement makes or takes away another one.
_CLEAN_UPS = (
    {" .": ".", " ?": "?", " !": "!", " ,": ","},
    {" ' ": "'"},
    {" n't": "n't", " 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"},
)


def _byte_marks(error: UnicodeError) -> tuple[str, int]:
    """Write one replacement character for each byte that is no UTF-8."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_BYTE_MARKS, _byte_marks)


def utf8_errors(has_byte_tokens: bool) -> str:
    """Return how bytes that are no UTF-8 are decoded, as an `errors` argument of Python's codecs.

    Byte tokens: a mark for each byte, as sentencepiece and the tokenizers library write them.
    Byte-level vocabularies: a mark for each broken character, as the tokenizers library does.
    """
    return _BYTE_MARKS if has_byte_tokens else "replace"


def clean_up(text: str) -> str:
    """Take out spaces before punctuation, as transformers' `clean_up_tokenization` does."""
    for replacements in _CLEAN_UPS:
        for old, new in replacements.items():
            text = text.replace(old, new)
    return text


class StreamDecoder:
    """Turns token ids into text piece by piece; every `push` costs the same.

    The pieces joined are what `Tokenizer.decode` gives for all ids at once.

    Args:
        vocabulary: tokens and the rules that find them.
        skip_special: leave special tokens out.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special: bool = True) -> None:
        self._vocabulary = vocabulary
        self._skip_ids = vocabulary.special_ids if skip_special else frozenset()
        self._skip_special = skip_special
        self._at_start = True
        errors = utf8_errors(vocabulary.has_byte_tokens)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        # Only for vocabularies whose tokens are no plain bytes: ids decoded together, of
        # which the first `_shown` stand for text that is out already.
        self._window: list[int] = []
        self._shown = 0
        passes = _CLEAN_UPS if vocabulary.cleans_up else ()
        self._clean_ups = [_CleanUpPass(replacements) for replacements in passes]

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, perhaps none."""
        if token_id in self._skip_ids or not 0 <= token_id < self._vocabulary.vocab_size:
            return ""
        if not self._vocabulary.bytes_known:
            return self._cleaned(self._push_window(token_id))
        return self._cleaned(self._trim(self._utf8.decode(self._vocabulary.token_bytes(token_id))))

    def hidden_text(self, token_id: int) -> str:
        """Return the text of a token that `push` leaves out; empty for any other."""
        return self._vocabulary.decode([token_id], False) if token_id in self._skip_ids else ""

    def spellings(self, text: str) -> set[str]:
        """Return a text as it stands and with its special tokens as `push` shows them.

        sentencepiece vocabularies show the space mark of a token's text as a space.
        """
        if SPACE_MARK not in text:
            return {text}
        shown = text
        for token_id in self._vocabulary.special_ids:
            content = self._vocabulary.content(token_id)
            if SPACE_MARK in content and content in text:
                shown = shown.replace(content, self._vocabulary.decode([token_id], False))
        return {text, shown}

    def continue_after(self, token_id: int) -> None:
        """Begin behind a token whose text is out already: the next is no first one any more."""
        self._at_start = False
        self._window, self._shown = [token_id], 1

    def flush(self) -> str:
        """End the stream; return what was held back."""
        if not self._vocabulary.bytes_known:
            text = self._new_text()
            self._window, self._shown = [], 0
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
        before = self._vocabulary.decode(self._window[: self._shown], self._skip_special)
        return self._vocabulary.decode(self._window, self._skip_special)[len(before) :]


class _CleanUpPass:
    """One pass of `clean_up` over text that arrives in pieces.

    Args:
        replacements: text -> what is written for it. The texts begin with a space and hold no
            other one but at their end, so at most one of them fits at a place.
    """

    def __init__(self, replacements: dict[str, str]) -> None:
        self._replacements = replacements
        self._held = ""

    def push(self, piece: str) -> str:
        """Take more text; return what is certain of it with the replacements made."""
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
        """End the text; return what was held back."""
        text, self._held = self._held, ""
        return text
