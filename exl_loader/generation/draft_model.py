"""A smaller model that guesses how texts go on. No PyTorch is imported here.

Its guesses are verified by the model itself (`scheduler.Scheduler`), so they decide how soon a
text comes and never what it says: whatever goes wrong with them costs guesses alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedCache, PagedSequence
from ..utils.errors import CacheFull, InvalidSettings
from .jobs import Job

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .forward_model import ForwardModel


@dataclass(eq=False)
class _Text:
    """A job's text in the draft model's cache; `sequence` is None where it has no room.

    `guessed` are the ids that the cache holds behind the first `past_len` ids.
    """

    sequence: PagedSequence | None
    guessed: list[int]


class DraftModel:
    """Guesses for the jobs of one scheduler, all of them together.

    Args:
        model, cache: the draft model and its own pages.
        draft_max: most tokens to guess at a time.
        vocab_size: both models know the ids below; a text with another one gets no guesses.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, draft_max: int, vocab_size: int
    ) -> None:
        self.draft_max = draft_max
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._texts: dict[Job, _Text] = {}

    def guess(self, wanted: Mapping[Job, int]) -> dict[Job, list[int]]:
        """Guess how texts go on.

        What the draft model has not read yet of the texts it reads first, one chunk a call
        for all of them together, so that no stream waits for a long prompt; a text that is
        not through with it has no guesses this time.

        Args:
            wanted: running jobs, each with the most ids to guess.

        Returns:
            job -> ids, where there are any.
        """
        texts = {job: self._text(job) for job, count in wanted.items() if count > 0}
        sequences = {
            job: text.sequence for job, text in texts.items()
            if text.sequence is not None and text.sequence.capacity >= len(job.history)
        }
        guesses: dict[Job, list[int]] = {}
        try:
            ids = self._read(sequences)
            while ids:
                for job, token_id in ids.items():
                    guesses.setdefault(job, []).append(token_id)
                ids = self._step(sequences, {
                    job: [token_id] for job, token_id in ids.items()
                    if len(guesses[job]) < wanted[job]
                    and sequences[job].past_len < sequences[job].capacity
                })
        finally:
            for job, sequence in sequences.items():
                past_len = min(sequence.past_len, len(job.history))
                texts[job].guessed = guesses.get(job, [])[: sequence.past_len - past_len]
                sequence.past_len = past_len
        return guesses

    def release(self, job: Job) -> None:
        """Give a job's pages back; without any it does no harm."""
        text = self._texts.pop(job, None)
        if text is not None and text.sequence is not None:
            self._cache.commit(text.sequence, job.history)
            self._cache.release(text.sequence)

    def _text(self, job: Job) -> _Text:
        """Return the job's text, as far as it agrees with what the cache holds."""
        text = self._texts.get(job)
        if text is None:
            text = self._texts[job] = _Text(self._acquire(job), [])
        if text.sequence is not None:
            for token_id in text.guessed:
                # The last id is left in any case, for its logits.
                place = text.sequence.past_len
                if place >= len(job.history) - 1 or job.history[place] != token_id:
                    break
                text.sequence.past_len += 1
            text.guessed = []
            if job.history[text.sequence.past_len :].max() >= self._vocab_size:
                self.release(job)
                text = self._texts[job] = _Text(None, [])
        return text

    def _acquire(self, job: Job) -> PagedSequence | None:
        ids = job.history
        max_tokens = min(job.max_tokens, self._cache.num_pages * PAGE_LEN)
        if ids.max() >= self._vocab_size or len(ids) > max_tokens:
            return None
        try:
            return self._cache.acquire(
                max_tokens, ids.tolist(), self._model.rope_class(max_tokens)
            )
        except CacheFull:
            return None

    def _read(self, sequences: Mapping[Job, PagedSequence]) -> dict[Job, int]:
        """Read what is missing of the texts, and guess the next id of those that are complete."""
        missing = {
            job: job.history[sequence.past_len :].tolist() for job, sequence in sequences.items()
        }
        entries: dict[Job, list[int]] = {}
        rows_left = self._model.chunk_size
        for job in sorted(missing, key=lambda job: len(missing[job])):
            if rows_left:
                entries[job] = missing[job][:rows_left]
                rows_left -= len(entries[job])
        found = self._step(sequences, entries)
        return {job: i for job, i in found.items() if len(entries[job]) == len(missing[job])}

    def _step(
        self, sequences: Mapping[Job, PagedSequence], entries: Mapping[Job, list[int]]
    ) -> dict[Job, int]:
        """Run ids of some texts, and return the likeliest id behind each."""
        if not entries:
            return {}
        rows = self._model.forward_rows([(sequences[job], ids) for job, ids in entries.items()])
        likeliest = (row.argmax(self._vocab_size) for row in rows)
        return dict(zip(entries, likeliest, strict=True))


def check_vocabularies(
    tokenizers: tuple[Tokenizer | None, Tokenizer | None], vocab_sizes: tuple[int, int]
) -> None:
    """Compare a model's vocabulary with its draft model's.

    Models of one family pad their vocabularies differently, so the tokens count and not the
    sizes; without a tokenizer the sizes are all there is.

    Args:
        tokenizers, vocab_sizes: the model's, then the draft model's.

    Raises:
        InvalidSettings: they are not the same.
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
        what = f"token {first} is another one"
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
