"""Errors of generations: a line for whoever waits in the page, the details in the Model tab.

The web UI puts them into its log and nowhere else, and its messages can show plain text alone.
"""

from __future__ import annotations

import sys

from exl_loader.errors import ExlLoaderError

from . import host
from .panel import error_html

_last = ""


def report(error: Exception) -> None:
    """Say what ended a generation, in the page of whoever asked for it and in the log."""
    global _last
    # Its text alone is kept: a traceback would keep what the generation had in hand.
    _last = error_html(error, heading="Generation failed")
    if isinstance(error, ExlLoaderError):
        line, has_details = str(error), bool(error.details)
    else:
        line, has_details = f"Unexpected {type(error).__name__}: {error}", True
    if has_details:
        line += " (The Model tab has the details.)"
    host.say(line, level="error")
    _warn_in_page(line)


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
