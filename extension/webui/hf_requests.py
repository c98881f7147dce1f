"""What the web UI does with a prompt before transformers' generation, made to fit our context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from exl_loader.utils.errors import InvalidSettings, modules_of

from . import host, loading
from .host import Patches
from .request import PromptRoom


def extend_lengths(patches: Patches, module: ModuleType) -> None:
    """Keep prompts of our models whole where they fit, and their BOS token where they do not.

    The web UI computes the length of a prompt, which a chat drops old messages for, and hands it
    to `encode`, which cuts the prompt for `ExLlamav2_HF`.

    Args:
        module: `modules.text_generation`.
    """
    max_length = getattr(module, "get_max_prompt_length", None)
    if max_length is not None:
        patches.replace(max_length, _max_prompt_length(max_length))
        patches.replace(module.encode, _encode(module.encode))


def _max_prompt_length(original: Callable[[Any], int]) -> Callable[[Any], int]:
    @functools.wraps(original)
    def get_max_prompt_length(state: Any) -> int:
        loaded = loading.current()
        if loaded is None or not _serves(loaded):
            return original(state)
        return PromptRoom.of_request(state, loaded.ctx_size)

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
    """Whether the web UI's model is the one that we have loaded."""
    return getattr(host.module("modules.shared").model, "loaded", None) is loaded


def named_error(error: Exception) -> Exception:
    """Name the setting that the web UI or transformers failed over; else return the error."""
    modules = modules_of(error)
    if any(name.startswith("modules.grammar.") for name in modules):
        found = f"one that the web UI cannot read ({type(error).__name__}: {error})"
        return InvalidSettings(
            "grammar_string", expected="a GBNF grammar with a rule root, and a rule for every "
            "name in it", actual=found)
    checks_settings = modules[-1:] and modules[-1].startswith("transformers.")
    if checks_settings and isinstance(error, (TypeError, ValueError)):
        return InvalidSettings(
            "a setting of this request", expected="what transformers' samplers take",
            actual=str(error))
    return error
