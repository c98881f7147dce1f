"""Token healing: the last token of a prompt is chosen anew, together with the next text.

A prompt that ends inside of a word, or in a space, ends in a token that the model would not have
written there, because in its training text a longer token stood in that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..utils.errors import InvalidSettings
from .sampling.numerics import Ids

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HealedToken:
    """The last token of a prompt, in whose place the first token of the answer is drawn.

    Args:
        token_id: the token.
        text: its text, which the prompt shows, so that it is not shown again.
        allowed_ids: int64, rising: the tokens that begin with this text, the token among them.
    """

    token_id: int
    text: str
    allowed_ids: Ids

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the text in UTF-8."""
        return len(self.text.encode())


class TokenHealing:
    """Finds the token of a prompt that is to be healed. Any thread may call it.

    Args:
        tokenizer: None if the model has none; then token healing is an error.
        vocab_size: ids from here on are never drawn.
        eos_ids: ids that end a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)

    def find(self, prompt_ids: Sequence[int]) -> HealedToken | None:
        """Return the token to heal; None if the prompt stays as it is.

        A prompt of one token stays, because a model needs a token to begin with. So does one
        that ends in a special token or in a token that is a part of a character: no longer
        token begins with them.

        Raises:
            InvalidSettings: the bytes of the model's tokens are not known.
        """
        tokenizer = self._tokenizer
        if tokenizer is None or not tokenizer.bytes_known:
            raise InvalidSettings(
                "token_healing", expected="a model whose tokens are known byte by byte",
                actual="no tokenizer" if tokenizer is None else "another kind of tokenizer",
                remedy="Leave token_healing out for this model",
            )
        last = prompt_ids[-1]
        is_ordinary = last < self._vocab_size and last not in tokenizer.special_ids
        if len(prompt_ids) < 2 or not is_ordinary or last in self._eos_ids:
            return None
        try:
            text = tokenizer.token_bytes(last).decode()
        except UnicodeDecodeError:
            return None
        if not text:
            return None
        found = tokenizer.ids_that_begin_with(text.encode())
        allowed = [i for i in found if i < self._vocab_size and i not in self._eos_ids]
        return HealedToken(last, text, np.array(allowed, np.int64))
