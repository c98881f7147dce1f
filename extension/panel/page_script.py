"""JavaScript of the page: keeps fields in step, and draws the gauge in order and without losses.

`cache_type` alone decides the bits of the cache. The browser sets the two toggles from it, and
sets it after a click on a toggle, without asking the server, because the server's answer could
arrive after the next click and contradict it. The gauge is drawn from `cache_type`, never from a
toggle.

The browser asks for one drawing at a time, and asks again if a field has changed meanwhile, so
the last drawing in the page always shows the last values. Gradio's own `always_last` does not
guarantee this: 4.37 sends two requests at once if two fields change together, and their answers
may arrive in either order.

A drawing replaces or changes the gauge's elements. What the user has unfolded, scrolled and
focused in them is known to the browser alone, which keeps it. The server does not ask for it,
because it would answer with what was unfolded before a click that came later.

Every function here returns the source of a JavaScript function for Gradio's `js=`. Such a
function receives the values of its event's inputs, then those of its outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from .gauge import CACHE_BITS
from .panel import CACHE_TYPE_ALIASES, DEFAULT_CACHE_TYPE, TOGGLE_TYPES

# Leaves an output unchanged.
_KEEP = '({__type__: "update"})'

# A drawing that has not arrived after this time counts as lost.
LOST_AFTER_MS = 30_000

_TABLES = (
    f"const aliases = {json.dumps(CACHE_TYPE_ALIASES)}, standard = "
    f"{json.dumps(DEFAULT_CACHE_TYPE)}, [type8, type4] = "
    f"{json.dumps([TOGGLE_TYPES['cache_8bit'], TOGGLE_TYPES['cache_4bit']])};"
    "const kindOf = t => {"
    ' const name = String(t ?? "").trim().toLowerCase() || standard;'
    " return Object.hasOwn(aliases, name) ? aliases[name] : name; };"
    "const fields = t => [t === type8, t === type4, t];"
)


def follow_toggle(name: str) -> str:
    """Follow a toggle: `(cache_8bit, cache_4bit, cache_type, ...) -> all three`.

    Switched on, it becomes the only toggle that is on, and `cache_type` becomes its type.
    Switched off, `cache_type` becomes the default if it was the toggle's type. Values that are
    in step already are left alone, so values set by the server cause no further events.
    """
    own_type = json.dumps(TOGGLE_TYPES[name])
    return (
        f"(on8, on4, type) => {{ {_TABLES} const kind = kindOf(type);"
        f" if (!!on8 === (kind === type8) && !!on4 === (kind === type4))"
        f" return [{_KEEP}, {_KEEP}, {_KEEP}];"
        f" if ({'on8' if name == 'cache_8bit' else 'on4'}) return fields({own_type});"
        f" if (kind === {own_type}) return fields(standard);"
        " return [...fields(kind).slice(0, 2), type]; }"
    )


def follow_cache_type() -> str:
    """Follow the cache type: `(cache_8bit, cache_4bit, cache_type, ...) -> all three`.

    The field keeps its spelling: the web UI's `q8_0` sets the toggle of `q8`.
    """
    return (
        f"(on8, on4, type) => {{ {_TABLES} const kind = kindOf(type);"
        f" if (!!on8 === (kind === type8) && !!on4 === (kind === type4))"
        f" return [{_KEEP}, {_KEEP}, {_KEEP}];"
        " return [...fields(kind).slice(0, 2), type]; }"
    )


def follow_pick() -> str:
    """Follow a click in the gauge: `(pick, ...) -> ctx_size, cache_type`.

    A pick is `CTX_SIZE CACHE_TYPE TIME`; CTX_SIZE 0 keeps the context. Any other text changes
    nothing.
    """
    return (
        f"pick => {{ const types = {json.dumps(list(CACHE_BITS))};"
        r" const found = /^(\d{1,10}) (\w+)( |$)/.exec(pick ?? '');"
        f" if (!found || !types.includes(found[2])) return [{_KEEP}, {_KEEP}];"
        f" return [Number(found[1]) || {_KEEP}, found[2]]; }}"
    )


_STATE = (
    "const gauge = window.exlGauge ??= {asked: 0, drawn: 0, again: false, since: 0};"
    "const ask = () => { gauge.again = false; gauge.since = Date.now();"
    " return String(++gauge.asked); };"
)


_KEEP_STATE = """
if (!root || root === window.exlKept) return;
window.exlKept = root;
const unfolded = new Set(), scrolled = new Map(), all = tags => [...root.querySelectorAll(tags)];
const nameOf = element => {
  if (element.tagName === "BUTTON") return `button ${all("button").indexOf(element)}`;
  const details = element.closest("details");
  return details ? details.dataset.name ?? details.textContent : "";
};
const named = element => ({element, tag: element.tagName, name: nameOf(element)});
let texts = all("pre"), focused = null, pressed = null;
root.addEventListener("click", event => {
  const details = event.target.closest("summary")?.closest("details");
  if (details) unfolded[details.open ? "delete" : "add"](nameOf(details));
});
root.addEventListener("scroll", event => {
  scrolled.set(nameOf(event.target), event.target.scrollTop);
}, true);
root.addEventListener("mousedown", event => {
  const element = event.target.closest("button, summary");
  pressed = element && event.button === 0
    ? {...named(element), x: event.clientX, y: event.clientY} : null;
});
document.addEventListener("mouseup", event => {
  const {element, tag, name, x, y} = pressed ?? {};
  pressed = null;
  if (!element || element.contains(event.target)) return;
  // Browsers send no click if the element under the mouse has been replaced, or has moved away from
  // under a mouse that is where it was, since it was pressed.
  const isStill = Math.hypot(event.clientX - x, event.clientY - y) < 4;
  const found = all(tag).find(other => nameOf(other) === name);
  if (found && (isStill || found.contains(event.target))) found.click();
});
root.addEventListener("focusin", event => { focused = named(event.target); });
root.addEventListener("focusout", event => queueMicrotask(() => {
  // Not if a drawing has removed it, nor if the whole window has lost the focus.
  const element = event.target;
  if (focused?.element === element && element.isConnected && element !== document.activeElement)
    focused = null;
}));
const takeOver = () => {
  for (const details of all("details")) {
    // Without a click only a search in the page unfolds, and only a drawing folds.
    if (details.open) unfolded.add(nameOf(details));
    else if (unfolded.has(nameOf(details))) details.open = true;
  }
  const before = texts;
  texts = all("pre");
  for (const text of texts)
    if (!before.includes(text)) text.scrollTop = scrolled.get(nameOf(text)) ?? 0;
  if (!focused || focused.element.isConnected) return;
  const {tag, name} = focused;
  focused = null;
  const found = all(tag).find(element => nameOf(element) === name);
  const free = !document.activeElement || document.activeElement === document.body;
  // What is in folded details cannot have the focus; their summary is in its place.
  if (found && free) (found.closest("details:not([open])")?.querySelector("summary") ?? found)
    .focus({preventScroll: true});
};
takeOver();
new MutationObserver(takeOver).observe(
  root, {childList: true, subtree: true, attributeFilter: ["open"]});
"""


def keep_state(elem_id: str) -> str:
    """Keep the state of a component's elements while drawings change or replace them.

    `() -> nothing`; it is called before each drawing, but needs only one call. The state is: which
    `details` are unfolded, how far their texts are scrolled, and which button or `summary` has the
    focus or is being clicked. `details` are the same if they have the same `data-name`, or without
    it the same text: those of another problem are folded. Buttons are the same if as many are
    before them.

    Gradio 4.37 replaces all elements. Gradio 6 changes those that there are, and so takes `open`
    from the `details`, because the drawings of the server have it folded. An observer is called
    after such a change and before the page is painted or another click arrives, so the user never
    sees elements without their state.

    Args:
        elem_id: of the component.
    """
    return f"() => {{ const root = document.getElementById({json.dumps(elem_id)}); {_KEEP_STATE} }}"


def ask_for_drawing(elem_id: str) -> str:
    """Ask for a drawing, or note that another one is due after the one that is under way.

    Its output is the text field whose `change` event draws.

    Args:
        elem_id: of the component that is drawn; see `keep_state`.
    """
    return (
        f"() => {{ ({keep_state(elem_id)})(); {_STATE}"
        f" if (gauge.asked === gauge.drawn || Date.now() - gauge.since > {LOST_AFTER_MS})"
        f" return ask(); gauge.again = true; return {_KEEP}; }}"
    )


def drawing_arrived() -> str:
    """Note that a drawing has arrived or failed; ask for the next if a field has changed."""
    return f"() => {{ {_STATE} gauge.drawn = gauge.asked; return gauge.again ? ask() : {_KEEP}; }}"


def keep_in_step(fields: Sequence[Any], quiet: dict[str, Any]) -> None:
    """Wire the toggles and the cache type.

    Args:
        fields: the components `cache_8bit`, `cache_4bit`, `cache_type`.
        quiet: further arguments of Gradio's events.
    """
    cache_8bit, cache_4bit, cache_type = fields
    for component, js in ((cache_8bit, follow_toggle("cache_8bit")),
                          (cache_4bit, follow_toggle("cache_4bit")),
                          (cache_type, follow_cache_type())):
        component.change(None, list(fields), list(fields), js=js, **quiet)


def draw_in_order(
    triggers: Sequence[Any], asking: Any, draw: Callable[..., Any], inputs: Sequence[Any],
    outputs: Sequence[Any], gauge: Any, quiet: dict[str, Any],
) -> None:
    """Wire the gauge so that its last drawing shows the last values.

    Args:
        triggers: events after which the gauge must be drawn, also the `then` of an event.
        asking: a hidden text field that serves nothing else.
        draw: `draw(*values of inputs) -> values of outputs`.
        gauge: the output with the gauge's HTML.
        quiet: further arguments of Gradio's events.
    """
    for trigger in triggers:
        trigger(None, None, asking, js=ask_for_drawing(gauge.elem_id), **quiet)
    drawn = asking.change(
        draw, list(inputs), list(outputs), trigger_mode="multiple", **quiet)
    follow_up(drawn, asking, drawing_arrived(), quiet)


def follow_up(event: Any, output: Any, js: str, quiet: dict[str, Any]) -> None:
    """Wire a script that runs after an event, whether it has failed or not.

    Args:
        event: as Gradio returned it.
        output: component that the script sets; None for none.
        js: the script.
        quiet: further arguments of Gradio's events.
    """
    event.then(None, None, output, js=js, **quiet)
    # Gradio 4 has no `failure` and runs `then` after a failed event too, Gradio 6 does not.
    if hasattr(event, "failure"):
        event.failure(None, None, output, js=js, **quiet)
