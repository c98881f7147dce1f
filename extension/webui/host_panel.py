"""The loader's part of the web UI's Model tab: toggles, RoPE fields, gauge, progress, errors."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from exl_loader.cache.layout import PAGE_LEN
from exl_loader.utils.errors import ExlLoaderError

from ..panel import panel
from ..panel.gauge import DETAILS_ELEM_ID, PICK_ELEM_ID, UNFOLDED, gauge_html, message_html
from ..panel.page_script import draw_in_order, follow_pick, keep_in_step
from . import host, load_errors, loading, problems, tables
from .event_chain import EventChain, event_chains
from .host import (
    ASK,
    DETAILS,
    DRAFT_OPTIONS,
    GAUGE,
    LOADERS,
    PICK,
    PROGRESS,
    ROPE,
    ROPE_OPTIONS,
    HostDiffers,
    Patches,
)

# Fields that only the page's own script reads and writes, and what is empty most of the time.
_STYLE = (
    f"<style>#{PICK_ELEM_ID}, #{DETAILS_ELEM_ID}, #{ASK}, #{PROGRESS}:not(:has(section))"
    " { display: none !important; }</style>"
)

# Whose clicks the gauge follows to their end.
_LOADING_BUTTONS = ("load_model", "unload_model")

# How often the page hears of a load that goes on, and how long after a click one may begin:
# the web UI gathers and stores what the page shows before it loads.
_TICK_S = 0.2
_BEGIN_WAIT_S = 15.0

# What the gauge draws: these are in every page, the others where the web UI has them; it
# dropped one in v4.8. The toggles are not among them, because cache_type says what they say.
_NEEDED_INPUTS = ("loader", "model_menu", "ctx_size", "cache_type", *ROPE_OPTIONS)
_MORE_INPUTS = ("gpu_split", *DRAFT_OPTIONS)

# Of the context's slider, as the web UI made it: what other loaders get back.
_slider: dict[str, Any] = {}


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
    """Make the components: the gauge right below the context, the options below the cache type."""
    import gradio as gr

    shared = host.module("modules.shared")
    args, components = shared.args, shared.gradio
    asked = loading.toggles_of(args)
    if args.cache_type == panel.DEFAULT_CACHE_TYPE:
        # Where the command line names a toggle alone, the web UI knows nothing of the type.
        components["cache_type"].value = asked.cache_type
    gauge: dict[str, Any] = {
        PROGRESS: gr.HTML(elem_id=PROGRESS),
        GAUGE: gr.HTML(value=_STYLE, elem_id="exl-gauge"),
        PICK: gr.Textbox(elem_id=PICK_ELEM_ID, label="choice", container=False),
        DETAILS: gr.Textbox(elem_id=DETAILS_ELEM_ID, label="details", container=False),
        ASK: gr.Textbox(elem_id=ASK, label="drawing", container=False),
    }
    toggles: dict[str, Any] = {
        "cache_8bit": gr.Checkbox(
            label="cache_8bit", value=asked.cache_8bit,
            info="Keep the key/value cache in 8 bits: half the memory of fp16."),
        "cache_4bit": gr.Checkbox(
            label="cache_4bit", value=asked.cache_4bit,
            info="Keep the key/value cache in 4 bits: about a quarter."),
    }
    with gr.Accordion("RoPE scaling", open=False) as rope:
        fields = {
            "alpha_value": gr.Number(
                label="alpha_value", value=args.alpha_value, step=0.05,
                info="NTK RoPE factor to stretch the context; 1 is as trained."),
            "compress_pos_emb": gr.Number(
                label="compress_pos_emb", value=args.compress_pos_emb, step=0.1,
                info="Divides positions to stretch the context; 1 is as trained."),
        }
    _move_below(components["ctx_size"], gauge.values())
    _move_below(components["cache_type"], toggles.values())
    form = components["cache_type"].parent
    # Gradio gathers fields without borders in a form, and an accordion has a border.
    _move_below(form if type(form).__name__ == "Form" else toggles["cache_4bit"], [rope])
    components.update(gauge | toggles | {ROPE: rope} | fields)
    _slider.clear()
    for name in ("maximum", "step"):
        # Version 3 had a number there.
        if getattr(components["ctx_size"], "minimum", None) is not None:
            _slider[name] = getattr(components["ctx_size"], name)


def _move_below(component: Any, moved: Iterable[Any]) -> None:
    """Move components that have just been made to where another one is.

    Entering its column again would rewrite the column's own parent, so it is done by hand.
    """
    column, moved = component.parent, list(moved)
    for block in moved:
        block.parent.children.remove(block)
        block.parent = column
    place = column.children.index(component) + 1
    column.children[place:place] = moved


def _connect(loading_chains: list[EventChain]) -> None:
    """Keep toggles and cache type in step, and the gauge up to date."""
    import gradio as gr

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

    ctx_size, unfolded = components["ctx_size"], components[DETAILS]

    def redraw(unfolded: str, *values: Any) -> tuple[Any, str]:
        shown = dict(zip(names, values, strict=True))
        return gr.update(**_slider_for(shown)), draw(shown, unfolded=unfolded == UNFOLDED)

    draw_in_order(triggers, components[ASK], redraw, [unfolded, *inputs],
                  [ctx_size, components[GAUGE]], quiet)
    _show_loads(components)


def _show_loads(components: Mapping[str, Any]) -> None:
    """Show how far a load is, in the page that asked for it and in pages that are opened."""
    shown: dict[str, Any] = {
        "inputs": components["loader"], "outputs": components[PROGRESS], "show_progress": False,
        "concurrency_limit": None,
    }
    components["load_model"].click(_follow_load, **shown)
    components["interface"].load(_follow_running_load, **shown)
    _tab_of(components["cache_type"]).select(_follow_running_load, **shown)


def _follow_load(loader: str | None) -> Iterator[str]:
    """Yield what a page shows of the load that its Load button begins."""
    begun, deadline = loading.begun, time.monotonic() + _BEGIN_WAIT_S
    while loader in LOADERS and time.monotonic() < deadline:
        if loading.begun > begun or loading.running is not None:
            break
        time.sleep(_TICK_S)
    yield from _follow_running_load(loader)


def _follow_running_load(_: str | None) -> Iterator[str]:
    """Yield what a page shows of a load while it runs; nothing in the end."""
    shown = ""
    while (progress := loading.running) is not None:
        now = progress.html()
        if now != shown:
            shown = now
            yield shown
        time.sleep(_TICK_S)
    yield ""


def _slider_for(shown: Mapping[str, Any]) -> dict[str, Any]:
    """How far the slider of the context reaches: with our loaders as far as the model does."""
    model_name = shown["model_menu"]
    if not _slider or shown["loader"] not in LOADERS or not model_name or model_name == "None":
        return _slider
    try:
        end = panel.slider_end(loading.options_for(model_name, shown["loader"], shown))
    except (ExlLoaderError, OSError):
        end = None
    return _slider if end is None else {"maximum": end, "step": PAGE_LEN}


def _tab_of(component: Any) -> Any:
    """The tab that a component lies in."""
    while component is not None and type(component).__name__ not in ("Tab", "TabItem"):
        component = component.parent
    if component is None:
        raise HostDiffers("its loaders' options lie in no tab")
    return component


def draw(shown: Mapping[str, Any], *, unfolded: bool = False) -> str:
    """Draw the gauge for what the page shows.

    Args:
        shown: the values of its fields by their ids; an option without a field has the value
            that a load would take, that of the command line.
        unfolded: see `gauge_html`.
    """
    args = host.module("modules.shared").args
    unseen = {name: getattr(args, name, None) for name in _MORE_INPUTS}
    return _STYLE + _gauge(unseen | dict(shown), unfolded)


def _gauge(shown: Mapping[str, Any], unfolded: bool) -> str:
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
    if loaded is None or not loading.is_loaded_as(options):
        return drawn + panel.plan_html(options, unfolded=unfolded)
    return drawn + gauge_html(
        loaded.reservation, measured_bytes=loaded.allocated_bytes(), unfolded=unfolded)


def _load_wrapper(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def load_model_wrapper(
        selected_model: str, loader: str, autoload: bool = False
    ) -> Iterator[str]:
        if not autoload or loader not in LOADERS or selected_model in (None, "", "None"):
            yield from original(selected_model, loader, autoload=autoload)
            return
        yield f"Loading `{selected_model}`..."
        yield _load(selected_model, loader)

    return load_model_wrapper


def _load(model_name: str, loader: str) -> str:
    """Load; returns what the page says of how it ended."""
    models, shared = host.module("modules.models"), host.module("modules.shared")
    began = time.monotonic()
    try:
        with loading.lock:
            models.unload_model()
            shared.model, shared.tokenizer = models.load_model(model_name, loader)
    except Exception as failure:
        loading.release_unclaimed()
        error = load_errors.named(model_name, loader, failure)
        host.say(f"{model_name} was not loaded: {error}", level="error")
        if not isinstance(error, (ExlLoaderError, OSError)):
            host.say("".join(traceback.format_exception(error)), level="error")
        return panel.error_html(error)
    loaded = message_html("Loaded", f"{model_name} in {time.monotonic() - began:.1f} s")
    return loaded + panel.warnings_html(loading.warnings())


def _lora_wrapper(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
        shared = host.module("modules.shared")
        if loading.current() is None or shared.args.loader not in LOADERS:
            yield from original(selected_loras)
        else:
            yield f"{shared.args.loader} does not support LoRAs yet; none was applied."

    return load_lora_wrapper
