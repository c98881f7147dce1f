"""What happens before server.py runs: wait for the web UI's modules, and nothing else.

The start hook runs this in every process that is about to run server.py, so this module imports
only what waiting needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .contract import OPTION_DEFAULTS, say
from .patching import watcher

# When the last of these has been imported, everything that registration touches exists. Some
# of them import `modules.models` themselves: up to v4.0 `modules.ui`, later
# `modules.text_generation`.
_AWAITED = ("modules.models", "modules.ui", "modules.text_generation")

_FLAG_HELP = {
    "cache_8bit": "Store the KV cache in 8 bits.",
    "cache_4bit": "Store the KV cache in 4 bits.",
    "alpha_value": "NTK RoPE factor that extends the context.",
    "as_llama": "Run a model of an unknown architecture as Llama; its output may be wrong.",
    "compress_pos_emb": "Factor that positions are divided by to extend the context.",
    "cache_size": "Tokens of the cache that all requests share; 0 is as many as ctx_size.",
    "chunk_size": "Most tokens in one forward pass; fewer take less memory.",
    "embedding_device": "auto or cpu for the embedding in main memory, or a card.",
    "machines": "Address at which other machines find this one and take layers.",
}


def start() -> None:
    """Register the loaders as soon as the web UI allows it, which is before `--model` loads."""
    watcher.around["modules.shared"] = command_line_flags
    for name in _AWAITED:
        watcher.after[name] = _register
    watcher.start()


def _register(_: ModuleType) -> None:
    """Register as soon as all that registration touches has been imported."""
    if "modules.models" in sys.modules and not any(map(watcher.is_initializing, _AWAITED)):
        try:
            importlib.import_module(".registration", __package__).register()
        except Exception as error:
            # After the other modules the error would be the same.
            watcher.after.clear()
            say(f"the loader was not added to this web UI: {type(error).__name__}: {error}")


@contextmanager
def command_line_flags() -> Iterator[None]:
    """Add our flags to the web UI's parser while it reads its command line."""
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
    """Add our options to the web UI's parser, as flags with dashes and with underscores."""
    taken = parser._option_string_actions
    if "--loader" not in taken:
        return
    group = parser.add_argument_group("ExLlamav2 (exl_loader)")
    for name, default in OPTION_DEFAULTS.items():
        flags = [*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))]
        if any(flag in taken for flag in flags):
            continue
        if default is False:
            group.add_argument(*flags, action="store_true", help=_FLAG_HELP[name])
        else:
            group.add_argument(*flags, type=type(default), default=default, help=_FLAG_HELP[name])
