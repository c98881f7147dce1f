"""Errors of requests: what a client of TabbyAPI is told.

TabbyAPI writes the reason of a failed request into its log, and tells the client to look there.
With this the client gets the reason of errors that this backend raises on purpose, as `detail`
with status 400 where the request is at fault, and as `error` at the end of a stream.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from exl_loader import (
    CacheFull,
    ExlLoaderError,
    InvalidSettings,
    InvalidTokenizer,
    ModelUnloaded,
    PromptTooLong,
)

from ..patching import Patches

_OF_REQUEST = (InvalidSettings, PromptTooLong, InvalidTokenizer)

# Errors that end one request and leave the engine as it was.
_HARMLESS = (*_OF_REQUEST, CacheFull, ModelUnloaded)


def is_harmless(error: BaseException) -> bool:
    """Return whether the server is as healthy after an error as it was before."""
    too_long = importlib.import_module("common.errors").ContextLengthExceededError
    return isinstance(error, (*_HARMLESS, too_long))


def context_exceeded(prompt_tokens: int, reach: int) -> Exception:
    """Return TabbyAPI's error for a prompt that leaves no room for an answer."""
    errors = importlib.import_module("common.errors")
    return errors.ContextLengthExceededError(
        f"the prompt has {prompt_tokens:,} tokens; prompt and answer together can have "
        f"{reach:,} tokens (max_seq_len)"
    )


def extend(patches: Patches, answers: ModuleType) -> None:
    """Let a module that answers requests tell the reason.

    Args:
        answers: a module with these names, which it imported by value.
    """
    for name in ("handle_request_error", "get_generator_error"):
        if hasattr(answers, name):
            patches.set(answers, name, _with_reason(getattr(answers, name)))
    if hasattr(answers, "HTTPException"):
        patches.set(answers, "HTTPException", _with_status(answers.HTTPException))


def _with_reason(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a message by the error that is being handled, if it is one of ours."""

    def with_reason(message: str, exc_info: bool = True) -> Any:
        error = sys.exc_info()[1]
        if isinstance(error, ExlLoaderError):
            # The message says everything; a traceback in the log would bury it.
            return original(str(error), False)
        return original(message, exc_info)

    return with_reason


def _with_status(original: Callable[..., Exception]) -> Callable[..., Exception]:
    """Answer with status 400 where the request is at fault."""

    def http_exception(status_code: int, *args: Any, **more: Any) -> Exception:
        if isinstance(sys.exc_info()[1], _OF_REQUEST):
            status_code = 400
        return original(status_code, *args, **more)

    return http_exception


async def note_unhealthy(error: Exception) -> None:
    """Let TabbyAPI's `/health` report an error after which the engine may not be as before."""
    health = importlib.import_module("common.health")
    await health.HealthManager.add_unhealthy_event(error)
