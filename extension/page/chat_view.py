"""The chat: a conversation with a model that has a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from .browser_script import follow_log, scroll_to_end
from .conversation import USER
from .widgets import QUICK, button
from .writing import OpenConversation, Shown

# The element that scrolls, and the field of a message that is edited, for scripts.
LOG, EDITED = "#exl_chatbot [role=log]", "#exl_chatbot textarea"


class ChatView:
    """The chat's components, made in the current block of Gradio."""

    def __init__(self) -> None:
        self.chatbot = gr.Chatbot(
            label="Conversation", show_label=False, height="max(16rem, 100vh - 27rem)",
            elem_id="exl_chatbot", editable="all", buttons=["copy", "copy_all"],
            placeholder="Ask the model something.", feedback_options=None, autoscroll=False)
        self.message = gr.Textbox(
            label="Message", show_label=False, lines=1, max_lines=8, elem_id="exl_message",
            placeholder="Message (Shift+Enter: new line)")
        with gr.Row(elem_classes="exl-buttons"):
            self.send = button("Send", "exl_send", variant="primary")
            self.stop = button("Stop", "exl_stop_chat", interactive=False)
            self.regenerate = button("Regenerate", "exl_regenerate")
            self.go_on = button("Continue", "exl_continue")

    def make_system(self) -> None:
        """Make the field of the system prompt in the current block, folded."""
        with gr.Accordion(
            "System prompt", open=False, visible=False, elem_id="exl_system_fold"
        ) as self.system_fold:
            self.system = gr.Textbox(
                label="System prompt", show_label=False, lines=2, max_lines=8,
                elem_id="exl_system", placeholder="You are a helpful assistant.",
                info="The model reads it before the conversation. Empty: the template's own.")

    def draw(self, shown: Shown) -> dict[Any, Any]:
        """Return what changes while a conversation is written."""
        turns = shown.conversation.turns
        is_question = bool(turns) and turns[-1].role == USER
        idle = not shown.writing
        return {
            self.chatbot: shown.conversation.messages(),
            self.send: gr.update(interactive=idle),
            self.stop: gr.update(interactive=shown.writing),
            self.regenerate: gr.update(interactive=idle and bool(turns)),
            self.go_on: gr.update(interactive=idle and bool(turns) and not is_question),
        }

    def connect(self, act: Callable[..., None], keep: Callable[..., None]) -> None:
        """Wire the components.

        Args:
            act: `TextView._act`, which wires a method of `OpenConversation`.
            keep: `TextView._keep_typed`, which keeps what is typed.
        """
        sending = [self.send.click, self.message.submit]
        self.chatbot.change(None, None, None, js=follow_log(LOG), **QUICK)
        gr.on([*sending, self.regenerate.click, self.go_on.click], None, None, None,
              js=scroll_to_end(LOG), **QUICK)
        act(sending, OpenConversation.send, [self.message], keeps="draft",
            clears=self.message)
        act([self.regenerate.click], OpenConversation.regenerate)
        act([self.go_on.click], OpenConversation.continue_answer)
        act([self.stop.click], OpenConversation.stop)
        keep(self.message, "draft")
        keep(self.system, "system")
