"""Ends a model's reasoning after a number of tokens, by text that is forced into the answer.

Reasoning is what stands between two tags, such as `<think>` and `</think>`. TabbyAPI and llama.cpp
call the number a reasoning budget.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings, shown
from .settings import SamplingSettings

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

# Most bytes of a character in UTF-8.
_CHARACTER_BYTES = 4

# A tag of several tokens opens a section if at most this many tokens of white space follow it.
_MOST_SPACES = 16


@dataclass(frozen=True)
class Tag:
    """Text that begins or ends a reasoning.

    Args:
        text: its bytes; empty for a tag that does not occur.
        token_id: the token that is this text; None if it takes several.
    """

    text: bytes
    token_id: int | None

    @classmethod
    def from_setting(cls, name: str, text: str, tokenizer: Tokenizer) -> Tag:
        """Look up a tag.

        Raises:
            InvalidSettings: it takes several tokens, whose bytes are not known.
        """
        token_id = tokenizer.token_id(text)
        if text and token_id is None and not tokenizer.bytes_known:
            raise InvalidSettings(
                name, expected="a token of this model", actual=shown(text),
                remedy="Choose one, or leave reasoning_budget_tokens out",
            )
        return cls(text.encode("utf-8", "replace"), token_id)

    def ends(self, token_id: int, text: bytes) -> bool:
        """Return whether the tag is in the newest text.

        Args:
            token_id: the newest token.
            text: text that ends with this token and has at most the tag's length before it.
        """
        if self.token_id is not None:
            return token_id == self.token_id
        return bool(self.text) and self.text in text

    def ends_prompt(self, prompt_ids: Sequence[int], text_of: Callable[[int], bytes]) -> bool:
        """Return whether a prompt ends in the tag, apart from white space.

        Args:
            text_of: returns the bytes of a token; empty ones if they are not known.
        """
        if self.token_id is not None:
            words = (i for i in reversed(prompt_ids) if not text_of(i).isspace())
            return next(words, None) == self.token_id
        last = prompt_ids[-len(self.text) - _MOST_SPACES :]
        return bool(self.text) and b"".join(map(text_of, last)).rstrip().endswith(self.text)


class ReasoningBudget:
    """Counts the tokens of an answer's reasoning, and says which text ends it.

    All sections of an answer count together. A section is not cut inside of a character.

    Args:
        settings: those of the request.
        tokenizer: the model's.
        prompt_ids: the prompt, which may have opened a section.

    Raises:
        InvalidSettings: a tag takes several tokens, whose bytes are not known.
    """

    def __init__(
        self, settings: SamplingSettings, tokenizer: Tokenizer, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._start = Tag.from_setting(
            "reasoning_start_token", settings.reasoning_start_token, tokenizer)
        self._end = Tag.from_setting(
            "reasoning_end_token", settings.reasoning_end_token, tokenizer)
        self._forced_ids = tuple(_encoded(settings.reasoning_end_text, tokenizer))
        self._num_left = settings.reasoning_budget_tokens
        self._num_forced = 0
        # The end of the text in which a tag may stand that takes several tokens.
        self._recent = b""
        self._is_open = settings.start_in_reasoning == "always" or (
            settings.start_in_reasoning == "auto"
            and self._start.ends_prompt(prompt_ids, self._text_of)
        )

    @property
    def forced_id(self) -> int | None:
        """The token that comes next, whatever the samplers say; None if the model chooses."""
        if not self._is_open or self._num_left > 0:
            return None
        if self._num_forced == 0 and _is_cut(self._recent):
            return None
        return self._forced_ids[self._num_forced]

    def observe(self, token_id: int) -> None:
        """Count a token that was drawn."""
        self._recent += self._text_of(token_id)
        if self._is_open:
            found = self._end.ends(token_id, self._recent)
            if not found:
                self._num_left -= 1
        else:
            found = self._start.ends(token_id, self._recent)
        if found:
            self._is_open = not self._is_open
            self._recent = b""
        longest = max(len(self._start.text), len(self._end.text), _CHARACTER_BYTES)
        self._recent = self._recent[-longest:]

    def take_forced(self) -> None:
        """Go on after `forced_id`."""
        self._num_forced += 1
        if self._num_forced == len(self._forced_ids):
            self._is_open, self._num_forced, self._recent = False, 0, b""

    def _text_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id) if self._tokenizer.bytes_known else b""


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.continuation_ids(text) if tokenizer.bytes_known else None
    return tokenizer.encode(text, add_bos=False) if ids is None else ids


def _is_cut(text: bytes) -> bool:
    """Return whether text ends inside of a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text)
    pending, _ = decoder.getstate()
    return bool(pending)
