"""The standalone page's model: one at a time, loaded in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exl_loader import InvalidSettings, ModelUnloaded, SamplingSettings

from ..panel.gauge import gauge_html
from ..panel.loads import WatchedProgress, collected_warnings, follow
from ..panel.panel import ModelChoice, error_html, plan_html, warnings_html

if TYPE_CHECKING:
    from exl_loader import LoadedModel
    from exl_loader.generation.generator import TextGeneration


class Session:
    """One model from load to unload. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._progress = WatchedProgress()
        self._model: LoadedModel | None = None
        self._options: ModelChoice | None = None
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
    def options(self) -> ModelChoice | None:
        """Return the options of the loaded model; None if there is none."""
        return self._options

    def start_load(self, options: ModelChoice) -> None:
        """Start to load in the background, after the current model has freed its memory.

        Raises:
            InvalidSettings: another load is running.
        """
        with self._lock:
            if self.loading:
                raise InvalidSettings(
                    "Load", expected="one load at a time", actual="a load that is still running",
                    remedy="Wait until it has ended",
                )
            self._progress = WatchedProgress()
            self._problem = self._warnings = ""
            # A daemon, so that a load that compiles does not keep the process from ending.
            self._thread = threading.Thread(target=self._load, args=(options,), daemon=True)
            self._thread.start()

    def _load(self, options: ModelChoice) -> None:
        self._release()
        try:
            import exl_loader

            with collected_warnings() as warnings:
                self._model = exl_loader.load(
                    options.model_dir, progress=self._progress, **options.for_load()
                )
            self._warnings = warnings_html(warnings)
            # A page that shows this model must show the context that the plan chose.
            self._options = replace(options, ctx_size=self._model.ctx_size)
        except Exception as error:
            # Only its text is kept: a traceback would keep the load's tensors alive.
            self._problem = error_html(error)

    def follow(self) -> Iterator[str]:
        """Yield the progress of a running load as it changes, then its error or its warnings."""
        yield from follow(lambda: self._progress if self.loading else None)
        yield self._problem or self._warnings

    def unload(self) -> None:
        """End all generations and free the memory, after a load that is still running."""
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
        """End the running generations after the current step."""
        model = self._model
        if model is not None:
            model.stop()

    def gauge(self, options: ModelChoice) -> str:
        """Draw the loaded model if these are its options, else what a load with them would take."""
        model = self._model
        if model is None or options != self._options:
            return plan_html(options)
        return gauge_html(model.reservation, measured_bytes=model.allocated_bytes())

    @property
    def has_template(self) -> bool:
        """Return whether the loaded model has a chat template."""
        model = self._model
        return model is not None and model.has_tokenizer and bool(model.tokenizer.chat_templates)

    def continue_text(self, text: str, settings: Mapping[str, Any]) -> TextGeneration:
        """Continue a text.

        Raises:
            ModelUnloaded: no model is loaded. ExlLoaderError: see `LoadedModel.generate`.
        """
        return self._loaded().generate(text, dict(settings))

    def answer(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any],
        notices: list[str] | None = None,
    ) -> TextGeneration:
        """Answer a conversation with the model's chat template.

        Args:
            messages: alternating questions and answers that end with a question. The oldest
                are left out until the answer asked for fits into the context.
            settings: of the answer.
            notices: gets a line if messages were left out.

        Raises:
            ModelUnloaded: no model is loaded. PromptTooLong: the last message alone is too
                long. ExlLoaderError: see `LoadedModel.generate`.
        """
        model, chosen = self._loaded(), SamplingSettings.from_dict(settings)
        fitted = model.fit_messages(messages, chosen.max_new_tokens)
        if fitted.notice and notices is not None:
            notices.append(fitted.notice)
        return model.generate(fitted.ids, chosen)

    def _loaded(self) -> LoadedModel:
        model = self._model
        if model is None:
            raise ModelUnloaded("The model", actual="not loaded", remedy="Load one first")
        return model
