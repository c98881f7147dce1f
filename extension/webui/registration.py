"""Registers the loaders with text-generation-webui.

All or nothing: first everything that the web UI must have is looked for, and if a step fails,
the steps before it are taken back. The web UI then runs as if the plugin were not installed, and
one line in its log has the reason. Registering again, as every restart of the page does, changes
nothing. docs/webui.md has the order in which all this happens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from exl_loader import ExlLoaderError
from exl_loader.checkpoint.model_class import has_unknown_class

from ..panel import loads, panel
from ..panel.panel import AS_LLAMA
from ..patching import Patches
from . import (
    api,
    contract,
    folders,
    loading,
    loras,
    model_tab,
    options,
    patching,
    problems,
    text_generation,
)
from .contract import LOADERS, ROPE_OPTIONS, WebuiDiffers, say
from .patching import watcher

_patches = Patches()
_registered: bool | None = None


def register() -> bool:
    """Add the loaders to the web UI, to its modules of now and to those it imports later.

    Returns:
        whether they were added; if not, one line in the log has the reason.
    """
    global _registered
    if _registered is not None:
        return _registered
    try:
        contract.check()
        options.add_loaders(_patches)
        _log_warnings()
        _extend_functions()
        _watch_later_modules()
        _registered = True
    except Exception as error:
        _patches.undo()
        watcher.stop()
        kind = "" if isinstance(error, WebuiDiffers) else f"{type(error).__name__}: "
        say(f"the loader was not added to this web UI: {kind}{error}")
        _registered = False
    return _registered


def unregister() -> None:
    """Take everything back."""
    global _registered
    _patches.undo()
    watcher.stop()
    watcher.after.clear()
    watcher.around.clear()
    _registered = None


class _WebuiLog(logging.Handler):
    """Writes records into the web UI's log, under the plugin's name."""

    def emit(self, record: logging.LogRecord) -> None:
        is_error = record.levelno >= logging.ERROR
        say(record.getMessage(), level="error" if is_error else "warning")


def _log_warnings() -> None:
    """Write the engine's warnings into the web UI's log; without a handler Python prints them."""
    handler, logger = _WebuiLog(logging.WARNING), loads.logger
    logger.addHandler(handler)
    _patches.later(lambda: logger.removeHandler(handler))
    _patches.set(logger, "propagate", False)
    # The web UI sets other loggers to errors only.
    level = logger.level
    logger.setLevel(logging.WARNING)
    _patches.later(lambda: logger.setLevel(level))


def _extend_functions() -> None:
    models = contract.module("modules.models")
    shared = contract.module("modules.shared")
    settings = contract.module("modules.models_settings")
    names = {name: f"_exl_loader_{name}" for name in LOADERS}
    functions = (loading.load_native, loading.load_hf)
    for name, function in zip(LOADERS, functions, strict=True):
        _patches.set(models, names[name], function)
    patching.add_dict_entries(_patches, models.load_model, "load_func_map", names)
    _patches.replace(settings.infer_loader, folders.choosing_ours(settings.infer_loader))
    _patches.replace(shared.fix_loader_name, _fix_loader_name(shared.fix_loader_name))
    if not shared.args.loader and shared.original_args.loader:
        _patches.set(shared.args, "loader", shared.fix_loader_name(shared.original_args.loader))
    _keep_cache_flags(shared)
    metadata = getattr(settings, "get_model_metadata", None)
    if metadata is not None:
        naming = problems.naming_the_file(metadata)
        _patches.replace(metadata, folders.with_own_length(naming))
    _patches.replace(shared.load_user_config, _load_user_config(shared.load_user_config))
    if isinstance(getattr(shared, "user_config", None), dict):
        options.with_current_values(shared.user_config)
    apply = getattr(settings, "apply_model_settings_to_state", None)
    if apply is not None:
        _patches.replace(apply, _apply_model_settings(apply))
    idle = getattr(models, "load_model_if_idle_unloaded", None)
    if idle is not None:
        _patches.replace(idle, lambda: loading.reload_idle(idle))


def _keep_cache_flags(shared: Any) -> None:
    """Let `--cache-8bit` override a cache type saved for the model, as other flags do."""
    provided = getattr(shared, "provided_arguments", None)
    names = panel.Toggles._fields
    if not isinstance(provided, list) or not any(name in provided for name in names):
        return
    args = shared.args
    for name, value in loading.toggles_of(args)._asdict().items():
        # A cache type that is not the default keeps the web UI's spelling.
        if name != "cache_type" or args.cache_type == panel.DEFAULT_CACHE_TYPE:
            _patches.set(args, name, value)
    missing = [name for name in names if name not in provided]
    _patches.set(shared, "provided_arguments", [*provided, *missing])


def _fix_loader_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def fix_loader_name(name: str | None) -> Any:
        return (contract.loader_name(name) if name else None) or original(name)

    return fix_loader_name


def _load_user_config(original: Callable[[], Any]) -> Callable[[], Any]:
    def load_user_config() -> Any:
        return options.with_current_values(original())

    return load_user_config


def _apply_model_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_model_settings_to_state(model: str, state: dict[str, Any]) -> Any:
        """Show a loaded model as it was loaded; the page takes its options from here."""
        # RoPE scaling chosen for one model must not stay for the next, nor its architecture.
        asked = contract.module("modules.shared").original_args
        begun = {name: getattr(asked, name) for name in ROPE_OPTIONS}
        begun[AS_LLAMA] = asked.as_llama and has_unknown_class(contract.model_path(model))
        state.update({name: value for name, value in begun.items() if name in state})
        try:
            state = original(model, state)
        except ExlLoaderError as error:
            # The fields keep their values; the gauge shows the same error.
            problems.notice(str(error))
        found = loading.page_values(model)
        state.update({name: value for name, value in found.items() if name in state})
        return state

    return apply_model_settings_to_state


def _watch_later_modules() -> None:
    """Extend modules that the web UI imports after registration, and those already there."""
    later: dict[str, Callable[[Patches, ModuleType], None]] = {
        "modules.text_generation": text_generation.extend,
        "modules.LoRA": loras.extend,
        "modules.ui_model_menu": model_tab.extend,
        "modules.logits": text_generation.extend_logits,
        "modules.chat": text_generation.extend_chat,
        "modules.transformers_loader": api.keep_logprobs,
    }
    for package in ("modules.api", "extensions.openai"):
        later |= {
            f"{package}.completions": api.extend_completions,
            f"{package}.models": api.extend_models,
            f"{package}.script": api.extend_script,
        }
    for name, extend in later.items():
        found = sys.modules.get(name)
        watcher.after[name] = lambda module, extend=extend: extend(_patches, module)
        if found is not None:
            if watcher.is_initializing(name):
                raise WebuiDiffers(f"it imports {name} in an order that is not known")
            watcher.call(name, found)
    watcher.start()
