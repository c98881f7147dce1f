"""What the web UI learns of a model folder when it is chosen: its loader and its context."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exl_loader import ExlLoaderError
from exl_loader.checkpoint import is_quantised
from exl_loader.checkpoint.model_class import has_unknown_class
from exl_loader.utils.json_keys import read_json_object_if_there

from ..panel.panel import ModelChoice
from . import contract
from .contract import DEFAULT_CTX_SIZE, LOADERS

_TRANSFORMERS = "Transformers"

# What the web UI sets of a model's length: the context to load, and the length itself.
_CTX_SIZE, _LENGTHS = "ctx_size", ("truncation_length", "truncation_length_info")


def choosing_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the web UI's choice of a loader: ours for the folders that Transformers cannot load.

    These are EXL2 and GPTQ folders, and unquantised ones of a class that this engine has and
    transformers has not.
    """

    @functools.wraps(original)
    def infer_loader(model_name: str, *args: Any, **kwargs: Any) -> Any:
        loader = original(model_name, *args, **kwargs)
        if loader != _TRANSFORMERS:
            return loader
        path = contract.model_path(model_name)
        # Transformers would load an EXL2 folder silently and with random weights.
        return LOADERS[0] if is_quantised(path) or _needs_own_code(path) else loader

    return infer_loader


def _needs_own_code(path: Path) -> bool:
    """Return whether transformers needs the Python code of a folder that this engine can read.

    Where the user trusts such code (`--trust-remote-code`), Transformers keeps the folder.
    """
    if getattr(contract.module("modules.shared").args, "trust_remote_code", False):
        return False
    try:
        values = read_json_object_if_there(path / "config.json")
    except ExlLoaderError:
        return False
    # An unquantised folder that transformers knows brings no code, or older code that
    # transformers does not use.
    if not values.get("auto_map") or has_unknown_class(path) or not any(path.glob("*.safetensors")):
        return False
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return True
    return str(values.get("model_type")) not in CONFIG_MAPPING_NAMES


def with_own_length(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the web UI's reading of a folder: the context follows the model's own length.

    The web UI knows some names of the length and no RoPE scaling, and takes 8192 tokens where it
    finds none, which may be more than the model has. Saved settings stay as they are.
    """

    @functools.wraps(original)
    def get_model_metadata(model: str, *args: Any, **kwargs: Any) -> Any:
        settings = original(model, *args, **kwargs)
        loader = settings.get("loader")
        if loader not in (*LOADERS, _TRANSFORMERS):
            return settings
        path = contract.model_path(model)
        try:
            choice = ModelChoice.from_values(settings)
            length = choice.stretched_length(path)
        except (ExlLoaderError, OSError):
            return settings
        # Transformers has no use for ctx_size, so it is already there if one of ours is chosen.
        found = {_CTX_SIZE: min(length, DEFAULT_CTX_SIZE)}
        if loader in LOADERS:
            found |= dict.fromkeys(_LENGTHS, length)
        saved = _saved_names(model)
        settings.update({
            name: value for name, value in found.items()
            if name in settings and name not in saved
        })
        return settings

    return get_model_metadata


def _saved_names(model: str) -> set[str]:
    """Return the names of the settings that the user has saved for a model."""
    config = getattr(contract.module("modules.shared"), "user_config", None) or {}
    name = Path(model).name.lower()
    return {
        key for pattern, saved in config.items() if re.match(pattern.lower(), name) for key in saved
    }
