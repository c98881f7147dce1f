"""Guesses the next tokens of the jobs of a pass: each from its own text, or by a draft model.

The model verifies every guess (`scheduler.Scheduler`), so guesses change the speed of a text and
never the text. No PyTorch is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .draft_pacing import DraftPacing, Offer, PassSeconds

if TYPE_CHECKING:
    from .draft_model import DraftModel
    from .jobs import Job

# Lengths of the text's end that are looked up, the longest first. A match of one token is too
# rarely right to be worth the rows of its guess.
_NGRAM_SIZES = (4, 3, 2)


class Drafts:
    """The drafts of one scheduler's jobs.

    Args:
        most_rows: most rows of a pass that computes the logits of all of them.
        draft_model: None for none.

    Attributes:
        passes: how long the model's passes take.
        pacing: chooses the lengths of drafts.
    """

    def __init__(self, most_rows: int, draft_model: DraftModel | None) -> None:
        self.draft_model = draft_model
        self.passes = PassSeconds()
        self.pacing = DraftPacing(self.passes, draft_model.seconds if draft_model else None)
        self._in_flight: dict[int, DraftPacing] = {}
        self._most_rows = most_rows

    def add_seconds(self, rows: int, seconds: float, num_parts: int) -> None:
        """Count a pass that was in flight; `num_parts` as in `next`."""
        self._pacing(num_parts).passes.add(rows, seconds)

    def next(self, jobs: Sequence[Job], num_parts: int = 1) -> list[list[int]]:
        """Guess the next tokens of each job; none where a draft would be a loss.

        Args:
            jobs: of the pass.
            num_parts: number of passes in flight among which all jobs are divided. The times of
                passes are kept apart by it, because a pass beside others takes the time of the
                slowest machine, and one that is alone that of all machines and their connection.
        """
        pacing = self._pacing(num_parts)
        num_rows = sum(job.num_sequences for job in jobs)
        rows_left = self._most_rows - num_rows
        guesses: dict[Job, list[int]] = {}
        offers: dict[Job, Offer] = {}
        for job in jobs:
            most = min(rows_left // job.num_sequences, _most_draft(job))
            offer = self._offer(job, most, guesses, pacing, len(jobs), num_rows)
            if offer is not None:
                offers[job] = offer
        counts = pacing.lengths(list(offers.values()), len(jobs), num_rows, rows_left)
        wanted: dict[Job, int] = {}
        for (job, offer), count in zip(offers.items(), counts, strict=True):
            if offer.unread and count:
                wanted[job] = count
            guesses[job] = guesses.get(job, [])[:count]
            if not count and pacing.passes.is_known(num_rows):
                job.stats.skipped_drafts += 1
        if self.draft_model is not None and wanted:
            for job, guess in self.draft_model.guess(wanted).items():
                guesses[job] = guess
                job.guessed.add(len(job.history), guess)
                job.guessed.probing = False
        return [guesses.get(job, []) for job in jobs]

    def cut(self, job: Job) -> None:
        """Drop what the draft model holds of tokens that a job has taken back."""
        if self.draft_model is not None:
            self.draft_model.cut(job)

    def release(self, job: Job) -> None:
        """Release what a job holds of the draft model; does nothing if that is nothing."""
        if self.draft_model is not None:
            self.draft_model.release(job)

    def _pacing(self, num_parts: int) -> DraftPacing:
        if num_parts == 1:
            return self.pacing
        if num_parts not in self._in_flight:
            steps = self.draft_model.seconds if self.draft_model is not None else None
            self._in_flight[num_parts] = type(self.pacing)(PassSeconds(), steps)
        return self._in_flight[num_parts]

    def _offer(
        self, job: Job, most: int, guesses: dict[Job, list[int]], pacing: DraftPacing,
        num_jobs: int, num_rows: int,
    ) -> Offer | None:
        """Return what could be drafted for a job.

        Args:
            most: most tokens.
            guesses: gets what was looked up.
            pacing: chooses between offers.
            num_jobs, num_rows: of the pass.
        """
        job.looked_up.settle(job.history)
        job.guessed.settle(job.history)
        found = look_up(
            job.history, job.room_ahead(min(job.settings.prompt_lookup_num_tokens, most))
        )
        job.looked_up.add(len(job.history), found)
        looked_up = Offer(job.looked_up, len(found), job.num_sequences) if found else None
        by_model = None
        if self.draft_model is not None:
            count = job.room_ahead(min(self.draft_model.draft_max, most))
            unread = self.draft_model.num_unread(job) if count else 0
            if unread:
                by_model = Offer(job.guessed, count, job.num_sequences, unread)
        offer: Offer | None
        if looked_up is not None and by_model is not None:
            offer = pacing.better(looked_up, by_model, num_jobs, num_rows)
        else:
            offer = looked_up or by_model
        if offer is looked_up:
            guesses[job] = found
        return offer


def look_up(history: npt.NDArray[np.int64], count: int) -> list[int]:
    """Return the `count` ids that followed the last earlier occurrence of the text's end.

    This is prompt lookup decoding.

    Args:
        history: int64 [tokens so far].
        count: number of ids; 0 for none.

    Returns:
        `count` ids, or none if the end did not occur before.
    """
    if count <= 0:
        return []
    for size in _NGRAM_SIZES:
        starts = len(history) - size
        if starts < 1:
            continue
        same = history[:starts] == history[-size]
        for i in range(1, size):
            same &= history[i : i + starts] == history[i - size]
        matches = np.flatnonzero(same)
        if len(matches):
            first = int(matches[-1]) + size
            # If fewer than `count` ids follow, the text is repeating itself, so the guess does.
            return np.resize(history[first:], count).tolist()
    return []


def _most_draft(job: Job) -> int:
    """Return how many tokens can be run in one pass with the last one of each of a job's texts."""
    return min(sequence.end_of_pass(len(ids) - 1) - len(ids) for sequence, ids in job.texts)
