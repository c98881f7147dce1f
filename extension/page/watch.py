"""How a tab learns of what other tabs and the server have changed.

Each tab asks the server often for the versions of what it shows, by a request that costs next to
nothing, and has Gradio draw only what has another version. Gradio's own timers would have it draw
all the time, which took 4 % of a core for each idle tab. A connection that the server keeps
open would be quicker, but a browser opens six to a server for all its tabs together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from exl_loader import InvalidSettings

from .widgets import QUICK, hidden_field

# A tab asks this often while something is under way, and otherwise.
BUSY_MS, IDLE_MS = 100, 1000
# A drawing that has not arrived after this time counts as lost, and is asked for again.
LOST_DRAWING_MS = 30_000
# One that has failed is asked for again after this time.
FAILED_MS = 5000
# After so many questions without an answer the tab says that the server is gone.
LOST_AFTER = 3

PATH = "exl_loader/versions"

# The name of a tab is 65 characters.
MAX_TAB_BYTES = 200

GONE = "exl_loader does not answer. Start it again, and this page goes on."


class Watch:
    """What tabs watch: named versions, and the events that draw them."""

    def __init__(self) -> None:
        self._versions: dict[str, Callable[[str], str]] = {}
        self._busy: list[Callable[[str], bool]] = []
        self._seen: dict[str, list[str]] = {}

    def add(
        self, name: str, version: Callable[[str], str], busy: Callable[[str], bool],
        seen: Sequence[gr.Textbox] = (),
    ) -> gr.Textbox:
        """Watch something, made in the current block of Gradio.

        Args:
            name: of a hidden field.
            version: tab -> a text that is another one whenever the tab has to draw.
            busy: tab -> whether the version changes soon.
            seen: hidden fields that say what a drawing has shown. Other events may set them too.

        Returns:
            The field whose `change` event has to draw. `connect_drawing` wires it.
        """
        self._versions[name] = version
        self._busy.append(busy)
        elem_id = f"exl_watch_{name}"
        self._seen[elem_id] = [str(field.elem_id) for field in seen]
        return hidden_field(elem_id)

    def answer(self, tab: str) -> dict[str, Any]:
        """Return all versions for a tab, and whether anything is under way.

        Raises:
            InvalidSettings: there is no such tab.
        """
        return {"versions": {name: version(tab) for name, version in self._versions.items()},
                "busy": any(busy(tab) for busy in self._busy)}

    def route(self) -> Route:
        """Return the route that answers the tabs' script."""
        return Route(f"/{PATH}", self._asked, methods=["POST"])

    async def _asked(self, request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_TAB_BYTES:
                return JSONResponse({"detail": "not a tab"}, 413)
        try:
            return JSONResponse(self.answer(body.decode()))
        except (InvalidSettings, UnicodeDecodeError) as error:
            return JSONResponse({"detail": str(error)}, 400)

    def connect(self, page: gr.Blocks, tab: gr.Textbox) -> None:
        """Begin to ask when the page opens.

        Args:
            tab: the hidden field with the tab's name.
        """
        page.load(None, None, None, js=ask_for_versions(tab.elem_id or "", self._seen),
                  **QUICK)


def connect_drawing(
    trigger: gr.Textbox, draw: Callable[..., Any], inputs: list[Any], outputs: list[Any],
    **arguments: Any,
) -> None:
    """Have the changes of a watched thing drawn, one drawing at a time.

    Args:
        trigger: as `Watch.add` returned it.
        draw, inputs, outputs, arguments: of the event.
    """
    drawn = trigger.change(draw, inputs, outputs, **arguments)
    name = str(trigger.elem_id)
    # Gradio 6 runs `then` after a success alone.
    for event, is_drawn in ((drawn.then, "true"), (drawn.failure, "false")):
        event(None, None, None, js=f"() => window.exlDrawn?.({json.dumps(name)}, {is_drawn})",
              **QUICK)


def ask_for_versions(tab_id: str, seen: Mapping[str, Sequence[str]]) -> str:
    """Ask for versions as long as the tab is open: `() -> nothing`.

    A field `#exl_watch_NAME` changes when the version of NAME has, unless its last drawing is
    under way. It changes again if that was lost or has failed, or if another event shows something
    else since then. When the server was gone and is there again, or does not know the tab's
    conversation any more, the page reloads.

    Args:
        tab_id: of the hidden field with the tab's name.
        seen: field that changes -> ids of the fields that say what its drawing has shown.
    """
    return f"""() => {{
  if (window.exlDrawn) return;
  const seen = {json.dumps(dict(seen))};
  // Field -> the version whose drawing is under way, and until when; field -> what was drawn.
  const drawing = new Map(), drawn = new Map();
  // An answer that comes late may show what is older than the last drawing.
  const shown = (id, version) => [version, ...seen[id].map(each => fieldOf(each)?.value)].join();
  window.exlDrawn = (id, isDrawn) => {{
    const [version] = drawing.get(id) ?? [];
    if (isDrawn) {{ drawn.set(id, shown(id, version)); drawing.delete(id); }}
    else drawing.set(id, [version, Date.now() + {FAILED_MS}]);
  }};
  const fieldOf = id => document.querySelector(`#${{id}} textarea, #${{id}} input`);
  let lost = 0, unknown = 0, timer = null, asking = false;
  const draw = (name, version) => {{
    const id = `exl_watch_${{name}}`, field = fieldOf(id);
    const isUnderWay = Date.now() < (drawing.get(id)?.[1] ?? 0);
    if (drawn.get(id) === shown(id, version) || isUnderWay || !field) return;
    drawing.set(id, [version, Date.now() + {LOST_DRAWING_MS}]);
    field.value = `${{version}} ${{Date.now()}}`;
    field.dispatchEvent(new Event("input", {{bubbles: true}}));
  }};
  const ask = async () => {{
    const tab = fieldOf({json.dumps(tab_id)})?.value;
    let pause = {BUSY_MS};
    try {{
      if (tab) {{
        const answer = await fetch("{PATH}", {{method: "POST", body: tab, cache: "no-store"}});
        // A tab whose conversation has just been deleted gets another name.
        unknown = answer.status === 400 ? unknown + 1 : 0;
        if (lost >= {LOST_AFTER} || unknown > 1) {{
          location.reload();
          return new Promise(() => {{ }});
        }}
        lost = 0;
        window.exlSay("");
        if (unknown) pause = {IDLE_MS};
        const {{versions, busy}} = answer.ok ? await answer.json() : {{versions: {{}}}};
        for (const [name, version] of Object.entries(versions)) draw(name, version);
        if (!busy) pause = {IDLE_MS};
      }}
    }} catch {{
      pause = {IDLE_MS};
      if (++lost === {LOST_AFTER}) window.exlSay({json.dumps(GONE)});
    }}
    return pause;
  }};
  const loop = async () => {{
    if (asking) return;
    clearTimeout(timer);
    asking = true;
    const pause = await ask();
    asking = false;
    timer = setTimeout(loop, pause);
  }};
  // What a person does changes something soon.
  for (const event of ["click", "keydown", "visibilitychange"])
    document.addEventListener(event, () => {{
      clearTimeout(timer);
      timer = setTimeout(loop, {BUSY_MS});
    }}, true);
  loop();
}}"""
