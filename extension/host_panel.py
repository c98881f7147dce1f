"""The loader's part of the web UI's Model tab: toggles, RoPE fields, gauge, progress, errors."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from exl_loader.errors import ExlLoaderError
from exl_loader.progress import format_count

from . import host, load_errors, loading, panel, problems, tables
from .event_chain import EventChain, event_chains
from .gauge import PICK_ELEM_ID, gauge_html, message_html, task_html
from .host import (
    ASK,
    DRAFT_OPTIONS,
    GAUGE,
    LOADERS,
    PICK,
    ROPE_OPTIONS,
    HostDiffers,
    Patches,
)
from .page_script import draw_in_order, follow_pick, keep_in_step

# Fields that only the page's own script reads and writes.
_HIDE_FIELDS = f"<style>#{PICK_ELEM_ID}, #{ASK} {{ display: none !important; }}</style>"

# Whose clicks the gauge follows to their end.
_LOADING_BUTTONS = ("load_model", "unload_model")

# How often the page hears of a load that goes on.
_TICK_S = 0.2

# What the gauge draws: these are in every page, the others where the web UI has them; it
# dropped one in v4.8. The toggles are not among them, because cache_type says what they say.
_NEEDED_INPUTS = ("loader", "model_menu", "ctx_size", "cache_type", *ROPE_OPTIONS)
_MORE_INPUTS = ("gpu_split", *DRAFT_OPTIONS)


def extend_menu(patches: Patches, menu: ModuleType) -> None:
    """Add our components and events to the Model tab, and our progress to its Load button.

    Args:
        menu: `modules.ui_model_menu`, before it makes its components.

    Raises:
        AttributeError: it has other functions; what could be extended is, and the page comes up.
    """
    try:
        create_ui, create_events = menu.create_ui, menu.create_event_handlers
    except AttributeError:
        # The page would look for the components of our options, and not start.
        tables.remove_options()
        raise

    def create_ui_with_panel() -> None:
        create_ui()
        _safely(_insert_components)

    def create_events_with_panel() -> None:
        with event_chains(host.module("modules.shared").gradio, _LOADING_BUTTONS) as chains:
            create_events()
        if not host.module("modules.shared").args.multi_user:
            _safely(lambda: _connect(chains))

    patches.replace(create_ui, create_ui_with_panel)
    patches.replace(create_events, create_events_with_panel)
    wrapper = menu.load_model_wrapper
    patches.replace(wrapper, _load_wrapper(wrapper))
    loras = menu.load_lora_wrapper
    patches.replace(loras, _lora_wrapper(loras))


def _safely(step: Callable[[], None]) -> None:
    """Do a step; where it fails, the page comes up without our options."""
    try:
        step()
    except Exception as error:
        tables.remove_options()
        kind = "" if isinstance(error, HostDiffers) else f"{type(error).__name__}: "
        host.say(f"the Model tab stays without the options of ExLlamav2: {kind}{error}",
                 level="error")


def _insert_components() -> None:
    """Make the components and put them right below the cache type."""
    import gradio as gr

    shared = host.module("modules.shared")
    args, components = shared.args, shared.gradio
    asked = loading.toggles_of(args)
    if args.cache_type == panel.DEFAULT_CACHE_TYPE:
        # Where the command line names a toggle alone, the web UI knows nothing of the type.
        components["cache_type"].value = asked.cache_type
    made: dict[str, Any] = {
        "cache_8bit": gr.Checkbox(
            label="cache_8bit", value=asked.cache_8bit,
            info="Keep the key/value cache in 8 bits: half the memory of fp16."),
        "cache_4bit": gr.Checkbox(
            label="cache_4bit", value=asked.cache_4bit,
            info="Keep the key/value cache in 4 bits: about a quarter."),
        "alpha_value": gr.Number(
            label="alpha_value", value=args.alpha_value, step=0.05,
            info="NTK RoPE factor to stretch the context; 1 is as trained."),
        "compress_pos_emb": gr.Number(
            label="compress_pos_emb", value=args.compress_pos_emb, step=0.1,
            info="Divides positions to stretch the context; 1 is as trained."),
        GAUGE: gr.HTML(value=_HIDE_FIELDS, elem_id="exl-gauge"),
        PICK: gr.Textbox(elem_id=PICK_ELEM_ID, label="choice", container=False),
        ASK: gr.Textbox(elem_id=ASK, label="drawing", container=False),
    }
    # Entering the column again would rewrite its own parent, so they are moved by hand.
    column = components["cache_type"].parent
    place = column.children.index(components["cache_type"]) + 1
    for component in made.values():
        component.parent.children.remove(component)
        component.parent = column
    column.children[place:place] = list(made.values())
    components.update(made)


def _connect(loading_chains: list[EventChain]) -> None:
    """Keep toggles and cache type in step, and the gauge up to date."""
    components = host.module("modules.shared").gradio
    names = [*_NEEDED_INPUTS, *(name for name in _MORE_INPUTS if name in components)]
    inputs = [components[name] for name in names]
    cache_bits = [components[name] for name in ("cache_8bit", "cache_4bit", "cache_type")]
    # Values come as they are: what Gradio would refuse, the gauge says in words.
    quiet: dict[str, Any] = {"show_progress": False, "queue": False, "preprocess": False}
    keep_in_step(cache_bits, quiet)
    components[PICK].change(
        None, components[PICK], [components["ctx_size"], components["cache_type"]],
        js=follow_pick(), **quiet)
    triggers = [component.change for component in inputs]
    # What the page does not hear of, such as a load over the API, is there when one looks.
    triggers += [_tab_of(components["cache_type"]).select, components["interface"].load]
    # What the web UI says about a load changes as well, but Gradio tells so of a text whenever
    # anything in the page does, the gauge included, and that would never end.
    triggers += [chain.then for chain in loading_chains]

    def redraw(*values: Any) -> str:
        return draw(dict(zip(names, values, strict=True)))

    draw_in_order(triggers, components[ASK], redraw, inputs, [components[GAUGE]], quiet)


def _tab_of(component: Any) -> Any:
    """The tab that a component lies in."""
    while component is not None and type(component).__name__ not in ("Tab", "TabItem"):
        component = component.parent
    if component is None:
        raise HostDiffers("its loaders' options lie in no tab")
    return component


def draw(shown: Mapping[str, Any]) -> str:
    """Draw the gauge for what the page shows.

    Args:
        shown: the values of its fields by their ids; an option without a field has the value
            that a load would take, that of the command line.
    """
    args = host.module("modules.shared").args
    unseen = {name: getattr(args, name, None) for name in _MORE_INPUTS}
    return _HIDE_FIELDS + _gauge(unseen | dict(shown))


def _gauge(shown: Mapping[str, Any]) -> str:
    if shown["loader"] not in LOADERS:
        return ""
    model_name = shown["model_menu"]
    if not model_name or model_name == "None":
        return message_html("No model", "Choose a model above.", good=False)
    drawn = problems.last_html()
    try:
        options = loading.options_for(model_name, shown["loader"], shown)
    except (ExlLoaderError, OSError) as error:
        return drawn + panel.error_html(error)
    loaded = loading.current()
    if loaded is not None and loading.is_loaded_as(options):
        return drawn + gauge_html(loaded.reservation, measured_bytes=loaded.allocated_bytes())
    return drawn + panel.plan_html(options)


class _PageProgress:
    """Keeps the latest state of a load for the page to fetch."""

    def __init__(self) -> None:
        self.shown = ""
        self._tasks: dict[str, list[Any]] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._tasks[task] = [0, total, unit]
        self._show(task)

    def advance(self, task: str, n: int = 1) -> None:
        if task in self._tasks:
            self._tasks[task][0] += n
            self._show(task)

    def finish(self, task: str) -> None:
        self._tasks.pop(task, None)

    def _show(self, task: str) -> None:
        done, total, unit = self._tasks[task]
        self.shown = task_html(task, done, total, format_count(done, total, unit))


def _load_wrapper(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def load_model_wrapper(
        selected_model: str, loader: str, autoload: bool = False
    ) -> Iterator[str]:
        if not autoload or loader not in LOADERS or selected_model in (None, "", "None"):
            yield from original(selected_model, loader, autoload=autoload)
            return
        yield f"Loading `{selected_model}`..."
        yield from _load_with_progress(selected_model, loader)

    return load_model_wrapper


def _load_with_progress(model_name: str, loader: str) -> Iterator[str]:
    """Load in a thread of its own, and tell the page how far it is and how it ended."""
    models, shared = host.module("modules.models"), host.module("modules.shared")
    progress = _PageProgress()
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def load() -> None:
        loading.load_progress.set(progress)
        try:
            with loading.lock:
                models.unload_model()
                shared.model, shared.tokenizer = models.load_model(model_name, loader)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    began = time.monotonic()
    threading.Thread(target=load, name="exl_loader load", daemon=True).start()
    shown = ""
    while True:
        try:
            error = ended.get(timeout=_TICK_S)
            break
        except queue.Empty:
            if progress.shown != shown:
                shown = progress.shown
                yield shown
    if error is None:
        loaded = message_html("Loaded", f"{model_name} in {time.monotonic() - began:.1f} s")
        yield loaded + panel.warnings_html(loading.warnings())
        return
    loading.release_unclaimed()
    if isinstance(error, Exception):
        error = load_errors.named(model_name, loader, error)
    host.say(f"{model_name} was not loaded: {error}", level="error")
    if not isinstance(error, (ExlLoaderError, OSError)):
        host.say("".join(traceback.format_exception(error)), level="error")
    yield panel.error_html(error)


def _lora_wrapper(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
        shared = host.module("modules.shared")
        if loading.current() is None or shared.args.loader not in LOADERS:
            yield from original(selected_loras)
        else:
            yield f"{shared.args.loader} does not support LoRAs yet; none was applied."

    return load_lora_wrapper
