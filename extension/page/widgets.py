"""Small components that several parts of the page are made of."""

from __future__ import annotations

from typing import Any

import gradio as gr

# Arguments of an event that is answered without queueing, in the thread that received the request.
# No event of the page is queued, because Gradio answers those in a stream, and a browser opens six
# connections to a server for all its tabs together.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def button(label: str, elem_id: str, **more: Any) -> gr.Button:
    """Make a button that leaves room for three others beside it on a narrow screen."""
    return gr.Button(label, elem_id=elem_id, size="md", min_width=56, **more)


def html_block(elem_id: str, value: str = "") -> gr.HTML:
    """Make a block of HTML without a frame, which takes no room while it is empty."""
    return gr.HTML(value, elem_id=elem_id, elem_classes="exl-bare", padding=False,
                   visible=bool(value))


def if_any(html: str) -> Any:
    """Return the update of an `html_block`."""
    return gr.update(value=html, visible=bool(html))


def hidden_field(elem_id: str, value: str = "") -> gr.Textbox:
    """Make a text field for scripts, which nobody sees. Its value is part of the page."""
    return gr.Textbox(value, elem_id=elem_id, label=elem_id, container=False,
                      elem_classes="exl-hidden")
