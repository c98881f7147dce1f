"""A request of the web UI as this engine's settings, and the wish to stop it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from exl_loader.generation.generator import Generation
from exl_loader.generation.settings import SamplingSettings, biases
from exl_loader.utils.setting_values import invalid, plain

from . import host, problems

if TYPE_CHECKING:
    import torch

    from exl_loader.engine import LoadedModel

# Settings that the web UI works out itself, or that are not a sampler's.
_NOT_COPIED = frozenset({"max_new_tokens", "stop_strings", "stop_token_ids", "logit_bias",
                         "json_schema", "logprobs"})

# Tokens of an answer where the web UI names none.
DEFAULT_NEW_TOKENS = 512

SAMPLERS = frozenset(field.name for field in fields(SamplingSettings)) - _NOT_COPIED


def prompt_ids(tokenizer: Any, prompt: str, state: Mapping[str, Any], ctx_size: int) -> list[int]:
    """Encode a prompt, and keep its end where it is too long.

    With `add_bos_token` ticked one BOS token comes first where the model has one, else none is
    added to what a template wrote. It stays where the prompt is cut; see `PromptRoom`.

    Raises:
        InvalidSettings: `truncation_length` or `max_new_tokens` makes no sense.
    """
    room = PromptRoom.of_request(state, ctx_size)
    ids = tokenizer.prompt_ids(prompt, add_bos=bool(state.get("add_bos_token", True)))
    return room.cut(ids, tokenizer)


class PromptRoom(int):
    """Tokens that are kept of a prompt which does not fit into the context.

    That is the web UI's rule, `truncation_length` minus `max_new_tokens`, but at least a quarter
    of the context: an answer as long as the context would leave nothing of the question. A
    prompt that fits is kept whole, and the answer has what is left.

    Attributes:
        length: tokens that prompt and answer may have together.
    """

    length: int

    @classmethod
    def of_request(cls, state: Mapping[str, Any], ctx_size: int) -> PromptRoom:
        """Read a request's room.

        Raises:
            InvalidSettings: `truncation_length` or `max_new_tokens` makes no sense.
        """
        length = context_length(state, ctx_size)
        kept = max(length - new_tokens_asked(state), length // 4, 1)
        room = cls(min(kept, max(1, length - 1)))
        room.length = length
        return room

    def cut(self, ids: list[int], tokenizer: Any) -> list[int]:
        """Return a prompt's ids, cut from the left where they do not fit, and say so."""
        if len(ids) < self.length:
            return ids
        kept = list(tokenizer.cut_left(ids, int(self)))
        problems.notice(
            f"the prompt of {len(ids):,} tokens does not fit into the context of "
            f"{self.length:,}: its last {len(kept):,} tokens were kept"
        )
        return kept


def context_length(state: Mapping[str, Any], ctx_size: int) -> int:
    """Return the tokens that prompt and answer may have together.

    Raises:
        InvalidSettings: `truncation_length` is no whole number of at least 0.
    """
    asked = whole_number("truncation_length", state.get("truncation_length"))
    return min(asked or ctx_size, ctx_size)


def new_tokens_asked(state: Mapping[str, Any]) -> int:
    """Return the `max_new_tokens` of a request.

    Raises:
        InvalidSettings: it is no whole number of at least 0.
    """
    return whole_number("max_new_tokens", state.get("max_new_tokens")) or DEFAULT_NEW_TOKENS


def whole_number(name: str, value: Any) -> int:
    """Read a number that a page or the API may have left out, or written as text; 0 for none.

    Raises:
        InvalidSettings: it is no whole number of at least 0.
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

    What the loader does not list among its samplers is left out: the page hides those, and
    whatever value they kept is not meant for this model.
    """
    chosen = {name: state[name] for name in SAMPLERS if state.get(name) is not None}
    # The web UI takes 0 and anything below for the whole text.
    chosen["repetition_penalty_range"] = _at_least_0(chosen.get("repetition_penalty_range", 0))
    chosen["max_new_tokens"] = new_tokens(state, prompt_len, ctx_size)
    if state.get("logit_bias"):
        chosen["logit_bias"] = dict(biases("logit_bias", state["logit_bias"]))
    chosen["logprobs"] = whole_number("logprobs", _at_least_0(state.get("logprobs")))
    chosen["stop_strings"] = stop_strings(state)
    return chosen


def _at_least_0(value: Any) -> Any:
    """Return 0 for a negative number; what is none stays as it is, for the engine to refuse."""
    value = plain(value)
    return 0 if isinstance(value, (int, float)) and value < 0 else value


def stop_strings(state: Mapping[str, Any]) -> list[str]:
    """Return what ends an answer: the page's custom stopping strings and the chat's own.

    The web UI looks for them in the text that is shown, where special tokens are left out; the
    engine finds them there and in the special tokens, before they are shown.

    Raises:
        InvalidSettings: `custom_stopping_strings` are no texts in quotes with commas between.
    """
    found: list[str] = []
    for name in (host.CHAT_STOPS, "custom_stopping_strings"):
        value = state.get(name) or []
        if isinstance(value, str):
            try:
                # As the web UI reads its field.
                value = ast.literal_eval(f"[{value}]")
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise invalid(
                    name, "texts in quotes with commas between them", value
                ) from None
        if not isinstance(value, (list, tuple)) or not all(isinstance(t, str) for t in value):
            raise invalid(name, "a list of texts", value)
        found += [text for text in value if text]
    return list(dict.fromkeys(found))


def new_tokens(state: Mapping[str, Any], prompt_len: int, ctx_size: int) -> int:
    """Return how many tokens an answer may have, and say where it is fewer than were asked for.

    Raises:
        InvalidSettings: `truncation_length` or `max_new_tokens` makes no sense.
    """
    left = max(1, context_length(state, ctx_size) - prompt_len)
    asked = new_tokens_asked(state)
    if state.get("auto_max_new_tokens"):
        return left
    if asked > left:
        problems.notice(shortened(asked, left, prompt_len), in_page=False)
    return min(asked, left)


def shortened(asked: int, left: int, prompt_len: int) -> str:
    """Say that the context has less room for an answer than was asked for."""
    return (
        f"behind the prompt of {prompt_len:,} tokens the context has room for {left:,} new "
        f"tokens of the {asked:,} asked for"
    )


def take_processors(state: Mapping[str, Any], chosen: dict[str, Any]) -> list[Any]:
    """Read the API's wishes where they come as transformers' logits processors (v4.0).

    Args:
        state: of the request.
        chosen: settings to complete with biases and log probabilities.

    Returns:
        the processors that want to be told the log probabilities.
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
    """Rule out ids that stand for nothing: many models pad their vocabulary.

    Args:
        logits: float32 [..., vocab_size], changed in place.
        loaded: whose tokenizer knows where the padding begins.
    """
    if loaded.has_tokenizer:
        logits[..., loaded.tokenizer.vocab_size :] = float("-inf")
    return logits


class StopWatch:
    """Ends a generation when the web UI wants it ended, in the midst of a prompt too.

    It is the generation's progress as well: a prompt's chunks are its ticks.

    Args:
        state: of the request; its `stop_event` is its own, the web UI's flag is everybody's.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._event = state.get("stop_event")
        self._shared = host.module("modules.shared")
        self.generation: Generation[Any] | None = None

    def wanted(self) -> bool:
        """Whether to stop."""
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
