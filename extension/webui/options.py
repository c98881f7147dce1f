"""Our loaders and their options in the web UI's tables and in its saved settings."""

from __future__ import annotations

from typing import Any

from exl_loader import InvalidSettings

from ..panel.panel import DEFAULT_CACHE_TYPE, ModelChoice, plain_cache_type, toggles_for
from ..patching import Patches
from . import contract
from .contract import DRAFT_OPTIONS, LOADERS, OPTION_DEFAULTS, PANEL_IDS, say
from .request import SAMPLERS

# Options of the web UI's own that both loaders have.
_SHARED_OPTIONS = ("ctx_size", "cache_type", "gpu_split")

# Components around the draft options in the page; the last two exist since v4.8.
_DRAFT_SURROUNDINGS = ("speculative_decoding_accordion", "draft_model_header",
                       "model_draft_refresh")

# Sampler ids of the page that this engine supports and that are not fields of SamplingSettings.
_MORE_SAMPLERS = frozenset({"auto_max_new_tokens", "add_bos_token", "grammar_file_row"})

# Our options in the page's lists; emptied when the page could not get their components.
_page_options: list[str] = []

# Loaders that earlier versions of the web UI had for these models. Today it fails with a
# KeyError when a saved setting names one of them.
RETIRED = ("AutoGPTQ", "ExLlama", "ExLlama_HF", "GPTQ-for-LLaMa")

_CACHE_OPTIONS = ("cache_type", "cache_8bit", "cache_4bit")


def add_loaders(patches: Patches) -> None:
    """Add the loaders with their options and samplers to the web UI's tables."""
    tables = contract.module("modules.loaders")
    patches.later(_clear_caches)
    for name, params, samplers in (
        (LOADERS[0], _native_options(tables), _native_samplers(tables)),
        (LOADERS[1], [*_SHARED_OPTIONS, *OPTION_DEFAULTS, *PANEL_IDS, "no_use_fast"],
         _hf_samplers(tables)),
    ):
        patches.put(tables.loaders_and_params, name, params)
        patches.put(tables.loaders_samplers, name, samplers)
    _add_option_values(patches)
    _page_options[:] = OPTION_DEFAULTS
    original = contract.elements_module().list_model_elements
    patches.replace(original, lambda: [*original(), *_page_options])
    _clear_caches()


def remove_options() -> None:
    """Remove our options from the page's lists when their components could not be made.

    Every id in these lists must have a component when the page is wired.
    """
    tables = contract.module("modules.loaders")
    inputs = getattr(contract.module("modules.shared"), "input_elements", None)
    gone = {*OPTION_DEFAULTS, *PANEL_IDS}
    for loader in LOADERS:
        params = tables.loaders_and_params[loader]
        params[:] = [name for name in params if name not in gone]
    if isinstance(inputs, list):
        inputs[:] = [name for name in inputs if name not in OPTION_DEFAULTS]
    _page_options.clear()
    _clear_caches()


def _native_options(tables: Any) -> list[str]:
    """Return the native loader's ids; of the draft options only those that the page has."""
    known = set().union(*tables.loaders_and_params.values())
    draft = [name for name in (*DRAFT_OPTIONS, *_DRAFT_SURROUNDINGS) if name in known]
    return [*_SHARED_OPTIONS, *OPTION_DEFAULTS, *PANEL_IDS, *draft]


def _native_samplers(tables: Any) -> set[str]:
    known = set().union(*tables.loaders_samplers.values())
    return {name for name in SAMPLERS | _MORE_SAMPLERS if name in known}


def _hf_samplers(tables: Any) -> set[str]:
    samplers = tables.loaders_samplers
    return set(samplers.get("ExLlamav3_HF") or samplers["Transformers"])


def _add_option_values(patches: Patches) -> None:
    shared = contract.module("modules.shared")
    for namespace in (shared.args, shared.original_args, shared.args_defaults):
        for name, default in OPTION_DEFAULTS.items():
            if not hasattr(namespace, name):
                patches.set(namespace, name, default)


def _clear_caches() -> None:
    tables = contract.module("modules.loaders")
    for name in ("get_all_params", "list_all_samplers", "list_model_elements"):
        clear = getattr(getattr(tables, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def with_current_values(config: Any) -> Any:
    """Update settings saved for our loaders, and for the loaders before them, in place.

    The web UI copies saved settings into its page and its options key by key, and a key that
    is missing keeps the value of the model before. All other entries stay as they are, those
    with unknown loaders too, because another plugin may bring such a loader.

    Args:
        config: model pattern -> its settings, as the web UI has read them.
    """
    for pattern, saved in config.items() if isinstance(config, dict) else ():
        if isinstance(saved, dict) and saved.get("loader") in (*LOADERS, *RETIRED):
            try:
                saved.update(_current(saved))
            except InvalidSettings as error:
                # A load with these settings is refused and names the wrong one.
                say(f"the settings saved for {pattern} were left unchanged: {error}")
            if saved["loader"] in RETIRED:
                # The folder decides which loader reads it today.
                del saved["loader"]
    return config


def _current(saved: dict[str, Any]) -> dict[str, Any]:
    """Return what to set: today's names, real numbers, toggles that match the cache type."""
    changed: dict[str, Any] = {}
    if "max_seq_len" in saved:
        changed["ctx_size"] = saved.get("ctx_size", saved["max_seq_len"])
    options = ModelChoice.from_values(saved | changed)
    for name in ("ctx_size", "cache_size", "alpha_value", "compress_pos_emb", "chunk_size"):
        if name in saved or name in changed:
            # The web UI writes 0 for a context that is left to the loader.
            changed[name] = getattr(options, name) or 0
    if any(name in saved for name in _CACHE_OPTIONS):
        # If only one of the three were set, another model's toggle would stay on.
        changed |= toggles_for(options.cache_type)._asdict()
        named = str(saved.get("cache_type") or DEFAULT_CACHE_TYPE)
        if plain_cache_type(named) != DEFAULT_CACHE_TYPE:
            changed["cache_type"] = saved["cache_type"]
    return changed
