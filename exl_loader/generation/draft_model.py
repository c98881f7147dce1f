"""Guesses the next tokens of texts by a smaller model. No PyTorch is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedCache, PagedSequence
from ..utils.errors import CacheFull, InvalidSettings
from .draft_pacing import READ_AT_ONCE, PassSeconds

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .forward_model import ForwardModel
    from .jobs import Job


@dataclass(eq=False)
class _Text:
    """A job's text in the draft model's cache.

    Args:
        sequence: its pages.
        guessed: ids that the cache holds after the first `past_len` ids.
    """

    sequence: PagedSequence
    guessed: list[int]


class DraftModel:
    """Guesses the next tokens of all jobs of one scheduler together.

    Args:
        model: the draft model.
        cache: its own pages.
        draft_max: most tokens to guess at a time.
        vocab_size: number of ids that both models know; a text with another id gets no guesses.

    Attributes:
        seconds: how long its steps take.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, draft_max: int, vocab_size: int
    ) -> None:
        self.draft_max = draft_max
        self.seconds = PassSeconds()
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._texts: dict[Job, _Text] = {}
        # Jobs whose texts `read` reads, in the order of their turns.
        self._reading: dict[Job, None] = {}

    def num_unread(self, job: Job) -> int:
        """Return how many ids of a text the draft model has to read before it guesses.

        Returns:
            At least 1; 0 if the text cannot be guessed now, because it has an id that the draft
            model lacks, is longer than its context, or finds no pages, or because `read` has to
            read it first.
        """
        if job in self._reading:
            return 0
        text = self._text(job)
        return len(job.history) - text.sequence.past_len if text is not None else 0

    def guess(self, wanted: Mapping[Job, int]) -> dict[Job, list[int]]:
        """Guess the next tokens of texts.

        A text of which the draft model has to read more than a few ids gets no guesses. `read`
        reads it, so that other jobs do not wait for it in this pass.

        Args:
            wanted: job -> most ids to guess, at least one; jobs whose `num_unread` is above 0.

        Returns:
            job -> guessed ids, for jobs that have any.
        """
        texts: dict[Job, _Text] = {}
        rows_left = self._model.chunk_size
        for job in sorted(wanted, key=self._unread_len):
            unread = self._unread_len(job)
            if unread > READ_AT_ONCE:
                self._reading[job] = None
            elif unread <= rows_left:
                rows_left -= unread
                texts[job] = self._texts[job]
        sequences = {job: text.sequence for job, text in texts.items()}
        guesses: dict[Job, list[int]] = {}
        try:
            ids = self._step(sequences, {
                job: job.history[sequence.past_len :].tolist()
                for job, sequence in sequences.items()
            })
            for job, sequence in sequences.items():
                self._commit(job, sequence)
            while ids:
                for job, token_id in ids.items():
                    guesses.setdefault(job, []).append(token_id)
                ids = self._step(sequences, {
                    job: [token_id] for job, token_id in ids.items()
                    if len(guesses[job]) < wanted[job]
                    and sequences[job].past_len < sequences[job].end_of_pass(len(job.history))
                })
        finally:
            for job, sequence in sequences.items():
                past_len = min(sequence.past_len, len(job.history))
                texts[job].guessed = guesses.get(job, [])[: sequence.past_len - past_len]
                sequence.past_len = past_len
        return guesses

    @property
    def next_to_read(self) -> Job | None:
        """The job whose text `read` should read next; None if there is none."""
        return next(iter(self._reading), None)

    def read(self, job: Job) -> None:
        """Read one chunk of a text that `guess` found to be long; texts take turns."""
        del self._reading[job]
        text = self._text(job)
        if text is None:
            return
        sequence = text.sequence
        # The last id is left for `guess`, which needs its logits.
        ids = job.history[sequence.past_len : -1][: self._model.chunk_size].tolist()
        if ids:
            with self.seconds.measure_reading(len(ids)):
                self._model.forward_rows([(sequence, ids)], "none")
            self._commit(job, sequence)
        if self._unread_len(job) > READ_AT_ONCE:
            self._reading[job] = None

    def cut(self, job: Job) -> None:
        """Drop what the cache holds of tokens that a job has taken back."""
        text = self._texts.get(job)
        if text is not None:
            text.guessed = []
            self._cache.cut(text.sequence, len(job.history) - 1)

    def release(self, job: Job) -> None:
        """Release a job's pages; does nothing if it has none."""
        self._reading.pop(job, None)
        text = self._texts.pop(job, None)
        if text is not None:
            self._cache.commit(text.sequence, job.history)
            self._cache.release(text.sequence)

    def _unread_len(self, job: Job) -> int:
        return len(job.history) - self._texts[job].sequence.past_len

    def _commit(self, job: Job, sequence: PagedSequence) -> None:
        """Let other texts find the pages that have been filled."""
        if sequence.past_len >= len(sequence.keys) * PAGE_LEN:
            self._cache.commit(sequence, job.history)

    def _text(self, job: Job) -> _Text | None:
        """Return the job's text, with its sequence cut where the last guesses were wrong.

        Returns:
            None if the text cannot be guessed; it then holds no pages.
        """
        text = self._texts.get(job)
        if text is None:
            sequence = self._acquire(job)
            if sequence is None:
                return None
            text = self._texts[job] = _Text(sequence, [])
        sequence = text.sequence
        for token_id in text.guessed:
            # The last id is never skipped, because its logits have to be computed.
            index = sequence.past_len
            if index >= len(job.history) - 1 or job.history[index] != token_id:
                break
            sequence.past_len += 1
        text.guessed = []
        if sequence.past_len >= len(job.history):
            # The pass with the last guesses has failed, so that the text has not grown.
            self._cache.cut(sequence, len(job.history) - 1)
        known = job.history[sequence.past_len :].max() < self._vocab_size
        if known and self._has_room(sequence, len(job.history)):
            return text
        self.release(job)
        return None

    def _has_room(self, sequence: PagedSequence, num_tokens: int) -> bool:
        """Take the pages that a text needs; return False if there are none."""
        if num_tokens > sequence.rope_len:
            return False
        try:
            self._cache.grow(sequence, num_tokens)
        except CacheFull:
            return False
        return True

    def _acquire(self, job: Job) -> PagedSequence | None:
        ids = job.history
        reach = min(job.max_tokens, self._cache.num_pages * PAGE_LEN)
        if ids.max() >= self._vocab_size or len(ids) > reach:
            return None
        try:
            return self._cache.acquire(
                min(reach, len(ids) + 1), ids, self._model.rope_class(reach),
                rope_len=reach,
            )
        except CacheFull:
            return None

    def _step(
        self, sequences: Mapping[Job, PagedSequence], entries: Mapping[Job, list[int]]
    ) -> dict[Job, int]:
        """Run ids of some texts, and return the likeliest next id of each."""
        if not entries:
            return {}
        with self.seconds.measure(sum(map(len, entries.values()))):
            rows = self._model.forward_rows([(sequences[job], ids) for job, ids in entries.items()])
            likeliest = [row.argmax(self._vocab_size) for row in rows]
        return dict(zip(entries, likeliest, strict=True))


def check_vocabularies(
    tokenizers: tuple[Tokenizer | None, Tokenizer | None], vocab_sizes: tuple[int, int]
) -> None:
    """Compare a model's vocabulary with its draft model's.

    Tokens are compared and not sizes, because models of one family pad their vocabularies
    differently. Without tokenizers, sizes are compared.

    Args:
        tokenizers, vocab_sizes: the model's, then the draft model's.

    Raises:
        InvalidSettings: the vocabularies differ.
    """
    model, draft = tokenizers
    if model is None or draft is None:
        same, what = vocab_sizes[0] == vocab_sizes[1], f"{vocab_sizes[1]} tokens"
        expected = f"a model with the same vocabulary, of {vocab_sizes[0]} tokens"
    else:
        expected, size = "a model with the same vocabulary", min(model.vocab_size, draft.vocab_size)
        differing = (i for i in range(size) if _token(model, i) != _token(draft, i))
        first = next(differing, None)
        same = first is None
        what = f"token {first} differs"
        if same and model.vocab_size != draft.vocab_size:
            same, what = False, f"{draft.vocab_size} tokens instead of {model.vocab_size}"
    if not same:
        raise InvalidSettings(
            "model_draft", expected=expected, actual=what,
            remedy="Choose a smaller model of the same family, or leave model_draft empty",
        )


def _token(tokenizer: Tokenizer, token_id: int) -> bytes | str:
    if tokenizer.bytes_known:
        return tokenizer.token_bytes(token_id)
    return tokenizer.decode([token_id], skip_special=False)
