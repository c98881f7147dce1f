"""The right half of the standalone page: a chat, and a text that the model continues.

A model with a chat template opens the chat first. A model without one was not trained on
conversations, so it continues the text in place.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from exl_loader.commands.generate import DEMO_PROMPT
from exl_loader.commands.model_options import DEMO_MODEL, TERMINAL_DEFAULTS

from ..panel.panel import error_html
from .session import Session

if TYPE_CHECKING:
    from exl_loader.generation.generator import TextGeneration

# The page is repainted at most this often; a fast model writes faster than anyone can read.
REPAINT_INTERVAL_S = 0.05

# Texts that the shipped model can continue; it was trained on nothing but Python.
STARTERS = {
    "A function": DEMO_PROMPT,
    "A class": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(",
    "A test": "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def test_",
}

ABOUT_DEMO = (
    "This model comes with exl_loader. It has 3.6 MB and has read only Python, so it shows the "
    "engine and not what a language model can do. `python install.py --demo smollm2` makes a real "
    "one to talk to."
)

SAMPLING_NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p",
                  "repetition_penalty", "seed")

REASONS = {
    "eos": "ended by the model", "stop": "stop text found",
    "loop": "it repeated itself", "length": "max_new_tokens reached",
    "context": "the context is full", "cancelled": "stopped", "failed": "failed",
}

NOTHING_LOADED = "No model is loaded."
FAILED = "Generation failed"


class TextView:
    """Chat and text, made in the current block of Gradio, and their events."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._shown = False
        with gr.Tabs() as self.tabs:
            with gr.Tab("Chat", id="chat", visible=False) as self.chat_tab:
                self._make_chat()
            with gr.Tab("Text", id="text") as self.text_tab:
                self._make_text()
        self.stats = gr.Markdown("Opening …", elem_id="exl_stats", elem_classes="exl-stats")
        self.problem = gr.HTML(elem_id="exl_problem", padding=False)
        with gr.Accordion("Sampling", open=False):
            self.sampling = _sampling()

    def _make_chat(self) -> None:
        self.history = gr.State([])
        # Gradio 5 needs this argument; later versions know no other kind.
        known = inspect.signature(gr.Chatbot).parameters
        kind: dict[str, Any] = {"type": "messages"} if "type" in known else {}
        self.chatbot = gr.Chatbot(
            label="Conversation", height=460, elem_id="exl_chatbot", **kind)
        self.message = gr.Textbox(
            label="Message", lines=1, max_lines=6,
            placeholder="Enter sends, Shift+Enter starts a new line", elem_id="exl_message")
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", elem_id="exl_send", min_width=90)
            self.stop_chat = gr.Button("Stop", interactive=False, min_width=90)
            self.clear = gr.Button("New conversation", min_width=90)

    def _make_text(self) -> None:
        self.before = gr.State("")
        self.text = gr.Textbox(
            DEMO_PROMPT, label="Text", lines=18, max_lines=18, elem_id="exl_text",
            elem_classes="exl-text", info="The model continues the text at its end")
        with gr.Row():
            self.write = gr.Button(
                "Continue", variant="primary", elem_id="exl_write", min_width=90)
            self.stop_text = gr.Button(
                "Stop", interactive=False, elem_id="exl_stop", min_width=90)
            self.undo = gr.Button("Undo", elem_id="exl_undo", min_width=90)
        with gr.Column(visible=False) as self.starters:
            gr.Markdown(ABOUT_DEMO, elem_id="exl_about")
            with gr.Row():
                self.starter_buttons = [
                    gr.Button(name, size="sm", min_width=90) for name in STARTERS
                ]

    def model_outputs(self) -> list[Any]:
        """The components that `model_changed` sets."""
        return [self.tabs, self.chat_tab, self.starters, self.stats, self.problem]

    def model_changed(self) -> tuple[Any, ...]:
        """Show what the loaded model can do."""
        session = self._session
        chats = session.has_template
        if session.model is None:
            line = NOTHING_LOADED
        elif not session.model.has_tokenizer:
            line = session.model.tokenizer_warning
        elif chats:
            line = "Ready."
        else:
            line = "Ready. This model has no chat template, so it only continues text."
        return (
            gr.update(selected="chat" if chats else "text"), gr.update(visible=chats),
            gr.update(visible=_is_demo(session)), line, "",
        )

    def connect(self, opened: Any) -> None:
        """Wire the buttons.

        Args:
            opened: the event after which a page that was opened shows its model.
        """
        sampling = list(self.sampling.values())
        chat_outputs = [self.message, self.history, self.chatbot, self.send, self.stop_chat,
                        self.stats, self.problem]
        gr.on([self.send.click, self.message.submit], self._answer,
              [self.message, self.history, *sampling], chat_outputs, show_progress="hidden")
        self.clear.click(lambda: ([], [], ""), None, [self.history, self.chatbot, self.problem],
                         queue=False, show_progress="hidden")
        text_outputs = [self.text, self.before, self.write, self.stop_text, self.stats,
                        self.problem]
        self.write.click(self._write_on, [self.text, self.before, *sampling], text_outputs,
                         show_progress="hidden")
        opened.then(self._write_first, [self.text, self.before, *sampling], text_outputs,
                    show_progress="hidden")
        for stop in (self.stop_chat, self.stop_text):
            # Past the queue: the generation then ends by itself and keeps its text.
            stop.click(self._session.stop, None, None, queue=False, show_progress="hidden")
        self.undo.click(lambda before, text: before or text, [self.before, self.text],
                        self.text, queue=False, show_progress="hidden")
        for button, text in zip(self.starter_buttons, STARTERS.values(), strict=True):
            button.click(lambda text=text: text, None, self.text, queue=False,
                         show_progress="hidden")

    def _write_first(self, text: str, before: str, *sampling: Any) -> Iterator[tuple[Any, ...]]:
        """Let the shipped model write once without a click, so that a new user sees text."""
        if _is_demo(self._session) and text == DEMO_PROMPT and not self._shown:
            self._shown = True
            yield from self._write_on(text, before, *sampling)
        else:
            # Without a value Gradio would empty the components.
            yield (gr.skip(),) * 6

    def _write_on(self, text: str, before: str, *sampling: Any) -> Iterator[tuple[Any, ...]]:
        try:
            generation = self._session.continue_text(text, _settings(sampling))
            for written, stats, running in _stream(generation):
                busy = (gr.update(interactive=not running), gr.update(interactive=running))
                yield text + written, text, *busy, stats, ""
        except Exception as error:
            idle = (gr.update(interactive=True), gr.update(interactive=False))
            yield gr.skip(), gr.skip(), *idle, "", error_html(error, heading=FAILED)

    def _answer(
        self, message: str, history: list[dict[str, str]], *sampling: Any
    ) -> Iterator[tuple[Any, ...]]:
        if not message.strip():
            yield (gr.skip(),) * 7
            return
        asked = [*history, {"role": "user", "content": message}]
        try:
            notices: list[str] = []
            generation = self._session.answer(asked, _settings(sampling), notices)
            for written, stats, running in _stream(generation):
                stats = " · ".join([*notices, stats])
                talk = [*asked, {"role": "assistant", "content": written}]
                busy = (gr.update(interactive=not running), gr.update(interactive=running))
                yield "", talk, talk, *busy, stats, ""
        except Exception as error:
            idle = (gr.update(interactive=True), gr.update(interactive=False))
            yield gr.skip(), gr.skip(), gr.skip(), *idle, "", error_html(error, heading=FAILED)


def _stream(generation: TextGeneration) -> Iterator[tuple[str, str, bool]]:
    """Yield (the text so far, its figures, whether it continues), at most once a repaint."""
    written, painted_s = "", 0.0
    with generation:
        yield written, "Reading the prompt …", True
        for piece in generation:
            written += piece
            now = time.monotonic()
            if now - painted_s >= REPAINT_INTERVAL_S:
                painted_s = now
                yield written, stats_line(generation), True
    yield written, stats_line(generation), False


def stats_line(generation: TextGeneration) -> str:
    """Return a line with a generation's figures."""
    stats = generation.stats
    parts = [_tokens(stats.new_tokens), f"{stats.tokens_per_s:.1f} tokens/s"]
    reused = f", {stats.reused_tokens} reused" if stats.reused_tokens else ""
    parts.append(f"prompt {_tokens(stats.prompt_tokens)}{reused} in {stats.prefill_s:.2f} s")
    if stats.draft_summary:
        parts.append(stats.draft_summary)
    if generation.finish_reason is not None:
        parts.append(REASONS.get(generation.finish_reason, generation.finish_reason))
        parts.append(f"seed {generation.seed}")
    return " · ".join(parts)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _is_demo(session: Session) -> bool:
    options = session.options
    return options is not None and Path(options.model_dir).resolve() == DEMO_MODEL.resolve()


def _sampling() -> dict[str, Any]:
    chosen = TERMINAL_DEFAULTS
    return {
        "max_new_tokens": gr.Slider(
            1, 4096, value=256, step=1, label="max_new_tokens", elem_id="exl_max_new_tokens"),
        "temperature": gr.Slider(
            0, 2, value=chosen["temperature"], step=0.05, label="temperature",
            info="0 always takes the most likely token"),
        "top_p": gr.Slider(0, 1, value=chosen["top_p"], step=0.01, label="top_p"),
        "top_k": gr.Slider(0, 200, value=chosen["top_k"], step=1, label="top_k",
                           info="0 keeps all tokens"),
        "min_p": gr.Slider(0, 1, value=0, step=0.01, label="min_p"),
        "repetition_penalty": gr.Slider(
            1, 2, value=1, step=0.01, label="repetition_penalty"),
        "seed": gr.Number(-1, label="seed", precision=0, info="-1 draws a random seed"),
    }


def _settings(values: tuple[Any, ...]) -> dict[str, Any]:
    named = zip(SAMPLING_NAMES, values, strict=True)
    return {name: value for name, value in named if value is not None}
