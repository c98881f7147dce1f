"""The web UI's modules, as this plugin needs them, and what to say when they are different."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from exl_loader.utils.errors import printable

LOADERS = ("ExLlamav2", "ExLlamav2_HF")
# Where `registration` puts the stopping strings of a chat into a request's state.
CHAT_STOPS = "exl_loader_stopping_strings"

# The plugin's own load options: on the command line, in the API, in saved settings, on the page.
OPTION_DEFAULTS: dict[str, Any] = {
    "cache_8bit": False,
    "cache_4bit": False,
    "alpha_value": 1.0,
    "compress_pos_emb": 1.0,
}

ROPE_OPTIONS = ("alpha_value", "compress_pos_emb")

# The web UI's own options of a draft model, which the native loader has too.
DRAFT_OPTIONS = ("model_draft", "ctx_size_draft", "draft_max")

# The page's ids that are shown with the loaders and are no options of a load: the progress of a
# load, the gauge, the fields that the gauge writes to, the field whose change draws it, and what
# the RoPE fields are folded into.
PROGRESS, GAUGE, PICK, DETAILS, ASK, ROPE = PANEL_IDS = (
    "exl_progress", "exl_gauge", "exl_pick", "exl_details", "exl_ask", "exl_rope")

_DEFAULT_CTX_SIZE = 8192

# What the plugin replaces or extends; without any of these it leaves the web UI alone.
_NEEDED: dict[str, tuple[str, ...]] = {
    "modules.shared": ("args", "original_args", "args_defaults", "fix_loader_name",
                       "load_user_config"),
    "modules.loaders": ("loaders_and_params", "loaders_samplers", "get_all_params",
                        "list_all_samplers"),
    "modules.models_settings": ("infer_loader",),
    "modules.models": ("load_model", "unload_model"),
}


class HostDiffers(Exception):
    """The web UI is not one that this plugin knows; it says what is different."""


def say(message: str, *, level: str = "warning") -> None:
    """Print one line in the web UI's log, or where there is none yet, on stderr.

    Args:
        level: a logger's method, `info`, `warning` or `error`.
    """
    found = sys.modules.get("modules.logging_colors")
    logger = getattr(found, "logger", None)
    line = f"exl_loader: {printable(message)}"
    if logger is None:
        print(line, file=sys.stderr, flush=True)
    else:
        getattr(logger, level)(line)


def module(name: str) -> Any:
    """Return an imported module of the web UI, complete or on its way.

    Raises:
        HostDiffers: it has not been imported.
    """
    found = sys.modules.get(name)
    if found is None:
        raise HostDiffers(f"{name} is not loaded")
    return found


def check() -> None:
    """Look for everything that registration touches.

    Raises:
        HostDiffers: something is missing, or another loader has our names already.
    """
    # Version 3, whose modules are others, has these loaders of its own: that is the reason then.
    tables = module("modules.loaders")
    for table in ("loaders_and_params", "loaders_samplers"):
        taken = [name for name in LOADERS if name in getattr(tables, table, ())]
        if taken:
            raise HostDiffers(f"it has a loader {taken[0]} already (its own or another plugin's)")
    for name, attributes in _NEEDED.items():
        found = module(name)
        for attribute in attributes:
            if not hasattr(found, attribute):
                raise HostDiffers(f"it has no {name}.{attribute}")
    for table in (tables.loaders_and_params, tables.loaders_samplers):
        if not isinstance(table, dict):
            raise HostDiffers("its tables of loaders are not dicts")
    elements_module()


def elements_module() -> Any:
    """The module whose `list_model_elements` decides: `loaders` since v4.1, before it `ui`."""
    for name in ("modules.loaders", "modules.ui"):
        found = sys.modules.get(name)
        if found is not None and hasattr(found, "list_model_elements"):
            return found
    raise HostDiffers("it has no list_model_elements")


def holders(value: object) -> Iterator[tuple[ModuleType, str]]:
    """Every imported module that has this very object under some name."""
    for found in list(sys.modules.values()):
        if isinstance(found, ModuleType):
            for name, held in list(vars(found).items()):
                if held is value:
                    yield found, name


def model_path(model_name: str) -> Path:
    """Where a model of that name lies, as the web UI would find it."""
    utils = sys.modules.get("modules.utils")
    if hasattr(utils, "resolve_model_path"):
        return Path(utils.resolve_model_path(model_name))  # type: ignore[union-attr]
    return Path(module("modules.shared").args.model_dir) / model_name


def default_ctx_size() -> int:
    """What the web UI loads our models with where its context is 0; 0 leaves it to the plan."""
    # Since v4.1 `load_model` says so itself, for all loaders but one.
    code = getattr(getattr(module("modules.models"), "load_model", None), "__code__", None)
    return _DEFAULT_CTX_SIZE if _DEFAULT_CTX_SIZE in getattr(code, "co_consts", ()) else 0


class Patches:
    """Changes to the web UI that can all be taken back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        if name in vars(owner):
            old = vars(owner)[name]
            self._undo.append(lambda: setattr(owner, name, old))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def put(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Add a key that is not there yet."""
        table[key] = value
        self._undo.append(lambda: table.pop(key, None))

    def replace(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Put a function in another's place, in every module that imported it by value."""
        for owner, name in holders(old):
            if inspect.ismodule(owner):
                self.set(owner, name, new)

    def code(self, function: Any, code: Any) -> None:
        """Give a function another body; who holds the function runs it."""
        old = function.__code__
        self._undo.append(lambda: setattr(function, "__code__", old))
        function.__code__ = code

    def later(self, undo: Callable[[], None]) -> None:
        """Have something else done when all is taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take everything back, the last change first."""
        while self._undo:
            self._undo.pop()()
