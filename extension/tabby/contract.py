"""What this backend expects of TabbyAPI, the names they share, and its log."""

from __future__ import annotations

import sys
from typing import Any

from ..host_log import log_line

# The names under which a configuration asks for this backend. Configurations that were written
# for ExLlamaV2 go on working.
BACKENDS = ("exl_loader", "exllamav2")

# TabbyAPI's module that chooses a backend. When it has been imported, the backend is registered.
MODEL_MODULE = "common.model"

# TabbyAPI's modules that answer requests, and `common.sampling`, which checks their samplers.
COMPLETIONS = "endpoints.OAI.utils.completion"
CHAT_COMPLETIONS = "endpoints.OAI.utils.chat_completion"
KOBOLD = "endpoints.Kobold.utils.generation"
SAMPLING = "common.sampling"


class TabbyDiffers(Exception):
    """TabbyAPI is not one that this backend supports; the message names the difference."""


def say(message: str, *, level: str = "info") -> None:
    """Print one line in TabbyAPI's log, or on stderr while there is no log yet.

    Args:
        level: a method of a logger, `info`, `warning` or `error`.
    """
    log_line(message, level, "common.logger", "xlogger")


def module(name: str) -> Any:
    """Return an imported module of TabbyAPI.

    Raises:
        TabbyDiffers: it has not been imported.
    """
    found = sys.modules.get(name)
    if found is None:
        raise TabbyDiffers(f"{name} is not loaded")
    return found
