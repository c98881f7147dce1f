"""The standalone page's model: one at a time, loaded in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exl_loader import InvalidSettings, ModelUnloaded, SamplingSettings

from ..panel.gauge import gauge_html
from ..panel.loads import WatchedProgress, collected_warnings
from ..panel.panel import ModelChoice, error_html, plan_html, warnings_html
from .conversation import fit_text

if TYPE_CHECKING:
    from exl_loader import LoadedModel
    from exl_loader.generation.generator import TextGeneration
    from exl_loader.generation.jobs import GenerationStats


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
        self._changes = 0

    @property
    def version(self) -> str:
        """A text that changes when a load begins or ends and when the model is unloaded."""
        return f"{self._changes}{'+' if self.loading else ''}"

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
            self._changes += 1
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

    def progress_html(self) -> str:
        """Draw how far the running load is; empty while none runs."""
        return self._progress.html() if self.loading else ""

    @property
    def status_html(self) -> str:
        """The error of the last load or its warnings; empty while one runs."""
        return "" if self.loading else self._problem or self._warnings

    def wait(self) -> str:
        """Wait for a running load; return its `status_html`."""
        thread = self._thread
        if thread is not None:
            thread.join()
        return self.status_html

    def unload(self) -> None:
        """End all generations and free the memory, after a load that is still running."""
        self.wait()
        with self._lock:
            self._problem = self._warnings = ""
            self._release()
            self._changes += 1

    def _release(self) -> None:
        model, self._model, self._options = self._model, None, None
        if model is not None:
            model.unload()

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

    def continue_text(
        self, text: str, settings: Mapping[str, Any], notices: list[str] | None = None,
    ) -> TextGeneration:
        """Continue a text.

        Args:
            text: its beginning is left out if it does not fit into the context.
            settings: of the new text.
            notices: gets a line if the beginning was left out.

        Raises:
            ModelUnloaded: no model is loaded. ExlLoaderError: see `LoadedModel.generate`.
        """
        model, chosen = self._loaded(), SamplingSettings.from_dict(settings)
        fitted = fit_text(text, lambda part: len(model.tokenizer.prompt_ids(part)),
                          model.ctx_size, chosen.max_new_tokens)
        if len(fitted) < len(text) and notices is not None:
            notices.append(
                f"the model did not read the first {len(text) - len(fitted):,} characters, so that "
                f"the new text has room in the context of {model.ctx_size:,} tokens")
        return model.generate(fitted, chosen)

    def answer(
        self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any],
        notices: list[str] | None = None, *, system: str = "", continued: bool = False,
    ) -> TextGeneration | ContinuedAnswer:
        """Answer a conversation with the model's chat template.

        Args:
            messages: alternating questions and answers that end with a question. The oldest
                are left out until the answer asked for fits into the context.
            settings: of the answer.
            notices: gets a line if messages were left out.
            system: the system prompt, which is never left out; empty for none.
            continued: an answer is last, and the model continues it.

        Raises:
            ModelUnloaded: no model is loaded. PromptTooLong: the last message alone is too
                long. ExlLoaderError: see `LoadedModel.generate`.
        """
        model, chosen = self._loaded(), SamplingSettings.from_dict(settings)
        fitted = model.fit_messages(messages, chosen.max_new_tokens, system=system,
                                    continue_final_message=continued)
        if fitted.notice and notices is not None:
            notices.append(fitted.notice)
        if continued:
            return ContinuedAnswer(model, fitted.ids, chosen)
        return model.generate(fitted.ids, chosen)

    def _loaded(self) -> LoadedModel:
        model = self._model
        if model is None:
            raise ModelUnloaded("The model", actual="not loaded", remedy="Load one first")
        return model


class ContinuedAnswer:
    """An answer that goes on: a generation of ids, whose text continues that of the prompt.

    `LoadedModel.generate` takes the text after ids for one of its own, and would leave out a
    space at its beginning.

    Args:
        model: the loaded model.
        prompt_ids: they end inside the answer.
        settings: of what is added.
    """

    def __init__(
        self, model: LoadedModel, prompt_ids: Sequence[int], settings: SamplingSettings
    ) -> None:
        self.ids = model.generate_ids(prompt_ids, settings)
        self._stream = model.text_stream(
            prompt_ids, stop_strings=settings.stop_strings,
            skip_special_tokens=settings.skip_special_tokens)

    def __enter__(self) -> ContinuedAnswer:
        return self

    def __exit__(self, *error: Any) -> None:
        self.ids.close()

    def __iter__(self) -> Iterator[str]:
        for token_id in self.ids:
            piece, found = self._stream.push(token_id)
            if piece:
                yield piece
            if found:
                return
        last = self._stream.flush()
        if last:
            yield last

    def stop(self) -> None:
        """End the generation after the running step. Does not wait."""
        self.ids.stop()

    @property
    def stats(self) -> GenerationStats:
        """Tokens and seconds so far."""
        return self.ids.stats

    @property
    def finish_reason(self) -> str | None:
        """As `TextGeneration.finish_reason`."""
        return self.ids.finish_reason

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self.ids.seed
