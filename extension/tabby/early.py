"""What happens before TabbyAPI's main.py runs: wait for its modules, and nothing else.

The start hook runs this in every process that is about to run TabbyAPI, so this module imports
only what waiting needs.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ..patching import Watcher
from . import contract
from .contract import say


def _report(name: str, error: Exception) -> None:
    say(f"{name} could not be extended and is left unchanged: {error}", level="warning")


# One per process: it is started before any module of TabbyAPI is imported.
watcher = Watcher(_report)


def start() -> None:
    """Register the backend as soon as TabbyAPI has imported what chooses one."""
    later = {
        contract.MODEL_MODULE: "extend_model",
        contract.SAMPLING: "extend_sampling",
        contract.COMPLETIONS: "extend_answers",
        contract.CHAT_COMPLETIONS: "extend_answers",
        contract.KOBOLD: "extend_answers",
    }
    for name, function in later.items():
        watcher.after[name] = _calling(function)
    watcher.start()


def _calling(function: str):
    def call(module: ModuleType) -> None:
        registration = importlib.import_module(".registration", __package__)
        getattr(registration, function)(module)

    return call
