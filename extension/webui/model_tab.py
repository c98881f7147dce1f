"""Extends the web UI's Model tab: toggles, RoPE fields, gauge, progress of loads, errors."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from exl_loader import ExlLoaderError

from ..panel import loads, panel
from ..panel.gauge import PAGE_LEN, PICK_ELEM_ID, gauge_html, message_html
from ..panel.page_script import draw_in_order, follow_pick, keep_in_step
from ..panel.panel import AS_LLAMA, ModelChoice
from ..patching import Patches
from . import contract, loading, loras, options, problems
from .contract import (
    AS_LLAMA_COLUMN,
    ASK,
    DRAFT_OPTIONS,
    GAUGE,
    LOADERS,
    MEMORY,
    MEMORY_OPTIONS,
    PICK,
    PROGRESS,
    ROPE,
    ROPE_OPTIONS,
    WebuiDiffers,
    say,
)

# Hides the fields that only scripts read and write, and the progress while no load runs.
_STYLE = (
    f"<style>#{PICK_ELEM_ID}, #{ASK}, #{PROGRESS}:not(:has(section))"
    " { display: none !important; }</style>"
)

# The gauge is drawn again when all events of a click on one of these have ended.
_LOADING_BUTTONS = ("load_model", "unload_model", "lora_menu_apply")

# How long after a click on Load the load may begin: before it the web UI gathers and stores
# what the page shows.
_BEGIN_WAIT_S = 15.0

# The fields that the gauge is drawn from. Every page has the first ones; v4.8 dropped one of
# the others. The toggles are not among them, because cache_type has the same meaning.
_NEEDED_INPUTS = (
    "loader", "model_menu", "ctx_size", "cache_type", *ROPE_OPTIONS, *MEMORY_OPTIONS, AS_LLAMA,
)
_MORE_INPUTS = ("gpu_split", *DRAFT_OPTIONS)

# Maximum and step of the context's slider as the web UI made it, restored for other loaders.
_slider: dict[str, Any] = {}


def extend(patches: Patches, menu: ModuleType) -> None:
    """Add our components and events to the Model tab, and our progress to its Load button.

    Args:
        menu: `modules.ui_model_menu`, before it makes its components.

    Raises:
        AttributeError: it has other functions. What could be extended is, and the page opens.
    """
    try:
        create_ui, create_events = menu.create_ui, menu.create_event_handlers
    except AttributeError:
        # The page would look for the components of our options and fail to start.
        options.remove_options()
        raise

    def create_ui_with_panel() -> None:
        create_ui()
        _safely(_insert_components)

    def create_events_with_panel() -> None:
        with event_chains(contract.module("modules.shared").gradio, _LOADING_BUTTONS) as chains:
            create_events()
        if not contract.module("modules.shared").args.multi_user:
            _safely(lambda: _connect(chains))

    patches.replace(create_ui, create_ui_with_panel)
    patches.replace(create_events, create_events_with_panel)
    wrapper = menu.load_model_wrapper
    patches.replace(wrapper, _load_wrapper(wrapper))
    apply_loras = menu.load_lora_wrapper
    patches.replace(apply_loras, _lora_wrapper(apply_loras))


def _safely(step: Callable[[], None]) -> None:
    """Do a step; if it fails, the page opens without our options."""
    try:
        step()
    except Exception as error:
        options.remove_options()
        kind = "" if isinstance(error, WebuiDiffers) else f"{type(error).__name__}: "
        say(f"the options of ExLlamav2 were not added to the Model tab: {kind}{error}",
            level="error")


def _insert_components() -> None:
    """Make the components: the gauge below the context, the options below the cache type."""
    import gradio as gr

    shared = contract.module("modules.shared")
    args, components = shared.args, shared.gradio
    asked = loading.toggles_of(args)
    if args.cache_type == panel.DEFAULT_CACHE_TYPE:
        # With only a toggle on the command line the web UI does not know the cache type.
        components["cache_type"].value = asked.cache_type
    gauge: dict[str, Any] = {
        PROGRESS: gr.HTML(elem_id=PROGRESS),
        GAUGE: gr.HTML(value=_STYLE, elem_id="exl-gauge"),
        PICK: gr.Textbox(elem_id=PICK_ELEM_ID, label="choice", container=False),
        ASK: gr.Textbox(elem_id=ASK, label="drawing", container=False),
    }
    toggles: dict[str, Any] = {
        "cache_8bit": gr.Checkbox(
            label="cache_8bit", value=asked.cache_8bit,
            info="Store the key/value cache in 8 bits: half the memory of fp16."),
        "cache_4bit": gr.Checkbox(
            label="cache_4bit", value=asked.cache_4bit,
            info="Store the key/value cache in 4 bits: about a quarter of fp16."),
    }
    with gr.Column(visible=False) as as_llama_column:
        as_llama = gr.Checkbox(value=bool(args.as_llama), **panel.as_llama_arguments())
    with gr.Accordion("RoPE scaling", open=False) as rope:
        fields = {
            name: gr.Number(value=getattr(args, name), **panel.field_arguments(name))
            for name in ROPE_OPTIONS
        }
    with gr.Accordion("Memory", open=False) as memory:
        for name in ("cache_size", "chunk_size"):
            fields[name] = gr.Number(
                value=getattr(args, name), precision=0, **panel.field_arguments(name))
        for name in ("embedding_device", "machines"):
            fields[name] = gr.Textbox(value=getattr(args, name), **panel.field_arguments(name))
    _move_below(components["ctx_size"], gauge.values())
    _move_below(components["cache_type"], toggles.values())
    form = components["cache_type"].parent
    # Gradio groups fields in a form without borders between them; an accordion has a border.
    _move_below(form if type(form).__name__ == "Form" else toggles["cache_4bit"],
                [as_llama_column, rope, memory])
    components.update(gauge | toggles | {ROPE: rope, MEMORY: memory} | fields)
    components.update({AS_LLAMA: as_llama, AS_LLAMA_COLUMN: as_llama_column})
    _slider.clear()
    for name in ("maximum", "step"):
        # In version 3 it is a number field and not a slider.
        if getattr(components["ctx_size"], "minimum", None) is not None:
            _slider[name] = getattr(components["ctx_size"], name)


def _move_below(component: Any, moved: Iterable[Any]) -> None:
    """Move components that have just been made below another one.

    Entering its column as a block again would change the column's own parent, so the lists of
    children are changed directly.
    """
    column, moved = component.parent, list(moved)
    for block in moved:
        block.parent.children.remove(block)
        block.parent = column
    index = column.children.index(component) + 1
    column.children[index:index] = moved


def _connect(loading_chains: list[EventChain]) -> None:
    """Keep toggles and cache type in step, and the gauge up to date."""
    import gradio as gr

    components = contract.module("modules.shared").gradio
    names = [*_NEEDED_INPUTS, *(name for name in _MORE_INPUTS if name in components)]
    inputs = [components[name] for name in names]
    cache_bits = [components[name] for name in ("cache_8bit", "cache_4bit", "cache_type")]
    # Without preprocessing, so that the gauge can explain values that Gradio would refuse.
    quiet: dict[str, Any] = {"show_progress": False, "queue": False, "preprocess": False}
    keep_in_step(cache_bits, quiet)
    components[PICK].change(
        None, components[PICK], [components["ctx_size"], components["cache_type"]],
        js=follow_pick(), **quiet)
    machines = components["machines"]
    triggers = [component.change for component in inputs if component is not machines]
    # Not at each character of an address, because a plan waits for the machines there.
    triggers += [machines.submit, machines.blur]
    # Also when the tab or the page is opened, because a load over the API sends no event.
    triggers += [_tab_of(components["cache_type"]).select, components["interface"].load]
    # The text with the result of a load changes as well, but Gradio sends its `change` event
    # whenever anything in the page changes, the gauge included, which would never end.
    triggers += [chain.then for chain in loading_chains]

    ctx_size, gauge = components["ctx_size"], components[GAUGE]

    def redraw(*values: Any) -> tuple[Any, Any, str]:
        shown = dict(zip(names, values, strict=True))
        return (gr.update(**_slider_for(shown)), gr.update(visible=_offers_llama(shown)),
                draw(shown))

    draw_in_order(triggers, components[ASK], redraw, inputs,
                  [ctx_size, components[AS_LLAMA_COLUMN], gauge], gauge, quiet)
    _show_loads(components)


def _show_loads(components: Mapping[str, Any]) -> None:
    """Show how far a load is, in the page that started it and in pages that are opened."""
    shown: dict[str, Any] = {
        "inputs": components["loader"], "outputs": components[PROGRESS], "show_progress": False,
        "concurrency_limit": None,
    }
    components["load_model"].click(_follow_load, **shown)
    components["interface"].load(_follow_running_load, **shown)
    _tab_of(components["cache_type"]).select(_follow_running_load, **shown)


def _follow_load(loader: str | None) -> Iterator[str]:
    """Yield what a page shows of the load that its Load button starts."""
    begun, deadline = loading.begun, time.monotonic() + _BEGIN_WAIT_S
    while loader in LOADERS and time.monotonic() < deadline:
        if loading.begun > begun or loading.running is not None:
            break
        time.sleep(loads.WATCH_INTERVAL_S)
    yield from _follow_running_load(loader)


def _follow_running_load(_: str | None) -> Iterator[str]:
    """Yield what a page shows of a load while it runs, and in the end nothing."""
    yield from loads.follow(lambda: loading.running)
    yield ""


def _slider_for(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return the end of the context's slider: with our loaders the model's own length."""
    choice = _choice(shown) if _slider else None
    end = None if choice is None else panel.slider_end(choice)
    return _slider if end is None else {"maximum": end, "step": PAGE_LEN}


def _offers_llama(shown: Mapping[str, Any]) -> bool:
    """Return whether the page shows the toggle that runs an unknown architecture as Llama."""
    choice = _choice(shown)
    return choice is not None and panel.offers_llama(choice)


def _choice(shown: Mapping[str, Any]) -> ModelChoice | None:
    """Return what the page shows; None for another loader, no model or values that are refused."""
    model_name = shown["model_menu"]
    if shown["loader"] not in LOADERS or not model_name or model_name == "None":
        return None
    try:
        return loading.options_for(model_name, shown["loader"], shown)
    except (ExlLoaderError, OSError):
        return None


def _tab_of(component: Any) -> Any:
    """Return the tab that contains a component."""
    while component is not None and type(component).__name__ not in ("Tab", "TabItem"):
        component = component.parent
    if component is None:
        raise WebuiDiffers("the options of its loaders are not in a tab")
    return component


def draw(shown: Mapping[str, Any]) -> str:
    """Draw the gauge for what the page shows.

    Args:
        shown: values of its fields by id. An option without a field has the value that a load
            would use, which is that of the command line.
    """
    args = contract.module("modules.shared").args
    unseen = {name: getattr(args, name, None) for name in _MORE_INPUTS}
    return _STYLE + _gauge(unseen | dict(shown))


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
    if loaded is None or not loading.is_loaded_as(options):
        return drawn + panel.plan_html(options)
    return drawn + gauge_html(loaded.reservation, measured_bytes=loaded.allocated_bytes())


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
    """Load a model; return what the page shows of the result."""
    models, shared = contract.module("modules.models"), contract.module("modules.shared")
    began = time.monotonic()
    try:
        with loading.lock:
            models.unload_model()
            shared.model, shared.tokenizer = models.load_model(model_name, loader)
    except Exception as failure:
        loading.release_unclaimed()
        error = problems.named_load_error(model_name, loader, failure)
        say(f"{model_name} was not loaded: {error}", level="error")
        if not isinstance(error, (ExlLoaderError, OSError)):
            say("".join(traceback.format_exception(error)), level="error")
        return panel.error_html(error)
    loaded = message_html("Loaded", f"{model_name} in {time.monotonic() - began:.1f} s")
    return loaded + panel.warnings_html(loading.warnings())


def _lora_wrapper(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    def load_lora_wrapper(selected_loras: list[str]) -> Iterator[str]:
        shared = contract.module("modules.shared")
        if not loras.is_ours(shared.model):
            yield from original(selected_loras)
            return
        try:
            yield from original(selected_loras)
        except Exception as error:
            say(f"no LoRA was applied: {error}", level="error")
            yield panel.error_html(error, heading="The LoRAs were not applied")

    return load_lora_wrapper


class EventChain:
    """A button's click event and the events chained to it, recorded while they are wired.

    Attributes:
        last: Gradio's dependency at the end of the chain so far; None before the click is wired.
    """

    def __init__(self) -> None:
        self.last: Any = None

    def then(self, *args: Any, **kwargs: Any) -> None:
        """Add an event to the end of the chain; without a chain nothing is added."""
        if self.last is not None:
            self.last.then(*args, **kwargs)

    def follow(self, wire: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap one of Gradio's functions that wire an event, and record what it wires."""

        def wired(*args: Any, **kwargs: Any) -> Any:
            self.last = dependency = wire(*args, **kwargs)
            for name in ("then", "success"):
                setattr(dependency, name, self.follow(getattr(dependency, name)))
            return dependency

        return wired


@contextmanager
def event_chains(
    components: Mapping[str, Any], buttons: Sequence[str]
) -> Iterator[list[EventChain]]:
    """Record the events that are wired to some buttons' clicks within the `with` block.

    Args:
        components: of the page. buttons: their names; missing ones are left out.
    """
    chains, clicks = [], []
    for name in buttons:
        button = components.get(name)
        if button is not None:
            chain, click = EventChain(), button.click
            button.click = chain.follow(click)
            chains.append(chain)
            clicks.append((button, click))
    try:
        yield chains
    finally:
        for button, click in clicks:
            button.click = click
