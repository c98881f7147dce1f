"""The side of the page that has the model: picker, options, gauge, load and unload.

All tabs show the same model. What one of them loads or unloads, the others show when they ask for
it (`watch.py`).
"""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from exl_loader import ExlLoaderError
from exl_loader.commands.model_options import DEMO_MODEL

from ..panel.gauge import PAGE_LEN, PICK_ELEM_ID
from ..panel.page_script import draw_in_order, follow_pick, keep_in_step
from ..panel.panel import (
    AS_LLAMA,
    CACHE_TYPES,
    ModelChoice,
    as_llama_arguments,
    error_html,
    field_arguments,
    named,
    offers_llama,
    reserve,
    slider_end,
    toggles_for,
)
from .download_view import DownloadView
from .downloads import Downloads
from .model_folders import MAX_FOLDERS, FoundModels, find_models
from .session import Session
from .watch import Watch, connect_drawing
from .widgets import QUICK, button, hidden_field, html_block, if_any

# End of the context's slider if the folder does not give the model's length.
UNKNOWN_LENGTH = 32768

# The options of a load; the toggles follow cache_type in the browser.
OPTION_NAMES = (
    "model_dir", "ctx_size", "cache_type", "alpha_value", "compress_pos_emb", "cache_size",
    "chunk_size", "embedding_device", "machines", AS_LLAMA,
)


class ModelView:
    """The panel's components, made in the current block of Gradio, and their events."""

    def __init__(
        self, session: Session, first: ModelChoice, models_dir: str, watch: Watch,
        downloads: Downloads | None,
    ) -> None:
        self._session = session
        self.model_dir = gr.Dropdown(
            [first.model_dir], value=first.model_dir, label="Model", allow_custom_value=True,
            elem_id="exl_model_dir", info="Choose one, or type a folder (model_dir)")
        with gr.Row(elem_classes="exl-buttons"):
            self.load = button("Load", "exl_load", variant="primary")
            self.unload = button("Unload", "exl_unload")
        # The folder that the slider belongs to: the field can lose focus without a change.
        self.known_dir = hidden_field("exl_known_dir", first.model_dir)
        self.ctx_size = _ctx_slider(first)
        # Right below the slider, where the user looks while dragging it.
        self.progress = html_block("exl_progress")
        self.gauge = html_block("exl_gauge", session.gauge(first))
        self.status = html_block("exl_status")
        self.pick = hidden_field(PICK_ELEM_ID)
        self.asking = hidden_field("exl_ask")
        self.seen = hidden_field("exl_seen_model")
        self.changed = watch.add("model", self._version, lambda tab: session.loading,
                                 [self.seen])
        self.cache_type = gr.Dropdown(
            list(CACHE_TYPES), value=str(first.cache_type), allow_custom_value=True,
            elem_id="exl_cache_type", **field_arguments("cache_type", "Cache type"),
        )
        toggles = toggles_for(str(first.cache_type))
        with gr.Row():
            self.cache_8bit = gr.Checkbox(
                toggles.cache_8bit, label="8-bit cache", elem_id="exl_cache_8bit", min_width=120)
            self.cache_4bit = gr.Checkbox(
                toggles.cache_4bit, label="4-bit cache", elem_id="exl_cache_4bit", min_width=120)
        with gr.Column(visible=offers_llama(first)) as self.as_llama_column:
            self.as_llama = gr.Checkbox(
                first.as_architecture is not None, elem_id="exl_as_llama",
                **as_llama_arguments("Run as Llama"))
        with gr.Accordion("Longer context (RoPE scaling)", open=False, elem_id="exl_rope"):
            self.alpha_value = gr.Slider(
                1, 8, value=first.alpha_value, elem_id="exl_alpha_value",
                **field_arguments("alpha_value", "NTK factor"))
            self.compress_pos_emb = gr.Slider(
                1, 8, value=first.compress_pos_emb, elem_id="exl_compress_pos_emb",
                **field_arguments("compress_pos_emb", "Linear factor"))
        with gr.Accordion("Memory", open=False):
            self.cache_size = gr.Number(
                first.cache_size, precision=0, elem_id="exl_cache_size",
                **field_arguments("cache_size", "Cache of all texts together"))
            self.chunk_size = gr.Number(
                first.chunk_size, precision=0, elem_id="exl_chunk_size",
                **field_arguments("chunk_size", "Tokens at a time"))
            self.embedding_device = gr.Textbox(
                first.embedding_device, elem_id="exl_embedding_device",
                **field_arguments("embedding_device", "Device of the embedding"))
            self.machines = gr.Textbox(
                first.machines or "", elem_id="exl_machines", max_lines=1,
                **field_arguments("machines", "Address for other machines"))
        with gr.Accordion("Folder of models", open=False, elem_id="exl_models"):
            with gr.Row(elem_classes="exl-field-row"):
                self.models_dir = gr.Textbox(
                    models_dir, label="Models are below this folder", max_lines=1, min_width=200,
                    scale=3, elem_id="exl_models_dir")
                self.find = gr.Button(
                    "Find models", elem_id="exl_find", size="md", min_width=100, scale=1)
            self.found = html_block("exl_found")
        self.download = None if downloads is None else DownloadView(downloads, watch)

    def connect(self, page: gr.Blocks) -> None:
        """Wire the panel."""
        options = [getattr(self, name) for name in OPTION_NAMES]
        keep_in_step([self.cache_8bit, self.cache_4bit, self.cache_type], QUICK)
        self.pick.change(None, self.pick, [self.ctx_size, self.cache_type], js=follow_pick(),
                         **QUICK)
        shown = [self.seen, self.load, self.unload, self.progress, self.status]
        everything = [*shown, self.known_dir, *options]
        # Gradio's sliders send an event for every digit that is typed, and Gradio would refuse the
        # first of four digits as too small.
        raw = {**QUICK, "preprocess": False}
        self.load.click(self._load, options, shown, **QUICK)
        self.unload.click(self._unload, options, everything, **raw)
        page.load(self._draw_changes, [self.seen, *options], everything, **raw)
        connect_drawing(self.changed, self._draw_changes, [self.seen, *options], everything, **raw)
        finding = [page.load, self.find.click, self.models_dir.submit]
        if self.download is not None:
            self.download.connect(page, self.models_dir)
            finding.append(self.download.completed.change)
        for trigger in finding:
            trigger(self._find, [self.models_dir, self.model_dir], [self.model_dir, self.found],
                    **QUICK)
        choosing = [self.model_dir.input, self.model_dir.blur]
        if self.download is not None:
            downloaded = self.download.choose.click(
                self.download.folder, None, self.model_dir, **QUICK)
            choosing.append(downloaded.then)
        chosen = [
            event(self._chosen, [self.known_dir, *options],
                  [self.known_dir, self.ctx_size, self.as_llama], **QUICK)
            for event in choosing
        ]
        changes = (self.ctx_size, self.cache_type, self.alpha_value, self.compress_pos_emb,
                   self.cache_size, self.chunk_size, self.embedding_device, self.as_llama,
                   self.seen)
        triggers = [component.change for component in changes]
        # Not at each character of an address, because a plan waits for the machines there.
        triggers += [self.machines.submit, self.machines.blur]
        triggers += [event.then for event in chosen]
        draw_in_order(triggers, self.asking, self._draw, options,
                      [self.ctx_size, self.as_llama_column, self.gauge], self.gauge, raw)

    def _find(self, models_dir: str, chosen: str) -> tuple[Any, Any]:
        """List the models below a folder, and the one that is chosen."""
        try:
            found = find_models(str(Path(models_dir or ".").expanduser()))
        except OSError as error:
            return gr.skip(), if_any(_found_html(FoundModels(), f"{models_dir}: {error.strerror}"))
        choices = [(model.label, model.path) for model in found.loadable]
        if DEMO_MODEL.resolve() not in {Path(path).resolve() for _, path in choices}:
            choices.append(("demo_model, which comes with exl_loader", str(DEMO_MODEL)))
        # The field keeps its value, which may have been typed meanwhile, and shows its label.
        here = Path(chosen or ".").expanduser().resolve()
        choices = [(label, chosen if Path(path).resolve() == here else path)
                   for label, path in choices]
        return gr.update(choices=choices), if_any(_found_html(found))

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
            options.embedding_device, options.machines or "",
            options.as_architecture is not None,
        )

    def _load(self, *values: Any) -> tuple[Any, ...]:
        options = _options(values)
        try:
            self._session.start_load(options)
        except ExlLoaderError as error:
            return (*self._state(options)[:-1], if_any(error_html(error)))
        return self._state(options)

    def _unload(self, *values: Any) -> tuple[Any, ...]:
        self._session.unload()
        return self._everything(_options(values))

    def _version(self, tab: str) -> str:
        return f"{self._session.version} {hash(self._session.progress_html())}"

    def _draw_changes(self, seen: str, *values: Any) -> tuple[Any, ...]:
        """Draw what a tab has not seen of the session yet."""
        if self._session.loading:
            return (*self._state(_options(values)), *(gr.skip(),) * (1 + len(OPTION_NAMES)))
        if seen == self._session.version:
            return (gr.skip(),) * (6 + len(OPTION_NAMES))
        return self._everything(_options(values))

    def _everything(self, options: ModelChoice) -> tuple[Any, ...]:
        return (*self._state(options), *self._as_loaded())

    def _state(self, options: ModelChoice) -> tuple[Any, ...]:
        """Draw the state of the session: its version, the buttons, progress and status.

        Args:
            options: those that the tab shows.
        """
        session = self._session
        loading, status = session.loading, session.status_html
        if status and status == session.gauge(options):
            # The gauge above shows the same error.
            status = ""
        return (
            session.version, gr.update(interactive=not loading),
            gr.update(interactive=not loading and session.model is not None),
            if_any(session.progress_html()), if_any(status),
        )


def _found_html(found: FoundModels, problem: str = "") -> str:
    """Show how many models there are, and those that cannot be loaded, by name."""
    lines = [problem] if problem else [f"Models that can be loaded: {len(found.loadable)}."]
    if not (problem or found.loadable or found.others):
        lines = ["There is no model here. Choose another folder, or download a model into it."]
    if not found.whole:
        lines.append(f"The search ended after {MAX_FOLDERS:,} folders.")
    html = "".join(f"<p>{escape(line)}</p>" for line in lines)
    if found.others:
        rows = "".join(f"<li><b>{escape(model.label)}</b>: {escape(model.problem)}</li>"
                       for model in found.others)
        html += f"<p>Cannot be loaded: {len(found.others)}.</p><ul>{rows}</ul>"
    return f'<div class="exl-found">{html}</div>'


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
        elem_id="exl_ctx_size",
        **named("Context length", "ctx_size", "Tokens of prompt and answer together"),
    )
