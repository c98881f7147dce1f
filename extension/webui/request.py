"""A request of the web UI: its prompt, its settings, and whether it should stop."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from exl_loader import SamplingSettings
from exl_loader.generation.settings import biases
from exl_loader.utils.setting_values import invalid, plain

from . import contract, problems

if TYPE_CHECKING:
    import torch

    from exl_loader import LoadedModel
    from exl_loader.generation.generator import Generation

# Settings that the web UI computes itself, or that do not belong to a sampler.
_NOT_COPIED = frozenset({"max_new_tokens", "stop_strings", "stop_token_ids", "logit_bias",
                         "json_schema", "logprobs"})

# Length of an answer, in tokens, if the web UI names none.
DEFAULT_NEW_TOKENS = 512

SAMPLERS = frozenset(field.name for field in fields(SamplingSettings)) - _NOT_COPIED


def prompt_ids(tokenizer: Any, prompt: str, state: Mapping[str, Any], ctx_size: int) -> list[int]:
    """Encode a prompt, and keep only its end if it is too long.

    With `add_bos_token` the ids begin with one BOS token if the model has one; without it none
    is added to what a template wrote. The BOS token stays when the prompt is cut; see
    `PromptRoom`.

    Raises:
        InvalidSettings: `truncation_length` or `max_new_tokens` is not a valid number.
    """
    room = PromptRoom.from_request(state, ctx_size)
    ids = tokenizer.prompt_ids(prompt, add_bos=bool(state.get("add_bos_token", True)))
    return room.cut(ids, tokenizer)


class PromptRoom(int):
    """The number of tokens kept of a prompt that does not fit into the context.

    It is the web UI's rule, `truncation_length` minus `max_new_tokens`, but at least a quarter
    of the context: an answer as long as the context would leave nothing of the question. A
    prompt that fits is kept whole, and the answer gets what is left.

    Attributes:
        length: tokens that prompt and answer may have together.
    """

    length: int

    @classmethod
    def from_request(cls, state: Mapping[str, Any], ctx_size: int) -> PromptRoom:
        """Compute the number from a request.

        Raises:
            InvalidSettings: `truncation_length` or `max_new_tokens` is not a valid number.
        """
        length = context_length(state, ctx_size)
        kept = max(length - new_tokens_asked(state), length // 4, 1)
        room = cls(min(kept, max(1, length - 1)))
        room.length = length
        return room

    def cut(self, ids: list[int], tokenizer: Any) -> list[int]:
        """Return a prompt's ids, cut from the left if they do not fit, and tell the user so."""
        if len(ids) < self.length:
            return ids
        kept = list(tokenizer.cut_left(ids, int(self)))
        problems.notice(
            f"the prompt of {len(ids):,} tokens does not fit into the context of "
            f"{self.length:,} tokens; only its last {len(kept):,} tokens were kept"
        )
        return kept


def context_length(state: Mapping[str, Any], ctx_size: int) -> int:
    """Return the tokens that prompt and answer may have together.

    Raises:
        InvalidSettings: `truncation_length` is not a whole number of at least 0.
    """
    asked = whole_number("truncation_length", state.get("truncation_length"))
    return min(asked or ctx_size, ctx_size)


def new_tokens_asked(state: Mapping[str, Any]) -> int:
    """Return the `max_new_tokens` of a request.

    Raises:
        InvalidSettings: it is not a whole number of at least 0.
    """
    return whole_number("max_new_tokens", state.get("max_new_tokens")) or DEFAULT_NEW_TOKENS


def whole_number(name: str, value: Any) -> int:
    """Read a number that may be missing or written as text; 0 if it is missing.

    Raises:
        InvalidSettings: it is not a whole number of at least 0.
    """
    if value is None or value == "":
        return 0
    try:
        number = float(value)
        if isinstance(value, bool) or not number.is_integer() or number < 0:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise invalid(name, "a whole number of at least 0", value) from None
    return int(number)


def settings(state: Mapping[str, Any], prompt_len: int, ctx_size: int) -> dict[str, Any]:
    """Read the settings of a request from the web UI's state.

    Samplers that the loader does not list are left out: the page hides them, and the values
    they still have are not meant for this model.
    """
    chosen = {name: state[name] for name in SAMPLERS if state.get(name) is not None}
    # In the web UI 0 and negative numbers mean the whole text.
    chosen["repetition_penalty_range"] = _at_least_0(chosen.get("repetition_penalty_range", 0))
    chosen["max_new_tokens"] = new_tokens(state, prompt_len, ctx_size)
    if state.get("logit_bias"):
        chosen["logit_bias"] = dict(biases("logit_bias", state["logit_bias"]))
    chosen["logprobs"] = whole_number("logprobs", _at_least_0(state.get("logprobs")))
    chosen["stop_strings"] = stop_strings(state)
    return chosen


def _at_least_0(value: Any) -> Any:
    """Return 0 for a negative number; other values stay, so that the engine can refuse them."""
    value = plain(value)
    return 0 if isinstance(value, (int, float)) and value < 0 else value


def stop_strings(state: Mapping[str, Any]) -> list[str]:
    """Return the strings that end an answer: the chat's own and the page's custom ones.

    The web UI looks for them in the text that is shown, without special tokens. The engine
    looks for them in special tokens as well, before they are shown.

    Raises:
        InvalidSettings: `custom_stopping_strings` is not a list of quoted texts.
    """
    found: list[str] = []
    for name in (contract.CHAT_STOPS, "custom_stopping_strings"):
        value = state.get(name) or []
        if isinstance(value, str):
            try:
                # The same way the web UI reads this field.
                value = ast.literal_eval(f"[{value}]")
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise invalid(
                    name, "texts in quotes, separated by commas", value
                ) from None
        if not isinstance(value, (list, tuple)) or not all(isinstance(t, str) for t in value):
            raise invalid(name, "a list of texts", value)
        found += [text for text in value if text]
    return list(dict.fromkeys(found))


def new_tokens(state: Mapping[str, Any], prompt_len: int, ctx_size: int) -> int:
    """Return how many tokens an answer may have; fewer than were asked for are reported.

    Raises:
        InvalidSettings: `truncation_length` or `max_new_tokens` is not a valid number.
    """
    left = max(1, context_length(state, ctx_size) - prompt_len)
    asked = new_tokens_asked(state)
    if state.get("auto_max_new_tokens"):
        return left
    if asked > left:
        problems.notice(shortened(asked, left, prompt_len), in_page=False)
    return min(asked, left)


def shortened(asked: int, left: int, prompt_len: int) -> str:
    """Return the message that the context has less room for an answer than was asked for."""
    return (
        f"after the prompt of {prompt_len:,} tokens the context has room for only {left:,} of the "
        f"{asked:,} new tokens asked for"
    )


def take_processors(state: Mapping[str, Any], chosen: dict[str, Any]) -> list[Any]:
    """Read biases and log probabilities from transformers' logits processors (v4.0).

    Args:
        state: of the request.
        chosen: the settings to add them to.

    Returns:
        the processors that need the log probabilities.
    """
    listeners = []
    for processor in state.get("logits_processor") or ():
        if hasattr(processor, "logit_bias"):
            chosen["logit_bias"] = dict(biases("logit_bias", processor.logit_bias))
        elif hasattr(processor, "token_alternatives"):
            chosen["logprobs"] = max(chosen["logprobs"], int(processor.logprobs or 0))
            listeners.append(processor)
    return listeners


def without_padding(logits: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    """Set the logits of ids without a token to -inf: many models pad their vocabulary.

    Args:
        logits: float32 [..., vocab_size], changed in place.
        loaded: the model; its tokenizer knows where the padding begins.
    """
    if loaded.has_tokenizer:
        logits[..., loaded.tokenizer.vocab_size :] = float("-inf")
    return logits


class StopWatch:
    """Ends a generation when the web UI asks for it, even while the prompt is read.

    It is the generation's progress as well, so it is called after each chunk of the prompt.

    Args:
        state: of the request. Its `stop_event` stops this request, the web UI's flag all.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._event = state.get("stop_event")
        self._shared = contract.module("modules.shared")
        self.generation: Generation[Any] | None = None

    def wanted(self) -> bool:
        """Return whether to stop."""
        return bool(self._shared.stop_everything or (self._event and self._event.is_set()))

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._look()

    def advance(self, task: str, n: int = 1) -> None:
        self._look()

    def finish(self, task: str) -> None:
        pass

    def _look(self) -> None:
        if self.generation is not None and self.wanted():
            self.generation.stop()
