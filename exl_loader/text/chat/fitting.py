"""Fit a conversation into the context by leaving out its oldest messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Message = TypeVar("Message", bound=Mapping[str, str])


@dataclass(frozen=True)
class FittedMessages:
    """The part of a conversation that is sent to the model.

    Args:
        ids: token ids of the prompt.
        dropped: number of the oldest messages that were left out.
        ctx_size: most tokens of prompt and answer together.
    """

    ids: list[int]
    dropped: int
    ctx_size: int

    @property
    def notice(self) -> str:
        """A sentence about the messages that were left out; empty where there are none."""
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
    kept: int = 1,
) -> FittedMessages:
    """Leave out the oldest messages until prompt and answer fit into the context.

    A question is left out together with its answer, so that roles still alternate. The last
    message always stays, and the answer then gets what is left of the context. Where
    `max_new_tokens` does not fit even after the last message alone, half of the context is kept
    for the answer, because leaving out every other message would not be enough anyway.

    Args:
        messages: questions and answers in turn, a question last.
        prompt_ids: renders and encodes some of the messages.
        ctx_size: most tokens of prompt and answer together.
        max_new_tokens: tokens of the answer.
        kept: number of the last messages that always stay: 2 where the last message is an
            answer that the model continues.
    """
    kept = min(kept, len(messages))
    alone = prompt_ids(messages[-kept:])
    room = max_new_tokens
    if len(alone) + room > ctx_size:
        room = min(room, ctx_size // 2)
    for first in range(0, len(messages) - kept, 2):
        ids = prompt_ids(messages[first:])
        if len(ids) + room <= ctx_size:
            return FittedMessages(ids, first, ctx_size)
    return FittedMessages(alone, len(messages) - kept, ctx_size)


def context_notice(ctx_size: int, new_tokens: int) -> str:
    """Return the message that an answer ended because the context is full."""
    return (
        f"the context of {ctx_size:,} tokens is full: the answer ends after {new_tokens:,} "
        "tokens. A larger ctx_size has room for more"
    )
