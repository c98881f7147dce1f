"""One request: what it was asked, how far it is, and what it has produced."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..cache.paging import PagedSequence
from ..utils.progress import NullProgress, Progress
from ..utils.tracebacks import drop_locals
from .exchange import Exchange
from .forward_model import LogitsRow
from .logprobs import TokenLogprobs, token_logprobs
from .prompt_lookup import look_up
from .sampling import Sampler
from .settings import SamplingSettings
from .text_stream import TextStream

# Why a generation ended.
EOS, STOP, LENGTH, CONTEXT, CANCELLED, FAILED = (
    "eos", "stop", "length", "context", "cancelled", "failed",
)


@dataclass
class GenerationStats:
    """What a generation took.

    Args:
        prompt_tokens, new_tokens: so far; an end token counts as new, though it is not shown.
        reused_tokens: of the prompt, those that the cache held already.
        accepted_tokens: of the new ones, those that a guess had expected.
        prefill_s: from the first work on the prompt to the first token.
        decode_s: from the first token to the last.
    """

    prompt_tokens: int
    new_tokens: int = 0
    reused_tokens: int = 0
    accepted_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Evaluated prompt tokens a second; 0 before the prompt is done."""
        evaluated = self.prompt_tokens - self.reused_tokens
        return evaluated / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, the first one left out, which belongs to the prompt."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(eq=False)
class NegativeText:
    """What guidance leads away from: a negative prompt, then the same new tokens.

    Args:
        ids: so far; at first the negative prompt's, at least one.
        max_tokens: what ids may reach.
    """

    ids: list[int]
    max_tokens: int
    sequence: PagedSequence | None = None


@dataclass(eq=False)
class Job(Exchange[tuple[int, str]]):
    """A request for tokens and its state. Only the model's thread changes it.

    Args:
        prompt_ids: at least one id.
        settings: how to continue.
        sampler: draws the tokens.
        eos_ids: the model's own ids that end a text.
        max_tokens: prompt and new tokens together may reach this many.
        text: decodes and looks for stop strings; None where only ids are wanted.
        progress: told about the prompt.
        vocab_size: ids from here on are padding, which `logprobs` leaves out; None for none.
        negative: the text of guidance, None without.

    Attributes:
        output: (id, text to show with it), not yet taken by the consumer.
        tail: text to show after the last token.
        finish_reason: None while it runs; then why it ended.
        logprobs: of each new token but an end token; empty where the settings want none.
    """

    prompt_ids: Sequence[int]
    settings: SamplingSettings
    sampler: Sampler
    eos_ids: frozenset[int]
    max_tokens: int
    text: TextStream | None = None
    progress: Progress = field(default_factory=NullProgress)
    vocab_size: int | None = None
    negative: NegativeText | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.sequence: PagedSequence | None = None
        self.tail = ""
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.stats = GenerationStats(len(self.prompt_ids))
        self._history = np.empty(self.max_tokens, np.int64)
        self._history[: len(self.prompt_ids)] = self.prompt_ids
        self._num_tokens = len(self.prompt_ids)
        self._text_ended = False
        self._began_s = 0.0
        self._first_token_s = 0.0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def decoding(self) -> bool:
        """True once the prompt is in the cache: one token a step from here on."""
        return self.stats.new_tokens > 0

    @property
    def prefilled(self) -> bool:
        """True where the next pass is one of decoding.

        Guidance needs the logits of two texts at once, so their last tokens go together.
        """
        if self.negative is None:
            return self.decoding
        return all(len(ids) - sequence.past_len == 1 for sequence, ids in self.texts)

    @property
    def num_sequences(self) -> int:
        """Sequences that a pass has for this job."""
        return 1 if self.negative is None else 2

    @property
    def texts(self) -> list[tuple[PagedSequence, Sequence[int] | npt.NDArray[np.int64]]]:
        """Each sequence with all of its ids, the prompt's own first; none before `begin`."""
        texts: list[tuple[PagedSequence, Sequence[int] | npt.NDArray[np.int64]]] = []
        if self.sequence is not None:
            texts.append((self.sequence, self.history))
        if self.negative is not None and self.negative.sequence is not None:
            texts.append((self.negative.sequence, self.negative.ids))
        return texts

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Prompt and new ids, int64 [tokens so far]."""
        return self._history[: self._num_tokens]

    def draft(self, limit: int) -> list[int]:
        """Return at most `limit` ids that may come next, as many as there is room for."""
        return look_up(
            self.history, self.room_ahead(min(self.settings.prompt_lookup_num_tokens, limit))
        )

    def room_ahead(self, limit: int) -> int:
        """Return how many ids beyond the next one there is room for, at most `limit`."""
        new_left = self.settings.max_new_tokens - self.stats.new_tokens - 1
        return max(0, min(limit, new_left, self.max_tokens - self._num_tokens - 1))

    def begin(self, sequences: Sequence[PagedSequence]) -> None:
        """Start on the prompt, behind what its sequence holds of it already.

        Args:
            sequences: the prompt's, and the negative prompt's where there is one.
        """
        sequence = self.sequence = sequences[0]
        if self.negative is not None:
            self.negative.sequence = sequences[1]
        self._began_s = time.perf_counter()
        self.progress.start("prompt", len(self.prompt_ids), "tokens")
        self.skip(sequence.past_len)

    def skip(self, count: int) -> None:
        """Count tokens of the prompt that were found in the cache."""
        if count:
            self.stats.reused_tokens += count
            self.progress.advance("prompt", count)

    def take_logits(self, row: LogitsRow) -> str | None:
        """Draw the next token from its logits.

        Returns:
            Why the job ends with this token, None where it goes on.
        """
        token_id = self.sampler.sample(row, self.history)
        self._count_token()
        if token_id in self.eos_ids:
            return EOS
        if token_id in self.settings.stop_token_ids:
            return STOP
        self._history[self._num_tokens] = token_id
        self._num_tokens += 1
        if self.negative is not None:
            self.negative.ids.append(token_id)
        if self.settings.logprobs:
            values = row.values[: self.vocab_size]
            self.logprobs.append(token_logprobs(values, token_id, self.settings.logprobs))
        piece, found = self.text.push(token_id) if self.text is not None else ("", False)
        self.output.append((token_id, piece))
        if found:
            self._text_ended = True
            return STOP
        if self.sampler.complete:
            return STOP
        if self.stats.new_tokens >= self.settings.max_new_tokens:
            return LENGTH
        return CONTEXT if self._num_tokens >= self.max_tokens else None

    def let_go(self) -> None:
        """Forget the sequences, which belong to the cache again."""
        self.sequence = None
        if self.negative is not None:
            self.negative.sequence = None

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End the job; a second time changes nothing."""
        if self.finished:
            return
        try:
            if not self.decoding:
                self.progress.finish("prompt")
            if self.text is not None and not self._text_ended:
                self.tail = self.text.flush()
        except BaseException as failure:  # in the caller's own progress, say
            drop_locals(failure)
            error, reason = error or failure, FAILED
        self.error = error
        self.finish_reason = reason

    def _count_token(self) -> None:
        now = time.perf_counter()
        if self.stats.new_tokens == 0:
            self.progress.finish("prompt")
            self.stats.prefill_s = now - self._began_s
            self._first_token_s = now
        self.stats.new_tokens += 1
        self.stats.decode_s = now - self._first_token_s
