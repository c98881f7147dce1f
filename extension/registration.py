"""Registers the loaders with text-generation-webui: the one place that touches its modules.

All or nothing: what the web UI must have is looked for first, and whatever fails takes back
what was done before it. The web UI then runs as if the plugin were not there, and one line in
its log says why. Registering again, as every restart of the page does, changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from . import dispatch, host, host_panel, loading, recognise
from .early import is_initializing, watcher
from .host import LOADERS, OPTION_DEFAULTS, HostDiffers, Patches, say
from .request import SAMPLERS

# The loaders' ids in `modules.loaders`: the web UI's own options, then ours.
_OPTIONS = ("ctx_size", "cache_type", "gpu_split", *OPTION_DEFAULTS)

# Sampler ids of the page that this engine has besides those that are settings by their name.
_MORE_SAMPLERS = {"auto_max_new_tokens", "add_bos_token"}

# The loaders that the API asks for log probabilities and hands biases to.
_NATIVE_GATE = ("llama.cpp", "ExLlamav3")

_patches = Patches()
_registered: bool | None = None


def register() -> bool:
    """Add the loaders to the web UI, now and in what it imports later.

    Returns:
        whether they are there; where not, one line in the log has said why.
    """
    global _registered
    if _registered is not None:
        return _registered
    try:
        host.check()
        _add_tables()
        _extend_functions()
        _watch_later_modules()
        _registered = True
    except Exception as error:
        _patches.undo()
        watcher.stop()
        kind = "" if isinstance(error, HostDiffers) else f"{type(error).__name__}: "
        say(f"the loader stays out of this web UI: {kind}{error}")
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


def remove_options() -> None:
    """Take our options out of the page's lists, where their components could not be made.

    Every id in these lists has to have a component when the page is wired.
    """
    tables = host.module("modules.loaders")
    shared = host.module("modules.shared")
    inputs = getattr(shared, "input_elements", None)
    for loader in LOADERS:
        params = tables.loaders_and_params[loader]
        params[:] = [name for name in params if name not in _page_ids()]
    if isinstance(inputs, list):
        inputs[:] = [name for name in inputs if name not in OPTION_DEFAULTS]
    _page_options.clear()
    _clear_caches()


# Our options as the page's lists have them; emptied where the page could not take them.
_page_options: list[str] = list(OPTION_DEFAULTS)


def _page_ids() -> set[str]:
    return {*OPTION_DEFAULTS, *host_panel.PANEL_IDS}


def _add_tables() -> None:
    tables = host.module("modules.loaders")
    shared = host.module("modules.shared")
    known = set().union(*tables.loaders_samplers.values())
    native = {name for name in SAMPLERS | _MORE_SAMPLERS if name in known}
    like_hf = tables.loaders_samplers.get("ExLlamav3_HF") or tables.loaders_samplers["Transformers"]
    options = [*_OPTIONS, *host_panel.PANEL_IDS]
    _patches.later(_clear_caches)
    for name, samplers, params in zip(
        LOADERS, (native, set(like_hf)), (options, [*options, "no_use_fast"]), strict=True
    ):
        _patches.put(tables.loaders_and_params, name, params)
        _patches.put(tables.loaders_samplers, name, samplers)
    for namespace in (shared.args, shared.original_args, shared.args_defaults):
        for name, default in OPTION_DEFAULTS.items():
            if not hasattr(namespace, name):
                _patches.set(namespace, name, default)
    owner = host.elements_module()
    original = owner.list_model_elements
    _patches.replace(original, lambda: [*original(), *_page_options])
    _clear_caches()


def _clear_caches() -> None:
    tables = host.module("modules.loaders")
    for name in ("get_all_params", "list_all_samplers", "list_model_elements"):
        clear = getattr(getattr(tables, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _extend_functions() -> None:
    models = host.module("modules.models")
    shared = host.module("modules.shared")
    settings = host.module("modules.models_settings")
    names = {name: f"_exl_loader_{name}" for name in LOADERS}
    for name, function in zip(LOADERS, (loading.load_native, loading.load_hf), strict=True):
        _patches.set(models, names[name], function)
    dispatch.add_dict_entries(_patches, models.load_model, "load_func_map", names)
    _patches.replace(settings.infer_loader, _infer_loader(settings.infer_loader))
    _patches.replace(shared.fix_loader_name, _fix_loader_name(shared.fix_loader_name))
    if not shared.args.loader and shared.original_args.loader:
        _patches.set(shared.args, "loader", shared.fix_loader_name(shared.original_args.loader))
    _patches.replace(shared.load_user_config, _load_user_config(shared.load_user_config))
    if isinstance(getattr(shared, "user_config", None), dict):
        _with_current_names(shared.user_config)
    idle = getattr(models, "load_model_if_idle_unloaded", None)
    if idle is not None:
        _patches.replace(idle, lambda: loading.reload_idle(idle))


def _infer_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    def infer_loader(model_name: str, *args: Any, **kwargs: Any) -> Any:
        loader = original(model_name, *args, **kwargs)
        # Without this the web UI hands EXL2 weights to Transformers, which makes up its own.
        if loader == "Transformers" and recognise.is_quantised(host.model_path(model_name)):
            return LOADERS[0]
        return loader

    return infer_loader


def _fix_loader_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def fix_loader_name(name: str | None) -> Any:
        return (recognise.loader_name(name) if name else None) or original(name)

    return fix_loader_name


def _load_user_config(original: Callable[[], Any]) -> Callable[[], Any]:
    def load_user_config() -> Any:
        return _with_current_names(original())

    return load_user_config


def _with_current_names(config: Any) -> Any:
    """Give settings saved for our loaders by old versions the names of today."""
    for saved in config.values() if isinstance(config, dict) else ():
        if isinstance(saved, dict) and saved.get("loader") in LOADERS and "max_seq_len" in saved:
            saved.setdefault("ctx_size", saved["max_seq_len"])
    return config


def _watch_later_modules() -> None:
    later: dict[str, Callable[[ModuleType], None]] = {
        "modules.LoRA": _explain_lora,
        "modules.ui_model_menu": lambda module: host_panel.extend_menu(_patches, module),
        "modules.transformers_loader": _keep_logprobs,
        "modules.api.completions": _open_native_gate,
        "extensions.openai.completions": _open_native_gate,
    }
    for name, extend in later.items():
        found = sys.modules.get(name)
        watcher.after[name] = extend
        if found is not None:
            if is_initializing(found):
                raise HostDiffers(f"{name} is imported in an order that is new")
            watcher.call(name, found)
    watcher.start()


def _explain_lora(module: ModuleType) -> None:
    original = module.add_lora_transformers

    def add_lora_transformers(lora_names: list[str]) -> None:
        shared = host.module("modules.shared")
        model = shared.model
        if getattr(model, "loaded", None) is None or model.loaded is not loading.current():
            original(lora_names)
            return
        if not lora_names:
            return
        message = f"{shared.args.loader} does not support LoRAs yet; none was applied"
        if shared.generation_lock is None:
            # `--lora`: the web UI is not up yet, and would not come up.
            say(message, error=True)
            return
        raise NotImplementedError(message)

    _patches.replace(original, add_lora_transformers)


def _open_native_gate(module: ModuleType) -> None:
    """Have the API ask our loader for log probabilities and hand it biases (v4.1 and later)."""
    dispatch.extend_constant(_patches, module, _NATIVE_GATE, (*_NATIVE_GATE, LOADERS[0]))


def _keep_logprobs(module: ModuleType) -> None:
    """Let log probabilities survive the copy that the web UI makes of a request (v4.0)."""
    processor = module.LogprobProcessor
    _patches.set(processor, "__deepcopy__", lambda self, memo: self)
