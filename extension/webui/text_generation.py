"""Extends the web UI's modules of generation: errors, prompt lengths, stops, idle reloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ..patching import Patches
from . import contract, loading, problems
from .contract import CHAT_STOPS
from .request import PromptRoom


def extend(patches: Patches, module: ModuleType) -> None:
    """Extend everything that generates text.

    Args:
        module: `modules.text_generation`.
    """
    _report_hf_errors(patches, module)
    _pass_on_stops(patches, module)
    extend_lengths(patches, module)
    # The API counts a prompt's tokens before it asks for an answer.
    _reload_before(patches, module.generate_reply, module.encode, module.decode)


def _report_hf_errors(patches: Patches, module: ModuleType) -> None:
    """Report errors, notices and endings of `ExlLamav2_HF`, which transformers keeps quiet."""
    original = module.generate_reply_HF

    def generate_reply_HF(*args: Any, **kwargs: Any) -> Iterator[Any]:
        model = contract.module("modules.shared").model
        if not hasattr(model, "take_error"):
            yield from original(*args, **kwargs)
            return
        try:
            yield from original(*args, **kwargs)
        except Exception as error:
            named = problems.named_generation_error(error)
            problems.report(named)
            if named is error:
                raise
            raise named from error
        if getattr(model, "ended_by_length", False):
            problems.note_ending("length")
        for line in getattr(model, "take_notices", list)():
            problems.notice(line)
        error = model.take_error()
        if error is not None:
            problems.report(problems.named_generation_error(error))

    patches.replace(original, generate_reply_HF)


def _pass_on_stops(patches: Patches, module: ModuleType) -> None:
    """Put a chat's stopping strings into the request's state, where `ExLlamav2` finds them.

    The web UI looks for them in the text that is shown, which never has control tokens.
    """
    original = getattr(module, "generate_reply_custom", None)
    if original is None:
        return

    def generate_reply_custom(
        question: str, original_question: str, state: dict[str, Any],
        stopping_strings: Any = None, **options: Any,
    ) -> Iterator[Any]:
        state = state | {CHAT_STOPS: stopping_strings}
        return original(question, original_question, state, stopping_strings, **options)

    patches.replace(original, generate_reply_custom)


def extend_lengths(patches: Patches, module: ModuleType) -> None:
    """Keep prompts of our models whole if they fit, and their BOS token if they do not.

    The web UI computes the length that a prompt may have, drops old messages of a chat to fit
    it, and passes it to `encode`, which cuts the prompt for `ExLlamav2_HF`.
    """
    original = getattr(module, "get_max_prompt_length", None)
    if original is not None:
        patches.replace(original, _max_prompt_length(original))
        patches.replace(module.encode, _encode(module.encode))


def _max_prompt_length(original: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(original)
    def get_max_prompt_length(state: Any) -> int:
        loaded = loading.current()
        if loaded is None or not _serves(loaded):
            return original(state)
        return PromptRoom.from_request(state, loaded.ctx_size)

    return get_max_prompt_length


def _encode(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def encode(*args: Any, **kwargs: Any) -> Any:
        room = kwargs.get("truncation_length")
        loaded = loading.current()
        if not isinstance(room, PromptRoom) or loaded is None:
            return original(*args, **kwargs)
        ids = original(*args, **kwargs | {"truncation_length": None})
        if ids.shape[-1] < room.length:
            return ids
        return ids.new_tensor([room.cut(ids[0].tolist(), loaded.tokenizer)])

    return encode


def _serves(loaded: Any) -> bool:
    """Return whether the web UI's model is the one that we have loaded."""
    return getattr(contract.module("modules.shared").model, "loaded", None) is loaded


def extend_logits(patches: Patches, module: ModuleType) -> None:
    """Reload an idle model before `modules.logits` asks it for logits."""
    _reload_before(patches, module.get_next_logits)


def _reload_before(patches: Patches, *functions: Callable[..., Any]) -> None:
    """Reload an idle model of ours before the first function that needs it (up to v4.2)."""
    if hasattr(contract.module("modules.models"), "load_model_if_idle_unloaded"):
        return
    for function in functions:
        patches.replace(function, _reloading(function))


def _reloading(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def reloading(*args: Any, **kwargs: Any) -> Any:
        loading.reload_idle(_reload)
        return function(*args, **kwargs)

    return reloading


def _reload() -> None:
    shared = contract.module("modules.shared")
    if loading.idle_load() is not None:
        models = contract.module("modules.models")
        shared.model, shared.tokenizer = models.load_model(shared.model_name)


def extend_chat(patches: Patches, module: ModuleType) -> None:
    """Let the page count the tokens of its own answer while it is written (since v4.8).

    Args:
        module: `modules.chat`.
    """
    original = getattr(module, "update_token_display_from_state", None)
    if original is None:
        return

    def update_token_display_from_state(*args: Any, **kwargs: Any) -> Any:
        model = contract.module("modules.shared").model
        if hasattr(model, "read_as_page"):
            model.read_as_page()
        return original(*args, **kwargs)

    patches.replace(original, update_token_display_from_state)
