"""Loads models for the web UI: one at a time, the previous one's memory given back first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from exl_loader.utils.progress import default_progress

from ..panel.load_progress import WatchedProgress
from ..panel.panel import LoadOptions, Toggles, resolve_cache_type, toggles_for
from . import host, notices, problems

if TYPE_CHECKING:
    from exl_loader.engine import LoadedModel

T = TypeVar("T")


@dataclass(frozen=True)
class LastLoad:
    """What was asked for, so that an idle reload asks for the same.

    The page rewrites the web UI's options whenever it is opened or a model is selected.
    """

    model_name: str
    loader: str
    options: dict[str, Any]


# Held for a load and what the web UI does around it, so that two cannot interleave.
lock = threading.RLock()
# How far the load is that is running, and how many have begun: pages look at both.
running: WatchedProgress | None = None
begun = 0
_loaded: LoadedModel | None = None
_loaded_as: LoadOptions | None = None
_warnings: list[str] = []
last_load: LastLoad | None = None


def current() -> LoadedModel | None:
    """The model that is loaded, None without one."""
    return _loaded


def release_unclaimed() -> None:
    """Give a model's memory back that the web UI did not take: it failed after our loader."""
    with lock:
        held = getattr(host.module("modules.shared").model, "loaded", None)
        if _loaded is not None and held is not _loaded:
            _loaded.unload()
            forget(_loaded)


def warnings() -> list[str]:
    """What was said of the model while it was loaded; nothing without one."""
    return list(_warnings) if _loaded is not None else []


def forget(loaded: LoadedModel) -> None:
    """Note that a model has been unloaded."""
    global _loaded
    with lock:
        if _loaded is loaded:
            _loaded = None


def options_for(model_name: str, loader: str, values: Mapping[str, Any]) -> LoadOptions:
    """Read load options from the web UI's values, under the web UI's names.

    A draft model is the native loader's: transformers' samplers draw token by token.
    """
    known = {"model_dir": str(host.model_path(model_name))}
    known |= {name: values.get(name) for name in _option_names(loader)}
    draft = str(known.get("model_draft") or "")
    known["model_draft"] = str(host.model_path(draft)) if _is_chosen(draft) else ""
    options = LoadOptions.from_values(known)
    return replace(options, ctx_size=options.ctx_size or host.default_ctx_size())


def _is_chosen(model_name: str) -> bool:
    """Whether a menu of models names one: its first entry is None."""
    return model_name.strip().lower() not in ("", "none")


def toggles_of(args: Any) -> Toggles:
    """What the web UI's options ask for, the toggles and the cache type in step."""
    return toggles_for(resolve_cache_type(args.cache_type, args.cache_8bit, args.cache_4bit))


def is_loaded_as(options: LoadOptions) -> bool:
    """Whether the model that is loaded is the one of these options."""
    return _loaded is not None and _loaded_as == options


def page_values(model_name: str) -> dict[str, Any]:
    """What the page's fields have to say of the model that is loaded; nothing of another one."""
    last, options = last_load, _loaded_as
    if _loaded is None or last is None or options is None or last.model_name != model_name:
        return {}
    kept = {name: value for name, value in last.options.items() if value is not None}
    return kept | {
        "loader": last.loader, "ctx_size": options.ctx_size, "alpha_value": options.alpha_value,
        "compress_pos_emb": options.compress_pos_emb, "gpu_split": options.gpu_split,
        **toggles_for(options.cache_type)._asdict(),
    }


def _show_in_later_pages(model_name: str) -> None:
    """Have pages that are opened from here on show the load, whoever asked for it."""
    shared = host.module("modules.shared")
    kept = getattr(shared, "persistent_interface_state", None)
    if isinstance(kept, dict) and not shared.args.multi_user:
        values = page_values(model_name)
        kept.update(values | {"truncation_length": values["ctx_size"]})


def idle_load() -> LastLoad | None:
    """The load of ours that the web UI has taken back because nobody used the model."""
    shared, last = host.module("modules.shared"), last_load
    is_idle = shared.args.idle_timeout > 0 and shared.model is None
    return last if is_idle and last is not None and last.model_name == shared.model_name else None


def reload_idle(original: Callable[[], None]) -> None:
    """Load again what was unloaded for idleness, as it was; once, however many ask for it."""
    args = host.module("modules.shared").args
    with lock:
        last = idle_load()
        if last is not None:
            args.loader = last.loader
            for name, value in last.options.items():
                setattr(args, name, value)
        original()


def load(model_name: str, loader: str, wrap: Callable[[LoadedModel], T]) -> T:
    """Load a model with the web UI's options; the one before gives its memory back first.

    Args:
        model_name: of its folder, as the web UI knows it. loader: one of ours.
        wrap: makes of it what the web UI wants.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing is held.
    """
    global _loaded, _loaded_as, _warnings, last_load
    import exl_loader

    args = host.module("modules.shared").args
    with lock, _watched() as progress:
        if _loaded is not None:
            _loaded.unload()
            _loaded = None
        problems.clear()
        values = {name: getattr(args, name, None) for name in _option_names(loader)}
        options = options_for(model_name, loader, values)
        with notices.collected() as found:
            loaded = exl_loader.load(
                options.model_dir, progress=progress, **options.load_arguments()
            )
        try:
            wrapped = wrap(loaded)
        except BaseException:
            loaded.unload()
            raise
        _warnings = found
        _loaded, _loaded_as = loaded, replace(options, ctx_size=loaded.ctx_size)
        # The web UI takes its truncation length from here.
        args.ctx_size = loaded.ctx_size
        last_load = LastLoad(model_name, loader, values | {"ctx_size": loaded.ctx_size})
        _show_in_later_pages(model_name)
        reserved, measured = loaded.reservation.total_bytes, loaded.allocated_bytes()
        host.say(f"{model_name}: {reserved:,} bytes reserved, {measured:,} measured", level="info")
        return wrapped


@contextmanager
def _watched() -> Iterator[WatchedProgress]:
    """Let pages see how far a load is, while the log hears of it as well."""
    global running, begun
    running = WatchedProgress(default_progress())
    begun += 1
    try:
        yield running
    finally:
        running = None


def _option_names(loader: str) -> tuple[str, ...]:
    draft = host.DRAFT_OPTIONS if loader == host.LOADERS[0] else ()
    return ("ctx_size", "cache_type", "gpu_split", *draft, *host.OPTION_DEFAULTS)
