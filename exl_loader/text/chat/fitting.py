"""Fit a conversation into the context: old messages go until the answer has its room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Message = TypeVar("Message", bound=Mapping[str, str])


@dataclass(frozen=True)
class FittedMessages:
    """The part of a conversation that is sent to the model.

    Args:
        ids: the prompt.
        dropped: how many of the oldest messages were left out.
        ctx_size: tokens that prompt and answer may have together.
    """

    ids: list[int]
    dropped: int
    ctx_size: int

    @property
    def notice(self) -> str:
        """Say what was left out; empty where nothing was."""
        if not self.dropped:
            return ""
        return (
            f"the {self.dropped} oldest messages were left out, so that the answer has room in "
            f"the context of {self.ctx_size:,} tokens"
        )


def fit_messages(
    messages: Sequence[Message],
    prompt_ids: Callable[[Sequence[Message]], list[int]],
    ctx_size: int,
    max_new_tokens: int,
) -> FittedMessages:
    """Leave out messages from the oldest on until the answer asked for fits behind the rest.

    A question goes with its answer, so that roles still alternate. The last message always
    stays: behind it the answer has what is left of the context. Where the answer asked for
    does not even fit behind the last message alone, half of the context is room enough,
    because leaving out everything else would not make it fit.

    Args:
        messages: questions and answers in turn, a question last.
        prompt_ids: the prompt of some messages.
        ctx_size: tokens that prompt and answer may have together.
        max_new_tokens: tokens asked for.
    """
    alone = prompt_ids(messages[-1:])
    room = max_new_tokens
    if len(alone) + room > ctx_size:
        room = min(room, ctx_size // 2)
    for first in range(0, len(messages) - 1, 2):
        ids = prompt_ids(messages[first:])
        if len(ids) + room <= ctx_size:
            return FittedMessages(ids, first, ctx_size)
    return FittedMessages(alone, len(messages) - 1, ctx_size)


def context_notice(ctx_size: int, new_tokens: int) -> str:
    """Say that an answer ended because the context is full."""
    return (
        f"the context of {ctx_size:,} tokens is full: the answer ends after {new_tokens:,} "
        "tokens. A larger ctx_size has room for more"
    )
