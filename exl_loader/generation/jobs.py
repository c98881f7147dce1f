"""A job: one request for new tokens, its progress and its output."""

from __future__ import annotations

import time
from collections.abc import Collection, MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cache.paging import PagedSequence
from ..utils.errors import drop_locals
from ..utils.progress import Progress
from .draft_pacing import LOOKUP_PRIOR, MODEL_PRIOR, Acceptance
from .exchange import Exchange
from .forward_model import LogitsRow
from .logprobs import TokenLogprobs, token_logprobs
from .loops import is_loop
from .rewind import Rewind
from .sampling import Sampler
from .settings import SamplingSettings
from .text_stream import TextStream

# Reasons why a generation ends.
EOS, STOP, LOOP, LENGTH, CONTEXT, CANCELLED, FAILED = (
    "eos", "stop", "loop", "length", "context", "cancelled", "failed",
)


@dataclass
class GenerationStats:
    """Tokens and seconds of a generation so far.

    Args:
        prompt_tokens: number of prompt tokens.
        new_tokens: number of new tokens; an end token counts, although it is not shown.
        reused_tokens: number of prompt tokens that the cache already held.
        preemptions: how often its pages were given to older requests, or what they held was lost
            in another machine's error; each time its text was evaluated again, as far as the
            cache had lost it.
        drafted_tokens: number of tokens that were guessed in drafts and run with the text.
        accepted_tokens: number of these that were right, which are new tokens of the text.
        skipped_drafts: number of passes in which a draft was possible and left out, because it
            would have taken more time than it would have saved.
        prefill_s: seconds from the start of the prompt to the first token.
        decode_s: seconds from the first token to the last.
    """

    prompt_tokens: int
    new_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    skipped_drafts: int = 0
    preemptions: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Evaluated prompt tokens per second; 0 before the first new token."""
        evaluated = self.prompt_tokens - self.reused_tokens
        return evaluated / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def draft_summary(self) -> str:
        """What became of the drafts, for people; empty if none was possible."""
        parts = []
        if self.drafted_tokens:
            parts.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens right")
        if self.skipped_drafts:
            parts.append(f"no draft in {self.skipped_drafts} passes that are faster without")
        return ", ".join(parts)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, without the first one, whose time is the prompt's."""
        return max(0, self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(eq=False)
class NegativeText:
    """The negative text of guidance: the negative prompt, then the same new tokens.

    Args:
        ids: all ids so far; at first those of the negative prompt, at least one.
        max_tokens: number of ids that it may reach.
        sequence: its pages; None while the job waits for pages, and after the end.
    """

    ids: list[int]
    max_tokens: int
    sequence: PagedSequence | None = None


@dataclass(frozen=True)
class JobState:
    """What a job was before a token: all that drawing tokens changes, but no seconds."""

    num_tokens: int
    num_logprobs: int
    new_tokens: int
    accepted_tokens: int
    sampler: Sampler
    text: TextStream


@dataclass(eq=False)
class Job(Exchange[tuple[int, str]]):
    """A request for new tokens and its state. Only the model's thread changes it.

    Args:
        prompt_ids: at least one id.
        settings: how to continue the prompt.
        sampler: draws the tokens.
        eos_ids: the model's ids that end a text.
        max_tokens: number of tokens that prompt and answer may have together.
        text: decodes tokens and finds stop strings; None if only ids are needed.
        rewind: keeps banned strings out of the text; None if there are none.
        progress: reports the number of evaluated prompt tokens.
        vocab_size: ids from here on are padding, which `logprobs` omits.
        negative: the negative text of guidance; None without guidance.

    Attributes:
        output: (id, text to show with it) of tokens that the caller has not taken yet.
        last_text: text to show after the last token.
        finish_reason: None while it runs; then why it ended.
        logprobs: one entry per new token except an end token, if the settings ask for them.
            Like `history` it includes tokens that may still be taken back.
        sequence: the pages of prompt and answer; None while it waits for pages, and after the
            end.
        arrival: jobs are numbered in the order in which they arrived.
        last_pass: passes in flight are numbered in the order of their starts; its newest one.
        looked_up, guessed: how often prompt lookup and the draft model were right.
    """

    prompt_ids: Sequence[int]
    settings: SamplingSettings
    sampler: Sampler
    eos_ids: frozenset[int]
    max_tokens: int
    text: TextStream | None
    rewind: Rewind | None
    progress: Progress
    vocab_size: int
    negative: NegativeText | None

    def __post_init__(self) -> None:
        super().__init__()
        self.sequence: PagedSequence | None = None
        self.arrival = self.last_pass = 0
        self.looked_up = Acceptance(LOOKUP_PRIOR)
        self.guessed = Acceptance(MODEL_PRIOR)
        self.last_text = ""
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self.stats = GenerationStats(len(self.prompt_ids))
        self._history = np.empty(self.max_tokens, np.int64)
        self._history[: len(self.prompt_ids)] = self.prompt_ids
        self._num_tokens = len(self.prompt_ids)
        self._text_ended = False
        self._prompt_done = 0
        self._began_s: float | None = None
        self._first_token_s: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def decoding(self) -> bool:
        """True once the first new token was drawn."""
        return self._first_token_s is not None

    @property
    def prefilled(self) -> bool:
        """True if the job's next pass is a decoding pass.

        Guidance needs the logits of both texts at once, so their last tokens are in one pass.
        Otherwise the first token comes with the last chunk of the prompt.
        """
        if self.negative is None and not self.decoding:
            return False
        return all(len(ids) - sequence.past_len == 1 for sequence, ids in self.texts)

    @property
    def num_sequences(self) -> int:
        """Number of sequences that the job has in a pass."""
        return 1 if self.negative is None else 2

    @property
    def texts(self) -> list[tuple[PagedSequence, Sequence[int] | npt.NDArray[np.int64]]]:
        """Each sequence with all of its ids, the prompt's own first; empty without pages."""
        texts: list[tuple[PagedSequence, Sequence[int] | npt.NDArray[np.int64]]] = []
        if self.sequence is not None:
            texts.append((self.sequence, self.history))
        if self.negative is not None and self.negative.sequence is not None:
            texts.append((self.negative.sequence, self.negative.ids))
        return texts

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Ids of prompt and answer, int64 [tokens so far]."""
        return self._history[: self._num_tokens]

    @property
    def num_answered(self) -> int:
        """Number of the answer's tokens in the history."""
        return self._num_tokens - len(self.prompt_ids)

    @property
    def num_final(self) -> int:
        """Number of the answer's tokens that are never taken back."""
        return self.num_answered if self.rewind is None else self.rewind.num_final

    @property
    def went_back(self) -> bool:
        """True if the last call of `take_logits` took tokens back."""
        return self.rewind is not None and self.rewind.went_back

    @property
    def num_held(self) -> int:
        """Number of characters of the text that have begun and are not shown yet."""
        return self.text.num_held if self.text is not None else 0

    def room_ahead(self, limit: int) -> int:
        """Return how many ids may follow the next one, at most `limit`."""
        new_left = self.settings.max_new_tokens - self.stats.new_tokens - 1
        return max(0, min(limit, new_left, self.max_tokens - self._num_tokens - 1))

    def begin(self, sequences: Sequence[PagedSequence]) -> None:
        """Begin the text, or go on with it, after the tokens that its sequence already holds.

        Args:
            sequences: that of the prompt, and with guidance that of the negative prompt.
        """
        self.sequence = sequences[0]
        if self.negative is not None:
            self.negative.sequence = sequences[1]
        if self._began_s is None:
            self._began_s = time.perf_counter()
            self.progress.start("prompt", len(self.prompt_ids), "tokens")
        self.count_prompt(reused=True)

    def count_prompt(self, reused: bool) -> None:
        """Count the prompt tokens that the sequence holds and that were not counted before.

        Args:
            reused: they were found in the cache.
        """
        assert self.sequence is not None
        count = min(self.sequence.past_len, len(self.prompt_ids)) - self._prompt_done
        if count <= 0:
            return
        self._prompt_done += count
        if reused:
            self.stats.reused_tokens += count
        self.progress.advance("prompt", count)

    def take_logits(self, row: LogitsRow) -> str | None:
        """Draw the next token from its logits; see also `Rewind.take_logits`.

        Returns:
            Why the job ends with this token; None if it continues.
        """
        if self.rewind is not None:
            return self.rewind.take_logits(self, row)
        return self.draw(row, self.output)

    def draw(
        self, row: LogitsRow, output: MutableSequence[tuple[int, str]],
        excluded: Collection[int] = (),
    ) -> str | None:
        """Draw the next token from its logits.

        Args:
            row: the logits after the last token.
            output: gets the token with its text, unless it is an end token.
            excluded: ids that are not drawn.

        Returns:
            Why the job ends with this token; None if it continues.

        Raises:
            NoTokenLeft: no token may be drawn; the job has not changed.
            As `Sampler.sample`.
        """
        token_id = self.sampler.sample(row, self.history, excluded)
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
        output.append((token_id, piece))
        if found:
            self._text_ended = True
            return STOP
        if self.sampler.complete:
            return STOP
        if is_loop(self.history[len(self.prompt_ids) :], self.settings.loop_detect_window):
            return LOOP
        if self.stats.new_tokens >= self.settings.max_new_tokens:
            return LENGTH
        return CONTEXT if self._num_tokens >= self.max_tokens else None

    def state(self) -> JobState:
        """Return what to restore if tokens from here on are taken back; the job has a text."""
        assert self.text is not None
        return JobState(
            self._num_tokens, len(self.logprobs), self.stats.new_tokens,
            self.stats.accepted_tokens, self.sampler.copy(), self.text.copy(),
        )

    def restore(self, state: JobState) -> None:
        """Take back all tokens since a state, which is used up."""
        if self.negative is not None:
            num_kept = len(self.negative.ids) - (self._num_tokens - state.num_tokens)
            del self.negative.ids[num_kept:]
        del self.logprobs[state.num_logprobs :]
        self._num_tokens = state.num_tokens
        self.stats.new_tokens = state.new_tokens
        self.stats.accepted_tokens = state.accepted_tokens
        self.sampler, self.text = state.sampler, state.text
        self._text_ended = False

    def remaining_text(self) -> str:
        """Return the text that would be shown if the job ended now."""
        if self.text is None or self._text_ended:
            return ""
        return self.text.copy().flush()

    def drop_sequences(self) -> None:
        """Drop the sequences, whose pages were released."""
        self.sequence = None
        if self.negative is not None:
            self.negative.sequence = None

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End the job; a second call does nothing."""
        if self.finished:
            return
        try:
            if not self.decoding:
                self.progress.finish("prompt")
            if self.rewind is not None:
                self.rewind.finish(self)
            if self.text is not None and not self._text_ended:
                self.last_text = self.text.flush()
        except BaseException as failure:  # for example in the caller's progress callback
            drop_locals(failure)
            error, reason = error or failure, FAILED
        self.error = error
        self.finish_reason = reason

    def _count_token(self) -> None:
        now = time.perf_counter()
        if self._first_token_s is None:
            assert self._began_s is not None
            self.progress.finish("prompt")
            self.stats.prefill_s = now - self._began_s
            self._first_token_s = now
        self.stats.new_tokens += 1
        self.stats.decode_s = now - self._first_token_s
