"""The model for `ExLlamav2`: a prompt in, a growing text out, as from the web UI's own loaders."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from . import loading, problems
from .contract import say
from .request import (
    StopWatch,
    context_length,
    prompt_ids,
    settings,
    take_processors,
    without_padding,
)

if TYPE_CHECKING:
    from exl_loader import LoadedModel
    from exl_loader.generation.logprobs import TokenLogprobs


@dataclass
class _Figures:
    """What the web UI reads about a request besides its text."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    probabilities: list[dict[str, Any]] = field(default_factory=list)


class Exllamav3Model:
    """A loaded model that is its own tokenizer.

    The web UI recognises its native models by the name of their class, in half a dozen places.
    This class has the name and the methods of one of them, so none of these places has to be
    changed. Every method may be called from any thread.

    Args:
        loaded: what `exl_loader.load` returned.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.config = loaded.config
        # Per thread, because the API reads a request's figures in the thread in which it waits,
        # and many requests may run. The page reads those of its last request in any thread.
        self._of_thread = threading.local()
        self._of_page = _Figures()

    @property
    def device(self) -> torch.device:
        """Return where the web UI must put ids: ids and logits are on the CPU."""
        return torch.device("cpu")

    @property
    def bos_token_id(self) -> int | None:
        return self.loaded.tokenizer.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.loaded.tokenizer.eos_token_id

    @property
    def last_prompt_token_count(self) -> int:
        """Return the number of prompt tokens of this thread's last request."""
        return self._figures().prompt_tokens

    @property
    def last_completion_token_count(self) -> int:
        """Return the number of tokens generated so far for this thread's last request (v4.8)."""
        return self._figures().completion_tokens

    @property
    def last_completion_probabilities(self) -> list[dict[str, Any]]:
        """Return the log probabilities of this thread's last request, one entry per token."""
        return self._figures().probabilities

    @last_completion_probabilities.setter
    def last_completion_probabilities(self, entries: list[dict[str, Any]]) -> None:
        # The API assigns an empty list before each request.
        self._of_thread.figures = _Figures(probabilities=entries)

    def _figures(self) -> _Figures:
        return getattr(self._of_thread, "figures", None) or _Figures()

    def read_as_page(self) -> None:
        """Let this thread read the figures of the page's last request from now on."""
        self._of_thread.figures = self._of_page

    def encode(self, text: str, **_: Any) -> torch.Tensor:
        """Turn text into ids, int64 [1, n], with a BOS token if the model's folder asks for one."""
        with problems.reported():
            return torch.tensor([self.loaded.tokenizer.prompt_ids(text)], dtype=torch.int64)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """Turn ids into text: a tensor of any shape, a list of ids or of tensors, or one id."""
        flat = [int(i) for i in torch.as_tensor(ids).reshape(-1)]
        return self.loaded.decode(flat, skip_special=skip_special_tokens)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        """Turn several rows of ids into text."""
        return [self.decode(row, **options) for row in rows]

    def generate(self, prompt: str, state: Mapping[str, Any]) -> str:
        """Continue a prompt and return the whole text."""
        text = ""
        for so_far in self.generate_with_streaming(prompt, state):
            text = so_far
        return text

    def generate_with_streaming(self, prompt: str, state: Mapping[str, Any]) -> Iterator[str]:
        """Continue a prompt; yield the whole text so far each time it grows.

        Closing the iterator frees the request's pages.

        Raises:
            Exception: what is wrong; it has been shown in the page as well.
        """
        with problems.reported():
            yield from self._stream(prompt, state)
        problems.clear()

    def _stream(self, prompt: str, state: Mapping[str, Any]) -> Iterator[str]:
        tokenizer = self.loaded.tokenizer
        ids = prompt_ids(tokenizer, prompt, state, self.loaded.ctx_size)
        figures = self._of_thread.figures = _Figures(len(ids))
        # Only requests of the API have a stop event of their own.
        if state.get("stop_event") is None:
            self._of_page = figures
        chosen = settings(state, len(ids), self.loaded.ctx_size)
        processors = take_processors(state, chosen)
        watch = StopWatch(state)
        # In a chat the web UI itself drops a space at the start of an answer.
        previous = () if chosen.get("grammar_string") else ids
        output = self.loaded.text_stream(
            previous, stop_strings=chosen["stop_strings"],
            skip_special_tokens=chosen.get("skip_special_tokens", True),
        )
        text, stopped = "", False
        # By ids, so that a stop is noticed after tokens that show no text as well.
        with self.loaded.generate_ids(ids, chosen, progress=watch) as generation:
            watch.generation = generation
            for token_id in generation:
                piece, stopped = output.push(token_id)
                # A streamed answer may continue in another thread than the one it began in.
                self._of_thread.figures = figures
                figures.completion_tokens += 1
                self._note_logprobs(generation, figures.probabilities, processors)
                if piece:
                    text += piece
                    yield text
                if watch.wanted():
                    break
        tail = "" if stopped else output.flush()
        if tail:
            yield text + tail
        problems.note_ending(generation.finish_reason)
        if generation.stats.draft_summary:
            say(generation.stats.draft_summary, level="info")
        length = context_length(state, self.loaded.ctx_size)
        is_full = len(ids) + figures.completion_tokens >= length
        if generation.finish_reason == "context" or (
            generation.finish_reason == "length" and is_full
        ):
            problems.notice(
                self.loaded.context_notice(figures.completion_tokens, length)
            )
        if chosen["max_new_tokens"] == 1:
            self._keep_scores(ids, chosen)

    def get_logits(self, token_ids: Any, **_: Any) -> torch.Tensor:
        """Compute the logits after the last of some ids, float32 [1, 1, vocab_size]."""
        ids = torch.as_tensor(token_ids).reshape(-1).tolist()
        with problems.reported():
            return without_padding(self.loaded.next_logits(ids), self.loaded).reshape(1, 1, -1)

    def get_prompt_logits(self, input_ids: Any) -> torch.Tensor:
        """Compute the logits after each of some ids, float32 [1, n, vocab_size]."""
        ids = torch.as_tensor(input_ids).reshape(-1).tolist()
        with problems.reported():
            return without_padding(self.loaded.prompt_logits(ids), self.loaded).unsqueeze(0)

    def __call__(self, input_ids: Any, labels: Any = None, **_: Any) -> SimpleNamespace:
        """Compute logits, and the mean loss over the labels that are not -100 (perplexity)."""
        logits = self.get_prompt_logits(input_ids)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], torch.as_tensor(labels).reshape(-1)[1:], ignore_index=-100
            )
        return SimpleNamespace(logits=logits, loss=loss)

    def unload(self) -> None:
        """End all generations and free the memory."""
        self.loaded.unload()
        loading.forget(self.loaded)

    def _note_logprobs(
        self, generation: Any, entries: list[dict[str, Any]], processors: Sequence[Any]
    ) -> None:
        """Store the log probabilities so far where the API looks for them."""
        new = [self._entry(one) for one in generation.logprobs[len(entries):]]
        entries += new
        for processor in processors if new else ():
            rows = [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in new]
            processor.token_alternatives = rows[-1]
            # v4.0 does not have this list.
            getattr(processor, "token_alternatives_history", []).extend(rows)

    def _entry(self, one: TokenLogprobs) -> dict[str, Any]:
        top = [{"token": self.decode([i]), "token_id": i, "logprob": p} for i, p in one.top]
        return {"token": self.decode([one.token_id]), "logprob": one.logprob, "top_logprobs": top}

    def _keep_scores(self, ids: list[int], chosen: dict[str, Any]) -> None:
        """Store the samplers' candidates where the page's Logits tab looks for them."""
        hijack = sys.modules.get("modules.sampler_hijack")
        if hijack is None:
            return
        scores = self.loaded.filtered_logits(ids, chosen)
        hijack.global_scores = scores.unsqueeze(0)  # type: ignore[attr-defined]
