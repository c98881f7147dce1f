"""A request of the web UI as this engine's settings, and the wish to stop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from exl_loader.generation.generation import Generation
from exl_loader.settings import SamplingSettings

from . import host

if TYPE_CHECKING:
    import torch

    from exl_loader.engine import LoadedModel

# Settings that the web UI works out itself, or that are not a sampler's.
_NOT_COPIED = frozenset({"max_new_tokens", "stop_strings", "stop_token_ids", "logit_bias",
                         "json_schema", "logprobs"})

SAMPLERS = frozenset(field.name for field in fields(SamplingSettings)) - _NOT_COPIED


def prompt_ids(tokenizer: Any, prompt: str, state: Mapping[str, Any], ctx_size: int) -> list[int]:
    """Encode a prompt, and keep its end where it is too long.

    With `add_bos_token` ticked one BOS token comes first where the model has one, else none is
    added to what a template wrote. As in the web UI, the last `truncation_length` minus
    `max_new_tokens` tokens are kept, and with them the BOS token.
    """
    ids = tokenizer.prompt_ids(prompt, add_bos=bool(state.get("add_bos_token", True)))
    length = min(int(state.get("truncation_length") or ctx_size), ctx_size)
    room = length - int(state.get("max_new_tokens") or 0)
    return list(tokenizer.cut_left(ids, max(1, min(room, ctx_size - 1))))


def settings(state: Mapping[str, Any], prompt_len: int, ctx_size: int) -> dict[str, Any]:
    """Read the settings of a request from the web UI's state.

    What the loader does not list among its samplers is left out: the page hides those, and
    whatever value they kept is not meant for this model.
    """
    chosen = {name: state[name] for name in SAMPLERS if state.get(name) is not None}
    # The web UI takes 0 and anything below for the whole text.
    chosen["repetition_penalty_range"] = max(0, chosen.get("repetition_penalty_range", 0))
    length = min(int(state.get("truncation_length") or ctx_size), ctx_size)
    if state.get("auto_max_new_tokens"):
        chosen["max_new_tokens"] = max(1, length - prompt_len)
    else:
        chosen["max_new_tokens"] = int(state.get("max_new_tokens") or 512)
    if state.get("logit_bias"):
        chosen["logit_bias"] = {int(i): float(b) for i, b in state["logit_bias"].items()}
    chosen["logprobs"] = max(0, int(state.get("logprobs") or 0))
    return chosen


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
            chosen["logit_bias"] = {int(i): float(b) for i, b in processor.logit_bias.items()}
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
