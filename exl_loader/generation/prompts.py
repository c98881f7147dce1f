"""Prompts as requests bring them: text or ids, checked against the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..text.tokenizer import no_tokenizer
from ..utils.errors import InvalidSettings, PromptTooLong, shown
from ..utils.setting_values import whole_numbers

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig
    from ..text.tokenizer import Tokenizer

Prompt = str | Iterable[int]


class PromptReader:
    """Reads prompts for one model.

    Args:
        config: gives vocab_size and bos_token_id.
        tokenizer: None where only ids can be used.
        ctx_size: tokens that prompt and answer may have together.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, ctx_size: int) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ctx_size = ctx_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidTokenizer: it has none.
        """
        if self._tokenizer is None:
            raise no_tokenizer("the model's tokenizer")
        return self._tokenizer

    def ids(self, prompt: Prompt) -> list[int]:
        """Encode a prompt, or check its ids; an empty one becomes the BOS token.

        Raises:
            InvalidSettings: a token id makes no sense, or it is empty and there is no BOS token.
            InvalidTokenizer: text, and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            tokenizer = self.tokenizer
            ids = tokenizer.prompt_ids(prompt)
            bos_id = tokenizer.bos_token_id
        else:
            ids = whole_numbers("prompt", prompt, "text or token ids")
            bos_id = None
        if bos_id is None:
            bos_id = self._config.bos_token_id
        if not ids and bos_id is not None:
            ids = [bos_id]
        return self.checked(ids)

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Turn any integers (numpy's and torch's too) into a list of valid ids, at least one.

        Raises:
            InvalidSettings: they are not.
        """
        checked = whole_numbers("prompt", ids, "text or token ids")
        if not checked:
            raise InvalidSettings("prompt", expected="at least one token", actual="none",
                                  remedy="Write something to continue")
        self.check_range(checked, "token ids")
        return checked

    def check_range(self, ids: Sequence[int], what: str) -> None:
        """Raise InvalidSettings, which names `what`, for ids outside the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self._config.vocab_size):
            raise InvalidSettings(
                what, expected=f"0 to {self._config.vocab_size - 1}",
                actual=f"{shown(min(ids))} to {shown(max(ids))}",
                remedy="They may come from another model's tokenizer",
            )

    def check_length(self, prompt_len: int, needed: int, what: str = "the prompt") -> None:
        """Raise PromptTooLong, which names `what`, where the context has fewer than `needed`."""
        if needed > self._ctx_size:
            new_tokens = needed - prompt_len
            room = " and a new one" if new_tokens else ""
            raise PromptTooLong(
                what, expected=f"at most {self._ctx_size - new_tokens} tokens{room} in a "
                f"ctx_size of {self._ctx_size}",
                actual=f"{prompt_len} tokens",
                remedy="Shorten it, or load the model with a larger ctx_size",
            )
