"""What happens before server.py runs: waiting for the web UI's modules, and no more.

Run from the environment's site-packages in every process that is about to run server.py, so
only what waiting needs is imported here.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .host import OPTION_DEFAULTS, say
from .watch import watcher

# Whichever of these is complete last has what the web UI loads `--model` with. Some import
# `modules.models` on their way: up to v4.0 `modules.ui`, since then `modules.text_generation`.
_AWAITED = ("modules.models", "modules.ui", "modules.text_generation")


def start() -> None:
    """Have the loader registered as soon as the web UI can, which is before `--model` loads."""
    watcher.around["modules.shared"] = command_line_flags
    for name in _AWAITED:
        watcher.after[name] = _register
    watcher.start()


def _register(_: ModuleType) -> None:
    """Register once all that registration touches is complete."""
    if "modules.models" in sys.modules and not any(map(watcher.is_initializing, _AWAITED)):
        try:
            importlib.import_module(".registration", __package__).register()
        except Exception as error:
            # The other modules would find the same.
            watcher.after.clear()
            say(f"the loader stays out of this web UI: {type(error).__name__}: {error}")


@contextmanager
def command_line_flags() -> Iterator[None]:
    """Give the web UI's parser our flags while its options are read."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        add_flags(self)
        return original(self, *args, **kwargs)

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our options, as flags with dashes or underscores, to the web UI's parser."""
    taken = parser._option_string_actions
    if "--loader" not in taken:
        return
    group = parser.add_argument_group("ExLlamav2 (exl_loader)")
    for name, default in OPTION_DEFAULTS.items():
        flags = [f"--{name.replace('_', '-')}", f"--{name}"]
        if any(flag in taken for flag in flags):
            continue
        if default is False:
            group.add_argument(*flags, action="store_true", help="Bits of the KV cache.")
        else:
            group.add_argument(*flags, type=float, default=default, help="Stretches RoPE.")
