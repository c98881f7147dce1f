"""Registers the loaders with text-generation-webui: the one place that touches its modules.

All or nothing: what the web UI must have is looked for first, and whatever fails takes back
what was done before it. The web UI then runs as if the plugin were not there, and one line in
its log says why. Registering again, as every restart of the page does, changes nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from exl_loader.utils.errors import ExlLoaderError

from ..panel import panel
from . import (
    api_errors,
    dispatch,
    hf_requests,
    host,
    host_loaders,
    host_panel,
    load_errors,
    loading,
    notices,
    problems,
    recognise,
    tables,
)
from .host import CHAT_STOPS, LOADERS, ROPE_OPTIONS, HostDiffers, Patches, say
from .saved_settings import with_current_values
from .watch import watcher

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
        tables.add_loaders(_patches)
        notices.write_to_host_log(_patches)
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


def _extend_functions() -> None:
    models = host.module("modules.models")
    shared = host.module("modules.shared")
    settings = host.module("modules.models_settings")
    names = {name: f"_exl_loader_{name}" for name in LOADERS}
    functions = (host_loaders.load_native, host_loaders.load_hf)
    for name, function in zip(LOADERS, functions, strict=True):
        _patches.set(models, names[name], function)
    dispatch.add_dict_entries(_patches, models.load_model, "load_func_map", names)
    _patches.replace(settings.infer_loader, _infer_loader(settings.infer_loader))
    _patches.replace(shared.fix_loader_name, _fix_loader_name(shared.fix_loader_name))
    if not shared.args.loader and shared.original_args.loader:
        _patches.set(shared.args, "loader", shared.fix_loader_name(shared.original_args.loader))
    _keep_cache_flags(shared)
    metadata = getattr(settings, "get_model_metadata", None)
    if metadata is not None:
        _patches.replace(metadata, load_errors.naming_the_file(metadata))
    _patches.replace(shared.load_user_config, _load_user_config(shared.load_user_config))
    if isinstance(getattr(shared, "user_config", None), dict):
        with_current_values(shared.user_config)
    apply = getattr(settings, "apply_model_settings_to_state", None)
    if apply is not None:
        _patches.replace(apply, _apply_model_settings(apply))
    idle = getattr(models, "load_model_if_idle_unloaded", None)
    if idle is not None:
        _patches.replace(idle, lambda: loading.reload_idle(idle))


def _keep_cache_flags(shared: Any) -> None:
    """Let `--cache-8bit` outweigh a cache type that was saved for the model, as any flag does."""
    provided = getattr(shared, "provided_arguments", None)
    names = panel.Toggles._fields
    if not isinstance(provided, list) or not any(name in provided for name in names):
        return
    args = shared.args
    for name, value in loading.toggles_of(args)._asdict().items():
        # The web UI's own type keeps its spelling.
        if name != "cache_type" or args.cache_type == panel.DEFAULT_CACHE_TYPE:
            _patches.set(args, name, value)
    missing = [name for name in names if name not in provided]
    _patches.set(shared, "provided_arguments", [*provided, *missing])


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
        return with_current_values(original())

    return load_user_config


def _apply_model_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_model_settings_to_state(model: str, state: dict[str, Any]) -> Any:
        """Show a model that is loaded as it was loaded; the page takes its options from here."""
        # What one model's text is stretched by is no other's.
        asked = host.module("modules.shared").original_args
        state.update({name: getattr(asked, name) for name in ROPE_OPTIONS if name in state})
        try:
            state = original(model, state)
        except ExlLoaderError as error:
            # The fields stay as they are; the gauge says the same of the folder.
            problems.notice(str(error))
        found = loading.page_values(model)
        state.update({name: value for name, value in found.items() if name in state})
        return state

    return apply_model_settings_to_state


def _watch_later_modules() -> None:
    later: dict[str, Callable[[ModuleType], None]] = {
        "modules.text_generation": _extend_generation,
        "modules.LoRA": _explain_lora,
        "modules.ui_model_menu": lambda module: host_panel.extend_menu(_patches, module),
        "modules.logits": _extend_logits,
        "modules.chat": _extend_chat,
        "modules.transformers_loader": _keep_logprobs,
    }
    for package in ("modules.api", "extensions.openai"):
        later |= {
            f"{package}.completions": _extend_completions,
            f"{package}.models": lambda module: api_errors.extend_models(_patches, module),
            f"{package}.script": lambda module: api_errors.extend_script(_patches, module),
        }
    for name, extend in later.items():
        found = sys.modules.get(name)
        watcher.after[name] = extend
        if found is not None:
            if watcher.is_initializing(name):
                raise HostDiffers(f"{name} is imported in an order that is new")
            watcher.call(name, found)
    watcher.start()


def _extend_generation(module: ModuleType) -> None:
    """Have errors of `ExLlamav2_HF` reported, a chat's stopping strings handed to `ExLlamav2`,
    and idle reloads guarded where they are local."""
    with_hf = module.generate_reply_HF

    def generate_reply_HF(*args: Any, **kwargs: Any) -> Iterator[Any]:
        model = host.module("modules.shared").model
        if not hasattr(model, "take_error"):
            yield from with_hf(*args, **kwargs)
            return
        try:
            yield from with_hf(*args, **kwargs)
        except Exception as error:
            named = hf_requests.named_error(error)
            problems.report(named)
            if named is error:
                raise
            raise named from error
        if getattr(model, "ended_by_length", False):
            problems.note_ending("length")
        for line in getattr(model, "take_notices", list)():
            problems.notice(line)
        error = model.take_error()
        if error is not None:
            problems.report(hf_requests.named_error(error))

    _patches.replace(with_hf, generate_reply_HF)
    _hand_over_stops(module)
    hf_requests.extend_lengths(_patches, module)
    # The API counts a prompt's tokens before it asks for an answer.
    _reload_before(module.generate_reply, module.encode, module.decode)


def _hand_over_stops(module: ModuleType) -> None:
    """Put the stopping strings of a chat, which models are not told of, into the state.

    The web UI looks for them in the text that is shown; a control token never stands there.
    """
    original = getattr(module, "generate_reply_custom", None)
    if original is None:
        return

    def generate_reply_custom(
        question: str, original_question: str, state: dict[str, Any],
        stopping_strings: Any = None, **options: Any,
    ) -> Iterator[Any]:
        state = state | {CHAT_STOPS: stopping_strings}
        return original(question, original_question, state, stopping_strings, **options)

    _patches.replace(original, generate_reply_custom)


def _extend_logits(module: ModuleType) -> None:
    _reload_before(module.get_next_logits)


def _reload_before(*functions: Callable[..., Any]) -> None:
    """Have an idle model of ours loaded again, as it was, by whoever needs it first (v4.2)."""
    if hasattr(host.module("modules.models"), "load_model_if_idle_unloaded"):
        return
    for function in functions:
        _patches.replace(function, _reloading(function))


def _reloading(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def reloading(*args: Any, **kwargs: Any) -> Any:
        loading.reload_idle(_reload)
        return function(*args, **kwargs)

    return reloading


def _extend_chat(module: ModuleType) -> None:
    """Let the page count the tokens of its own answer while it is written (v4.8 and later)."""
    original = getattr(module, "update_token_display_from_state", None)
    if original is None:
        return

    def update_token_display_from_state(*args: Any, **kwargs: Any) -> Any:
        model = host.module("modules.shared").model
        if hasattr(model, "read_as_page"):
            model.read_as_page()
        return original(*args, **kwargs)

    _patches.replace(original, update_token_display_from_state)


def _reload() -> None:
    shared = host.module("modules.shared")
    if loading.idle_load() is not None:
        shared.model, shared.tokenizer = host.module("modules.models").load_model(shared.model_name)


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
            say(message, level="error")
            return
        raise NotImplementedError(message)

    _patches.replace(original, add_lora_transformers)


def _extend_completions(module: ModuleType) -> None:
    """Have the API ask our loader for log probabilities, hand it biases, and tell its errors.

    It asks loaders by name since v4.1.
    """
    dispatch.extend_constant(_patches, module, _NATIVE_GATE, (*_NATIVE_GATE, LOADERS[0]))
    api_errors.extend_completions(_patches, module)


def _keep_logprobs(module: ModuleType) -> None:
    """Let log probabilities survive the copy that the web UI makes of a request (v4.0)."""
    processor = module.LogprobProcessor
    _patches.set(processor, "__deepcopy__", lambda self, memo: self)
