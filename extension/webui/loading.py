"""Loads models for the web UI: one at a time, after the previous model has freed its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from exl_loader import InvalidTokenizer
from exl_loader.utils.progress import default_progress

from ..panel.loads import WatchedProgress, collected_warnings
from ..panel.panel import AS_LLAMA, ModelChoice, Toggles, resolve_cache_type, toggles_for
from . import contract, problems
from .contract import DRAFT_OPTIONS, LOADERS, OPTION_DEFAULTS, say

if TYPE_CHECKING:
    from exl_loader import LoadedModel

T = TypeVar("T")


@dataclass(frozen=True)
class LastLoad:
    """What the last load was asked for, so that an idle reload can ask for the same.

    The page overwrites the web UI's options whenever it is opened or a model is selected.
    """

    model_name: str
    loader: str
    options: dict[str, Any]


# Held during a load and what the web UI does around it, so that two cannot interleave.
lock = threading.RLock()
# The progress of the load that is running, and the number of loads begun: pages look at both.
running: WatchedProgress | None = None
begun = 0
_loaded: LoadedModel | None = None
_loaded_as: ModelChoice | None = None
_warnings: list[str] = []
last_load: LastLoad | None = None
# The LoRAs of the next load: the web UI calls its loaders with a model's name alone.
_next_loras: Sequence[str] = ()
# The LoRAs of the model that was loaded last, for an idle reload.
_loras: Sequence[str] = ()


def current() -> LoadedModel | None:
    """Return the model that is loaded, None if there is none."""
    return _loaded


def is_loaded_as(options: ModelChoice) -> bool:
    """Return whether a model is loaded with exactly these options."""
    return _loaded is not None and _loaded_as == options


def loaded_as() -> ModelChoice:
    """Return the options of the model that is loaded, without its LoRAs."""
    assert _loaded is not None and _loaded_as is not None
    return _loaded_as


def note_loras(loras: Sequence[str]) -> None:
    """Note which LoRAs the model has, for an idle reload and for what the web UI shows."""
    global _loras
    _loras = tuple(loras)
    contract.module("modules.shared").lora_names = [Path(path).name for path in loras]


def warnings() -> list[str]:
    """Return the warnings given while the current model was loaded; empty without a model."""
    return list(_warnings) if _loaded is not None else []


def forget(loaded: LoadedModel) -> None:
    """Note that a model has been unloaded."""
    global _loaded
    with lock:
        if _loaded is loaded:
            _loaded = None


def release_unclaimed() -> None:
    """Unload a model that the web UI did not take, because it failed after our loader."""
    with lock:
        held = getattr(contract.module("modules.shared").model, "loaded", None)
        if _loaded is not None and held is not _loaded:
            _loaded.unload()
            forget(_loaded)


# ---- The loaders, as the web UI calls them ----


def load_native(model_name: str) -> tuple[Any, Any]:
    """Load for `ExLlamav2`, with this engine's own generation.

    Returns:
        model and tokenizer.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing stays allocated.
    """
    from .native_model import Exllamav3Model

    model = load(model_name, LOADERS[0], Exllamav3Model)
    return model, model


def load_hf(model_name: str) -> Any:
    """Load for `ExLlamav2_HF`, with transformers' generation. The web UI adds a tokenizer.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing stays allocated. InvalidTokenizer:
            the folder has no tokenizer.
    """
    from .hf_model import Exllamav3HF

    def with_tokenizer(loaded: LoadedModel) -> Exllamav3HF:
        if not loaded.has_tokenizer:
            raise InvalidTokenizer(
                f"{LOADERS[1]} with {model_name}", expected="a folder with a tokenizer",
                actual="one without tokenizer files",
                remedy="Copy the tokenizer files of the original model into the folder",
            )
        return Exllamav3HF(loaded)

    return load(model_name, LOADERS[1], with_tokenizer)


def load(model_name: str, loader: str, wrap: Callable[[LoadedModel], T]) -> T:
    """Load a model with the web UI's options, after unloading the previous one.

    Args:
        model_name: name of its folder, as the web UI knows it. loader: one of ours.
        wrap: turns the loaded model into what the web UI expects.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing stays allocated.
    """
    global _loaded, _loaded_as, _warnings, last_load, _loras, _next_loras
    import exl_loader

    args = contract.module("modules.shared").args
    with lock, _watched() as progress:
        if _loaded is not None:
            _loaded.unload()
            _loaded = None
        problems.clear()
        values = {name: getattr(args, name, None) for name in _option_names(loader)}
        options = options_for(model_name, loader, values)
        loras, _next_loras, _loras = _next_loras, (), ()
        with collected_warnings() as found:
            loaded = exl_loader.load(
                options.model_dir, progress=progress, **options.for_load(),
                **({"loras": loras} if loras else {}),
            )
        try:
            wrapped = wrap(loaded)
        except BaseException:
            loaded.unload()
            raise
        _warnings = found
        _loras = loras
        _loaded, _loaded_as = loaded, replace(options, ctx_size=loaded.ctx_size)
        # The web UI reads its truncation length from here.
        args.ctx_size = loaded.ctx_size
        last_load = LastLoad(model_name, loader, values | {"ctx_size": loaded.ctx_size})
        _show_in_later_pages(model_name)
        reserved, measured = loaded.reservation.total_bytes, loaded.allocated_bytes()
        say(f"{model_name}: {reserved:,} bytes reserved, {measured:,} measured", level="info")
        return wrapped


@contextmanager
def _watched() -> Iterator[WatchedProgress]:
    """Show the progress of a load in pages and in the log."""
    global running, begun
    running = WatchedProgress(default_progress())
    begun += 1
    try:
        yield running
    finally:
        running = None


# ---- Options ----


def options_for(model_name: str, loader: str, values: Mapping[str, Any]) -> ModelChoice:
    """Read load options from the web UI's values, under the web UI's names.

    Only the native loader takes a draft model, because transformers draws token by token.
    """
    known = {"model_dir": str(contract.model_path(model_name))}
    known |= {name: values.get(name) for name in _option_names(loader)}
    draft = str(known.get("model_draft") or "")
    known["model_draft"] = str(contract.model_path(draft)) if _is_chosen(draft) else ""
    options = ModelChoice.from_values(known)
    return replace(options, ctx_size=options.ctx_size or contract.default_ctx_size() or None)


def _option_names(loader: str) -> tuple[str, ...]:
    draft = DRAFT_OPTIONS if loader == LOADERS[0] else ()
    return ("ctx_size", "cache_type", "gpu_split", *draft, *OPTION_DEFAULTS)


def _is_chosen(model_name: str) -> bool:
    """Return whether a menu of models has one chosen: its first entry is None."""
    return model_name.strip().lower() not in ("", "none")


def toggles_of(args: Any) -> Toggles:
    """Return the toggles and the cache type that the web UI's options ask for, in step."""
    return toggles_for(resolve_cache_type(args.cache_type, args.cache_8bit, args.cache_4bit))


def page_values(model_name: str) -> dict[str, Any]:
    """Return what the page's fields must show for the loaded model; empty for another one."""
    last, options = last_load, _loaded_as
    if _loaded is None or last is None or options is None or last.model_name != model_name:
        return {}
    kept = {name: value for name, value in last.options.items() if value is not None}
    return kept | {
        "loader": last.loader, "ctx_size": options.ctx_size, "alpha_value": options.alpha_value,
        "compress_pos_emb": options.compress_pos_emb,
        "cache_size": options.cache_size, "chunk_size": options.chunk_size,
        "embedding_device": options.embedding_device, "machines": options.machines or "",
        AS_LLAMA: options.as_architecture is not None, "gpu_split": options.gpu_split or "",
        **toggles_for(options.cache_type)._asdict(),
    }


def _show_in_later_pages(model_name: str) -> None:
    """Let pages that are opened later show this load, even if the API asked for it."""
    shared = contract.module("modules.shared")
    kept = getattr(shared, "persistent_interface_state", None)
    if isinstance(kept, dict) and not shared.args.multi_user:
        values = page_values(model_name)
        kept.update(values | {"truncation_length": values["ctx_size"]})


# ---- Loading again ----


def reload(loras: Sequence[str]) -> None:
    """Load the current model again with other LoRAs, and with the options that it had.

    Raises:
        ExlLoaderError: what is wrong, in one line; no model is loaded then.
    """
    global _next_loras
    models, shared = contract.module("modules.models"), contract.module("modules.shared")
    with lock:
        last = last_load
        assert last is not None
        _ask_for(last)
        _next_loras = loras
        try:
            shared.model, shared.tokenizer = models.load_model(last.model_name, last.loader)
        except BaseException:
            shared.model = shared.tokenizer = None
            release_unclaimed()
            raise
        finally:
            _next_loras = ()


def _ask_for(last: LastLoad) -> None:
    """Let the web UI's options be those of a load."""
    args = contract.module("modules.shared").args
    args.loader = last.loader
    for name, value in last.options.items():
        setattr(args, name, value)


def idle_load() -> LastLoad | None:
    """Return the load of ours that the web UI has undone because the model was idle."""
    shared, last = contract.module("modules.shared"), last_load
    is_idle = shared.args.idle_timeout > 0 and shared.model is None
    return last if is_idle and last is not None and last.model_name == shared.model_name else None


def reload_idle(original: Callable[[], None]) -> None:
    """Reload an idle model with what it had; once, even if many requests ask for it."""
    global _next_loras
    with lock:
        last = idle_load()
        if last is None:
            original()
            return
        _ask_for(last)
        _next_loras = _loras
        try:
            original()
        finally:
            _next_loras = ()
        note_loras(_loras)
