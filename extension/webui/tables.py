"""The web UI's lists of loaders, of their options and of their samplers, with ours among them."""

from __future__ import annotations

from typing import Any

from . import host
from .host import DRAFT_OPTIONS, LOADERS, OPTION_DEFAULTS, PANEL_IDS, Patches
from .request import SAMPLERS

# Options of the web UI's own that both loaders have.
_SHARED_OPTIONS = ("ctx_size", "cache_type", "gpu_split")

# What the draft options lie in and beside, in the page; the last two since v4.8.
_DRAFT_SURROUNDINGS = ("speculative_decoding_accordion", "draft_model_header",
                       "model_draft_refresh")

# Sampler ids of the page that this engine has besides those that are settings by their name.
_MORE_SAMPLERS = frozenset({"auto_max_new_tokens", "add_bos_token", "grammar_file_row"})

# Our options as the page's lists have them; emptied where the page could not take them.
_page_options: list[str] = []


def add_loaders(patches: Patches) -> None:
    """Add the loaders with their options and samplers."""
    tables = host.module("modules.loaders")
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
    original = host.elements_module().list_model_elements
    patches.replace(original, lambda: [*original(), *_page_options])
    _clear_caches()


def remove_options() -> None:
    """Take our options out of the page's lists, where their components could not be made.

    Every id in these lists has to have a component when the page is wired.
    """
    tables = host.module("modules.loaders")
    inputs = getattr(host.module("modules.shared"), "input_elements", None)
    gone = {*OPTION_DEFAULTS, *PANEL_IDS}
    for loader in LOADERS:
        params = tables.loaders_and_params[loader]
        params[:] = [name for name in params if name not in gone]
    if isinstance(inputs, list):
        inputs[:] = [name for name in inputs if name not in OPTION_DEFAULTS]
    _page_options.clear()
    _clear_caches()


def _native_options(tables: Any) -> list[str]:
    """The native loader's ids: of the draft options those that the page has."""
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
    shared = host.module("modules.shared")
    for namespace in (shared.args, shared.original_args, shared.args_defaults):
        for name, default in OPTION_DEFAULTS.items():
            if not hasattr(namespace, name):
                patches.set(namespace, name, default)


def _clear_caches() -> None:
    tables = host.module("modules.loaders")
    for name in ("get_all_params", "list_all_samplers", "list_model_elements"):
        clear = getattr(getattr(tables, name, None), "cache_clear", None)
        if clear is not None:
            clear()
