"""The left half of the standalone page: model folder, loader options, gauge, load and unload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from exl_loader import ExlLoaderError

from ..panel.gauge import PAGE_LEN, PICK_ELEM_ID
from ..panel.page_script import draw_in_order, follow_pick, keep_in_step
from ..panel.panel import (
    AS_LLAMA,
    CACHE_TYPES,
    ModelChoice,
    as_llama_arguments,
    error_html,
    field_arguments,
    offers_llama,
    reserve,
    slider_end,
    toggles_for,
)
from .session import Session

if TYPE_CHECKING:
    from .text_view import TextView

# End of the context's slider if the folder does not give the model's length.
UNKNOWN_LENGTH = 32768

# The options of a load; the toggles follow cache_type in the browser.
OPTION_NAMES = (
    "model_dir", "ctx_size", "cache_type", "alpha_value", "compress_pos_emb", "cache_size",
    "chunk_size", "embedding_device", AS_LLAMA,
)

# Answered without queueing, in the thread that received the request.
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


class ModelView:
    """The panel's components, made in the current block of Gradio, and their events."""

    def __init__(self, session: Session, first: ModelChoice) -> None:
        self._session = session
        with gr.Row(elem_id="exl_model_row"):
            self.model_dir = gr.Textbox(
                first.model_dir, label="Model folder", elem_id="exl_model_dir", max_lines=1,
                min_width=260, info="EXL2, GPTQ or unquantised, as safetensors",
            )
            self.load = gr.Button(
                "Load", variant="primary", elem_id="exl_load", min_width=90, scale=0)
            self.unload = gr.Button("Unload", elem_id="exl_unload", min_width=90, scale=0)
        # The folder that the slider belongs to: the field can lose focus without a change.
        self.known_dir = gr.State(first.model_dir)
        self.ctx_size = _ctx_slider(first)
        # Right below the slider, where the user looks while dragging it.
        self.progress = gr.HTML(visible=False, elem_id="exl_progress", padding=False)
        self.gauge = gr.HTML(session.gauge(first), elem_id="exl_gauge", padding=False)
        self.status = gr.HTML(visible=False, elem_id="exl_status", padding=False)
        self.pick = gr.Textbox(elem_id=PICK_ELEM_ID, label="choice", container=False)
        self.asking = gr.Textbox(elem_id="exl_ask", label="drawing", container=False)
        self.cache_type = gr.Dropdown(
            list(CACHE_TYPES), value=str(first.cache_type), allow_custom_value=True,
            elem_id="exl_cache_type", **field_arguments("cache_type"),
        )
        toggles = toggles_for(str(first.cache_type))
        with gr.Row():
            self.cache_8bit = gr.Checkbox(
                toggles.cache_8bit, label="cache_8bit", elem_id="exl_cache_8bit", min_width=120)
            self.cache_4bit = gr.Checkbox(
                toggles.cache_4bit, label="cache_4bit", elem_id="exl_cache_4bit", min_width=120)
        with gr.Column(visible=offers_llama(first)) as self.as_llama_column:
            self.as_llama = gr.Checkbox(
                first.as_architecture is not None, elem_id="exl_as_llama", **as_llama_arguments())
        with gr.Accordion("RoPE scaling", open=False):
            self.alpha_value = gr.Slider(
                1, 8, value=first.alpha_value, **field_arguments("alpha_value"))
            self.compress_pos_emb = gr.Slider(
                1, 8, value=first.compress_pos_emb, **field_arguments("compress_pos_emb"))
        with gr.Accordion("Memory", open=False):
            self.cache_size = gr.Number(
                first.cache_size, precision=0, elem_id="exl_cache_size",
                **field_arguments("cache_size"))
            self.chunk_size = gr.Number(
                first.chunk_size, precision=0, elem_id="exl_chunk_size",
                **field_arguments("chunk_size"))
            self.embedding_device = gr.Textbox(
                first.embedding_device, elem_id="exl_embedding_device",
                **field_arguments("embedding_device"))

    def connect(self, page: gr.Blocks, text: TextView) -> None:
        """Wire the panel, and what the text view shows of the loaded model."""
        options = [getattr(self, name) for name in OPTION_NAMES]
        keep_in_step([self.cache_8bit, self.cache_4bit, self.cache_type], QUICK)
        self.pick.change(None, self.pick, [self.ctx_size, self.cache_type], js=follow_pick(),
                         **QUICK)
        state = text.model_outputs()
        buttons = [self.load, self.unload, self.progress, self.status]
        known: dict[str, Any] = {
            "fn": self._as_loaded, "inputs": None, "outputs": [self.known_dir, *options], **QUICK}
        shown: dict[str, Any] = {
            "fn": text.model_changed, "inputs": None, "outputs": state, **QUICK}
        begun = self.load.click(self._load, options, buttons, show_progress="hidden")
        begun = begun.then(**known).then(**shown)
        ended = self.unload.click(self._unload, None, buttons, show_progress="hidden")
        ended = ended.then(**shown)
        opened = page.load(self._opened, None, buttons, show_progress="hidden")
        opened = opened.then(**known).then(**shown)
        text.connect(opened)
        chosen = [
            event(self._chosen, [self.known_dir, *options],
                  [self.known_dir, self.ctx_size, self.as_llama], **QUICK)
            for event in (self.model_dir.submit, self.model_dir.blur)
        ]
        changes = (self.ctx_size, self.cache_type, self.alpha_value, self.compress_pos_emb,
                   self.cache_size, self.chunk_size, self.embedding_device, self.as_llama)
        triggers = [component.change for component in changes]
        triggers += [event.then for event in (begun, ended, opened, *chosen)]
        # Gradio's sliders send an event for every digit that is typed. Without preprocessing,
        # because Gradio would refuse the first of four digits as too small.
        draw_in_order(triggers, self.asking, self._draw, options,
                      [self.ctx_size, self.as_llama_column, self.gauge], self.gauge,
                      {**QUICK, "preprocess": False})

    def _draw(self, *values: Any) -> tuple[Any, Any, str]:
        """Draw the gauge, and let the slider end at the model's length with RoPE scaling."""
        options = _options(values)
        return (gr.update(maximum=slider_end(options) or UNKNOWN_LENGTH),
                gr.update(visible=offers_llama(options)), self._session.gauge(options))

    def _chosen(self, known_dir: str, *values: Any) -> tuple[Any, ...]:
        """Follow another folder: the slider ends at the length of its model."""
        options = replace(_options(values), ctx_size=None, as_architecture=None)
        if options.model_dir == known_dir:
            return (gr.skip(),) * 3
        return options.model_dir, _ctx_slider(options), False

    def _as_loaded(self) -> tuple[Any, ...]:
        """Return the folder and the options of the loaded model, if there is one."""
        options = self._session.options
        if options is None:
            # Not the values that were sent, because the user may have changed them since.
            return (gr.skip(),) * (1 + len(OPTION_NAMES))
        return (
            options.model_dir, options.model_dir, _ctx_slider(options), options.cache_type,
            options.alpha_value, options.compress_pos_emb, options.cache_size, options.chunk_size,
            options.embedding_device, options.as_architecture is not None,
        )

    def _load(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        options = _options(values)
        try:
            self._session.start_load(options)
        except ExlLoaderError as error:
            yield *self._buttons(), _shown(""), _shown(error_html(error))
            return
        yield from self._opened(options)

    def _opened(self, options: ModelChoice | None = None) -> Iterator[tuple[Any, ...]]:
        """Show a running load, if there is one, to its end.

        Args:
            options: of the load, if this page started it.
        """
        busy = gr.update(interactive=False)
        for status in self._session.follow():
            if self._session.loading:
                yield busy, busy, _shown(status), _shown("")
                continue
            if status and options is not None and status == self._session.gauge(options):
                # The gauge above shows the same error.
                status = ""
            yield *self._buttons(), _shown(""), _shown(status)

    def _unload(self) -> Iterator[tuple[Any, ...]]:
        self._session.unload()
        yield *self._buttons(), _shown(""), _shown("")

    def _buttons(self) -> tuple[Any, Any]:
        loaded = self._session.model is not None
        return gr.update(interactive=True), gr.update(interactive=loaded)


def _shown(html: str) -> Any:
    return gr.update(value=html, visible=bool(html))


def _options(values: Any) -> ModelChoice:
    return ModelChoice.from_values(dict(zip(OPTION_NAMES, values, strict=True)))


def _ctx_slider(options: ModelChoice) -> gr.Slider:
    """Make a slider up to the model's length, at the context that a load would choose itself."""
    ctx_size = options.ctx_size
    if not isinstance(ctx_size, int):
        try:
            ctx_size = reserve(options).ctx_size
        except (ExlLoaderError, OSError):
            ctx_size = UNKNOWN_LENGTH // 4
    end = max(slider_end(options) or UNKNOWN_LENGTH, ctx_size)
    return gr.Slider(
        PAGE_LEN, end, value=ctx_size, step=PAGE_LEN,
        label="ctx_size", elem_id="exl_ctx_size",
        info="Tokens that prompt and answer may have together",
    )
