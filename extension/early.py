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

from .host import OPTION_DEFAULTS
from .watch import is_initializing, watcher


def start() -> None:
    """Have the loader registered as soon as the web UI can, which is before `--model` loads."""
    watcher.around["modules.shared"] = command_line_flags
    watcher.after["modules.models"] = _register
    watcher.after["modules.ui"] = _register
    watcher.start()


def _register(imported: ModuleType) -> None:
    """Register once all that registration touches is complete.

    Up to v4.0 `modules.ui` imports `modules.models` on its way, and has the list of options
    that later versions keep in `modules.loaders`.
    """
    page = sys.modules.get("modules.ui")
    # The module that has just been executed still counts as being imported.
    if "modules.models" not in sys.modules or (page is not imported and is_initializing(page)):
        return
    importlib.import_module(".registration", __package__).register()


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
