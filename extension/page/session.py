"""The standalone page's model: loaded in a thread of its own, one at a time, watched by pages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exl_loader.generation.settings import SamplingSettings
from exl_loader.text.chat.fitting import fit_messages
from exl_loader.utils.errors import InvalidSettings, ModelUnloaded

from ..panel.gauge import gauge_html
from ..panel.load_progress import WatchedProgress
from ..panel.panel import LoadOptions, error_html, plan_html, warnings_html
from ..webui import notices

if TYPE_CHECKING:
    from exl_loader.engine import LoadedModel
    from exl_loader.generation.generator import TextGeneration

WATCH_INTERVAL_S = 0.15


class Session:
    """One model and its life. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._progress = WatchedProgress()
        self._model: LoadedModel | None = None
        self._options: LoadOptions | None = None
        self._problem = ""
        self._warnings = ""

    @property
    def loading(self) -> bool:
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def model(self) -> LoadedModel | None:
        return self._model

    @property
    def options(self) -> LoadOptions | None:
        """What the model was loaded with; None where none is."""
        return self._options

    def start_load(self, options: LoadOptions) -> None:
        """Begin to load in the background; the model there is gives its memory back first.

        Raises:
            InvalidSettings: another load is running.
        """
        with self._lock:
            if self.loading:
                raise InvalidSettings(
                    "Load", expected="one load at a time", actual="one that is running",
                    remedy="Wait until it has ended",
                )
            self._progress = WatchedProgress()
            self._problem = self._warnings = ""
            # A daemon: a page that is closed while it compiles should not keep the process.
            self._thread = threading.Thread(target=self._load, args=(options,), daemon=True)
            self._thread.start()

    def _load(self, options: LoadOptions) -> None:
        self._release()
        try:
            from exl_loader.loader import load

            with notices.collected() as warnings:
                self._model = load(
                    options.model_dir, progress=self._progress, **options.load_arguments()
                )
            self._warnings = warnings_html(warnings)
            # What the plan chose is what a page that shows this model has to say.
            self._options = replace(options, ctx_size=self._model.ctx_size)
        except Exception as error:
            # Its text alone is kept: a traceback would keep what the load had in hand.
            self._problem = error_html(error)

    def follow(self) -> Iterator[str]:
        """Yield what a load shows, as it changes; at the end its problem or its warnings."""
        shown = None
        while self.loading:
            now = self._progress.html()
            if now != shown:
                yield now
                shown = now
            time.sleep(WATCH_INTERVAL_S)
        yield self._problem or self._warnings

    def unload(self) -> None:
        """End all generations and give the memory back; a load that runs is waited for."""
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._problem = self._warnings = ""
            self._release()

    def _release(self) -> None:
        model, self._model, self._options = self._model, None, None
        if model is not None:
            model.unload()

    def stop(self) -> None:
        """End the running generations after the step that is running."""
        model = self._model
        if model is not None:
            model.stop()

    def gauge(self, options: LoadOptions, *, unfolded: bool = False) -> str:
        """Draw the loaded model while the options are its own, else what they would take.

        Args:
            unfolded: see `gauge_html`.
        """
        model = self._model
        if model is None or options != self._options:
            return plan_html(options, unfolded=unfolded)
        return gauge_html(
            model.reservation, measured_bytes=model.allocated_bytes(), unfolded=unfolded)

    @property
    def has_template(self) -> bool:
        """Whether the loaded model can be talked to in the way that it was trained on."""
        model = self._model
        return model is not None and model.has_tokenizer and bool(model.tokenizer.chat_templates)

    def continue_text(self, text: str, settings: Mapping[str, Any]) -> TextGeneration:
        """Write on from a text as it stands.

        Raises:
            ModelUnloaded: no model is loaded. ExlLoaderError: see `LoadedModel.generate`.
        """
        return self._loaded().generate(text, dict(settings))

    def answer(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any],
        notices: list[str] | None = None,
    ) -> TextGeneration:
        """Answer a conversation, in the model's template.

        Args:
            messages: questions and answers in turn, a question last. The oldest are left out
                until the answer asked for fits into the context.
            settings: of the answer.
            notices: a line is added to it where messages were left out.

        Raises:
            ModelUnloaded: no model is loaded. PromptTooLong: the last message alone is too
                long. ExlLoaderError: see `LoadedModel.generate`.
        """
        model, chosen = self._loaded(), SamplingSettings.from_dict(settings)
        fitted = fit_messages(messages, model.chat_ids, model.ctx_size, chosen.max_new_tokens)
        if fitted.notice and notices is not None:
            notices.append(fitted.notice)
        return model.generate(fitted.ids, chosen)

    def _loaded(self) -> LoadedModel:
        model = self._model
        if model is None:
            raise ModelUnloaded("The model", actual="not loaded", remedy="Load one first")
        return model
