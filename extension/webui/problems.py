"""Errors of generations: a line for whoever waits in the page, the details in the Model tab.

The web UI puts them into its log and nowhere else, and its messages can show plain text alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exl_loader.utils.errors import (
    CacheFull,
    InvalidSettings,
    InvalidTokenizer,
    ModelNotFound,
    ModelUnloaded,
    PromptTooLong,
    known_line,
)

from ..panel.panel import error_html
from . import host

_last = ""


@dataclass(frozen=True)
class Problem:
    """An error as a client of the API is told of it.

    Args:
        message: one line. status: of HTTP. param: the setting that is refused.
    """

    message: str
    status: int
    param: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the web UI's own errors."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": None}


# What was reported last in this thread: the API asks in the thread that it waits in.
_of_thread = threading.local()

# Errors of what was asked for, not of the model or the machine.
_OF_REQUEST = (InvalidSettings, PromptTooLong, InvalidTokenizer, ModelNotFound, ValueError)
_TRY_LATER = (CacheFull, ModelUnloaded)


def problem(error: BaseException) -> Problem:
    """Describe an error for a client."""
    message = known_line(error) or f"{type(error).__name__}: {error}"
    # A setting is named as one word; other things that are refused are described.
    param = None
    if isinstance(error, InvalidSettings) and error.thing.isidentifier():
        param = error.thing
    status = 400 if isinstance(error, _OF_REQUEST) else 500
    return Problem(message, 503 if isinstance(error, _TRY_LATER) else status, param)


def take() -> Problem | None:
    """Return what was reported in this thread since the last call, once."""
    found = getattr(_of_thread, "problem", None)
    _of_thread.problem = None
    return found


def note_ending(reason: str | None) -> None:
    """Keep why an answer ended, for the API: the web UI guesses it from token counts."""
    endings = getattr(_of_thread, "endings", [])
    _of_thread.endings = [*endings, reason]


def take_endings() -> list[str | None]:
    """Return the reasons why answers ended in this thread since the last call."""
    found = getattr(_of_thread, "endings", [])
    _of_thread.endings = []
    return found


def report(error: Exception) -> None:
    """Say what ended a generation, in the page of whoever asked for it and in the log."""
    global _last
    if getattr(error, "_exl_is_reported", False):
        return
    error._exl_is_reported = True  # type: ignore[attr-defined]
    _of_thread.problem = problem(error)
    # Its text alone is kept: a traceback would keep what the generation had in hand.
    _last = error_html(error, heading="Generation failed")
    known = known_line(error)
    line = known or f"Unexpected {type(error).__name__}: {error}"
    if known is None or getattr(error, "details", None):
        line += " (The Model tab has the details.)"
    host.say(line, level="error")
    _warn_in_page(line)


@contextmanager
def reported() -> Iterator[None]:
    """Report the error that ends a `with` block, which is raised all the same."""
    try:
        yield
    except Exception as error:
        report(error)
        raise


def notice(line: str, *, in_page: bool = True) -> None:
    """Say what a person may want to know of an answer that is no error.

    Args:
        in_page: show it in the page of whoever asked as well, and not in the log alone.
    """
    host.say(line)
    if in_page:
        _warn_in_page(line[:1].upper() + line[1:])


def clear() -> None:
    """Forget the last error: something went well since, or the model is another one."""
    global _last
    _last = ""


def last_html() -> str:
    """Show the last generation's error, its details folded; empty where it went well."""
    return _last


def _warn_in_page(line: str) -> None:
    context = getattr(sys.modules.get("gradio.context"), "LocalContext", None)
    # Outside a page's event, as in the API, Gradio has nobody to show it to.
    if context is not None and context.event_id.get(None) is not None:
        sys.modules["gradio"].Warning(line)
