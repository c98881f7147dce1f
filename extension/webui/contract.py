"""What this plugin expects of text-generation-webui, the names they share, and its log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..host_log import log_line

LOADERS = ("ExLlamav2", "ExLlamav2_HF")

# Spellings of ExLlamav2 that users type, in lower case and without separators.
_SPELLINGS = {"exllamav2", "exllama2", "exl2"}

# Key of a request's state under which `text_generation` passes on a chat's stopping strings.
CHAT_STOPS = "exl_loader_stopping_strings"

# The load options that the plugin adds: command line, API, saved settings and page have them.
OPTION_DEFAULTS: dict[str, Any] = {
    "cache_8bit": False,
    "cache_4bit": False,
    "alpha_value": 1.0,
    "compress_pos_emb": 1.0,
    "as_llama": False,
    "cache_size": 0,
    "chunk_size": 256,
    "embedding_device": "auto",
    "machines": "",
}

# The options of a model's memory that few people change.
MEMORY_OPTIONS = ("cache_size", "chunk_size", "embedding_device", "machines")

ROPE_OPTIONS = ("alpha_value", "compress_pos_emb")

# The web UI's own options of a draft model, which the native loader supports as well.
DRAFT_OPTIONS = ("model_draft", "ctx_size_draft", "draft_max")

# Id of the column around `as_llama`. The web UI does not know it, because it would show the column
# with every model.
AS_LLAMA_COLUMN = "exl_as_llama"

# Ids of components that are shown with our loaders but are not load options: the progress of a
# load, the gauge, the text field that the gauge's buttons write to, the text field whose
# `change` event draws the gauge, and the accordions around the fields of RoPE and of memory.
PROGRESS, GAUGE, PICK, ASK, ROPE, MEMORY = PANEL_IDS = (
    "exl_progress", "exl_gauge", "exl_pick", "exl_ask", "exl_rope", "exl_memory")

# Tokens of context that the web UI loads a model with unless it finds fewer.
DEFAULT_CTX_SIZE = 8192

# What the plugin replaces or extends. If any of these is missing, nothing is registered.
_NEEDED: dict[str, tuple[str, ...]] = {
    "modules.shared": ("args", "original_args", "args_defaults", "fix_loader_name",
                       "load_user_config"),
    "modules.loaders": ("loaders_and_params", "loaders_samplers", "get_all_params",
                        "list_all_samplers"),
    "modules.models_settings": ("infer_loader",),
    "modules.models": ("load_model", "unload_model"),
}


class WebuiDiffers(Exception):
    """The web UI is not one that this plugin supports; the message names the difference."""


def say(message: str, *, level: str = "warning") -> None:
    """Print one line in the web UI's log, or on stderr while there is no log yet.

    Args:
        level: a method of a logger, `info`, `warning` or `error`.
    """
    log_line(message, level, "modules.logging_colors", "logger")


def module(name: str) -> Any:
    """Return an imported module of the web UI; its import may still be running.

    Raises:
        WebuiDiffers: it has not been imported.
    """
    found = sys.modules.get(name)
    if found is None:
        raise WebuiDiffers(f"{name} is not loaded")
    return found


def check() -> None:
    """Look for everything that registration touches.

    Raises:
        WebuiDiffers: something is missing, or another loader already has one of our names.
    """
    # Version 3 has these loaders itself and other modules: the loaders are the reason to report.
    tables = module("modules.loaders")
    for table in ("loaders_and_params", "loaders_samplers"):
        taken = [name for name in LOADERS if name in getattr(tables, table, ())]
        if taken:
            raise WebuiDiffers(
                f"it already has a loader named {taken[0]} (its own or another plugin's)")
    for name, attributes in _NEEDED.items():
        found = module(name)
        for attribute in attributes:
            if not hasattr(found, attribute):
                raise WebuiDiffers(f"it has no {name}.{attribute}")
    for table in (tables.loaders_and_params, tables.loaders_samplers):
        if not isinstance(table, dict):
            raise WebuiDiffers("its tables of loaders are not dicts")
    elements_module()


def elements_module() -> Any:
    """Return the module that defines `list_model_elements`: `loaders` since v4.1, `ui` before.

    Raises:
        WebuiDiffers: neither has it.
    """
    for name in ("modules.loaders", "modules.ui"):
        found = sys.modules.get(name)
        if found is not None and hasattr(found, "list_model_elements"):
            return found
    raise WebuiDiffers("it has no list_model_elements")


def model_path(model_name: str) -> Path:
    """Return the path at which the web UI looks for a model of that name."""
    utils = sys.modules.get("modules.utils")
    if hasattr(utils, "resolve_model_path"):
        return Path(utils.resolve_model_path(model_name))  # type: ignore[union-attr]
    return Path(module("modules.shared").args.model_dir) / model_name


def default_ctx_size() -> int:
    """Return the context that the web UI loads our models with when its own is 0.

    0 means that the web UI has no default (v4.0), so the reservation decides.
    """
    # Since v4.1 `load_model` sets the default itself, for every loader except llama.cpp.
    code = getattr(getattr(module("modules.models"), "load_model", None), "__code__", None)
    return DEFAULT_CTX_SIZE if DEFAULT_CTX_SIZE in getattr(code, "co_consts", ()) else 0


def loader_name(text: object) -> str | None:
    """Return the loader that a user's spelling means; None if it is not one of ours.

    >>> loader_name("exllama-v2_hf")
    'ExLlamav2_HF'
    """
    if not isinstance(text, str):
        return None
    plain = "".join(c for c in text.lower() if c not in " -_.")
    native, hf = LOADERS
    if plain in _SPELLINGS:
        return native
    return hf if plain.endswith("hf") and plain[:-2] in _SPELLINGS else None
