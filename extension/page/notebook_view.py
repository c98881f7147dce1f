"""The notebook: a text that the model continues at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from exl_loader.commands.generate import DEMO_PROMPT

from .browser_script import follow_text, scroll_to_end
from .widgets import QUICK, button
from .writing import OpenConversation, Shown

# The field itself, for scripts.
FIELD = "#exl_text textarea"

# Texts that the included model can continue; it was trained on nothing but Python.
STARTERS = {
    "A function": DEMO_PROMPT,
    "A class": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
    "A test": "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_",
}


class NotebookView:
    """The notebook's components, made in the current block of Gradio."""

    def __init__(self) -> None:
        self.text = gr.Textbox(
            label="Text", lines=16, max_lines=16, elem_id="exl_text",
            elem_classes="exl-text", buttons=["copy"], autoscroll=False,
            placeholder="Write the beginning of a text. The model continues it at its end.")
        with gr.Row(elem_classes="exl-buttons"):
            self.write = button("Continue", "exl_write", variant="primary")
            self.stop = button("Stop", "exl_stop", interactive=False)
            self.again = button("Regenerate", "exl_write_again")
            self.undo = button("Undo", "exl_undo")
        with gr.Row(visible=False, elem_classes="exl-buttons") as self.starters:
            self.starter_buttons = [
                gr.Button(name, size="sm", min_width=70) for name in STARTERS
            ]

    def draw(self, shown: Shown, with_text: bool) -> dict[Any, Any]:
        """Return what changes while a text is written.

        Args:
            shown: the conversation.
            with_text: set the text too. It would overwrite what is being typed.
        """
        idle = not shown.writing
        has_before = shown.conversation.before is not None
        text: dict[str, Any] = {"value": shown.conversation.text} if with_text else {}
        return {
            # What is typed while the model writes would be lost.
            self.text: gr.update(interactive=idle, **text),
            self.write: gr.update(interactive=idle),
            self.stop: gr.update(interactive=shown.writing),
            self.again: gr.update(interactive=idle and has_before),
            self.undo: gr.update(interactive=idle and has_before),
        }

    def connect(self, act: Callable[..., None], keep: Callable[..., None]) -> None:
        """Wire the components; as `ChatView.connect`."""
        act([self.write.click], OpenConversation.write, [self.text], keeps="text")
        act([self.again.click], OpenConversation.write_again)
        act([self.undo.click], OpenConversation.undo)
        act([self.stop.click], OpenConversation.stop)
        for starter, text in zip(self.starter_buttons, STARTERS.values(), strict=True):
            act([starter.click], OpenConversation.set_text, constants=[text])
        keep(self.text, "text")
        self.text.change(None, None, None, js=follow_text(FIELD), **QUICK)
        gr.on([self.write.click, self.again.click], None, None, None, js=scroll_to_end(FIELD),
              **QUICK)
