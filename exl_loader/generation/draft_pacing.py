"""Chooses how many tokens to draft: as many as give the most new tokens a second, or none.

A drafted token makes a pass longer, and pays only if it is right often enough. Both are measured:
how often the guesses of a text are right, by their position in the guess (`Acceptance`), and how
long passes take, by their number of rows (`PassSeconds`). The times decide only how much is
drafted. They never change a text, because the model verifies every guess. No PyTorch.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

# The weight that older guesses keep when one is counted: the newest twenty have most of the
# weight, so that a text whose nature changes is noticed.
_KEPT = 0.95

# Guesses of a new text count as if two guessed tokens had been right this often.
LOOKUP_PRIOR = 0.7
MODEL_PRIOR = 0.7
_PRIOR_WEIGHT = 2.0

# Until a pass of more rows has been measured, each row is assumed to take this share of the
# shortest pass that has been. If it takes more, that is measured in one pass.
_ROW_SHARE = 0.1

# The share of the difference by which a measurement moves the known time. Other work on the
# machine only makes a pass longer, so a shorter time is nearer to the truth.
_LONGER, _SHORTER = 0.1, 0.4

# A first measurement counts at most as so many times what was estimated, likewise.
_MOST_LONGER = 2.0

# The drafts of a pass of n rows together take a multiple of n / 4 rows, because each number of
# rows has to be measured, and the calls of each are recorded.
_ROWS_PER_STEP = 4

# A time that was last measured this many passes ago is measured again when it is needed: texts
# grow, and the machine's other work changes.
_PASSES_KEPT = 200

# A first measurement of so many times what was estimated may have been disturbed, and is kept for
# fewer passes.
_DOUBTFUL, _DOUBTFUL_KEPT = 1.3, 20

# Drafts have to promise so many times the tokens of none, because what surrounds them takes time
# as well, such as reading texts for them.
_LEAST_GAIN = 1.03

# Share of a text's time in which the draft model may guess although that has been a loss. What is
# not used is kept, up to so many passes, for the time after guesses were right for long: a few
# wrong ones may have been chance, and later there would be more to read before each guess.
_PROBE_SHARE = 0.02
_MOST_CREDIT = 8

# Most ids of a text that the draft model reads in the same step as its first guess.
READ_AT_ONCE = 8


class Acceptance:
    """How often the guesses of one source for one text were right.

    Args:
        prior: how often a guessed token is right in texts of which nothing is known.

    Attributes:
        probing: the next guess is made although guesses have been a loss.
        credit: seconds that such guesses may take.
    """

    def __init__(self, prior: float) -> None:
        self.probing = False
        self.credit = 0.0
        self._prior = prior
        # By position in the guess: how often all tokens up to it were right, and how often all
        # before it were, both with less weight for older guesses.
        self._right: list[float] = []
        self._tried: list[float] = []
        self._open: tuple[int, list[int]] | None = None

    def add(self, index: int, ids: list[int]) -> None:
        """Remember a guess, until the text shows how much of it is right.

        A guess that is made while an older one is still open is not counted.

        Args:
            index: number of tokens of the text before the guess.
            ids: the guessed ids, whether all of them are drafted or not.
        """
        if self._open is None and ids:
            self._open = index, ids

    def settle(self, history: npt.NDArray[np.int64]) -> None:
        """Count the open guess if the text, int64 [tokens so far], shows how much is right."""
        if self._open is None:
            return
        index, ids = self._open
        if index > len(history):
            # The text was shortened.
            self._open = None
            return
        known = history[index : index + len(ids)].tolist()
        right = next((i for i, token_id in enumerate(known) if token_id != ids[i]), len(known))
        if right == len(known) < len(ids):
            return
        self._open = None
        self._count(right, min(right + 1, len(ids)))

    @property
    def is_known(self) -> bool:
        """True once a guess was counted."""
        return bool(self._tried)

    def chances(self, count: int) -> list[float]:
        """Return for each of the first `count` tokens the chance that all up to it are right."""
        mean = (sum(self._right) + self._prior * _PRIOR_WEIGHT) / (sum(self._tried) + _PRIOR_WEIGHT)
        chances, chance = [], 1.0
        for position in range(count):
            if position < len(self._tried):
                chance *= (self._right[position] + mean) / (self._tried[position] + 1)
            else:
                chance *= mean
            chances.append(chance)
        return chances

    def _count(self, right: int, tried: int) -> None:
        self._right = [_KEPT * count for count in self._right]
        self._tried = [_KEPT * count for count in self._tried]
        for position in range(tried):
            if position == len(self._tried):
                self._right.append(0.0)
                self._tried.append(0.0)
            self._right[position] += position < right
            self._tried[position] += 1


class PassSeconds:
    """How long the passes of one model take, by their number of rows.

    Args:
        clock: returns seconds; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._passes = 0
        self._first_seen: set[int] = set()
        self._seconds: dict[int, float] = {}
        self._measured_at: dict[int, int] = {}
        self._kept: dict[int, int] = {}
        self._rows: list[int] = []
        self._read_row = 0.0

    @contextmanager
    def measure(self, rows: int) -> Iterator[None]:
        """Measure a pass, which is the body of a `with` block."""
        began = self._clock()
        yield
        self.add(rows, self._clock() - began)

    @contextmanager
    def measure_reading(self, rows: int) -> Iterator[None]:
        """Measure a pass that reads rows without guessing."""
        began = self._clock()
        yield
        seconds = self._clock() - began
        self._read_row = max(0.0, seconds - self.estimate(1)) / rows

    def is_known(self, rows: int) -> bool:
        """True if a pass of so many rows has been measured lately."""
        return rows in self._seconds

    def estimate(self, rows: int) -> float:
        """Return how long a pass takes; 0 while nothing is known.

        Between measured numbers of rows it is interpolated, and beyond them extrapolated.
        """
        known = self._seconds.get(rows)
        if known is not None:
            return known
        if not self._rows:
            return 0.0
        first = self._rows[0]
        index = bisect_left(self._rows, rows)
        if index == 0:
            return self._seconds[first] / (1 + _ROW_SHARE * (first - rows))
        below = self._rows[index - 1]
        if index == len(self._rows):
            row = _ROW_SHARE * self._seconds[first]
            if below > first:
                row = max(0.0, self._seconds[below] - self._seconds[first]) / (below - first)
            return self._seconds[below] + row * (rows - below)
        above = self._rows[index]
        share = (rows - below) / (above - below)
        return self._seconds[below] * (1 - share) + self._seconds[above] * share

    def estimate_reading(self, rows: int) -> float:
        """Return how long the next guess takes with so many rows to read before it.

        If they are many, a pass of its own reads them. Each row is assumed to take as long as in
        the last such pass, and nothing before the first.
        """
        if rows <= READ_AT_ONCE:
            return self.estimate(rows)
        return 2 * self.estimate(1) + self._read_row * rows

    def add(self, rows: int, seconds: float) -> None:
        """Count a pass that was measured."""
        if rows not in self._first_seen:
            # The first pass of a shape takes longer, because its calls are recorded.
            self._first_seen.add(rows)
            return
        self._passes += 1
        kept = _PASSES_KEPT
        known = self._seconds.get(rows)
        if known is None:
            known = seconds
            if self._rows:
                estimate = self.estimate(rows)
                known = min(seconds, _MOST_LONGER * estimate)
                if known > _DOUBTFUL * estimate and rows not in self._kept:
                    kept = _DOUBTFUL_KEPT
        weight = _LONGER if seconds > known else _SHORTER
        self._seconds[rows] = known + weight * (seconds - known)
        self._measured_at[rows] = self._passes
        self._kept[rows] = kept
        for other, measured_at in list(self._measured_at.items()):
            if self._passes - measured_at > self._kept[other]:
                del self._seconds[other], self._measured_at[other]
        self._rows = sorted(self._seconds)


@dataclass(frozen=True)
class Offer:
    """Tokens that could be drafted for one job in the next pass.

    Args:
        acceptance: of the source that guesses them.
        most: most tokens.
        rows: rows of the pass that each token takes: one for each text of the job.
        unread: number of ids that the draft model has to read before it guesses; 0 if the
            guess needs no draft model.
    """

    acceptance: Acceptance
    most: int
    rows: int
    unread: int = 0

    @property
    def lags(self) -> bool:
        """True if the draft model has to read much of the text first, because it was off.

        A text of which nothing is known yet is read in any case.
        """
        return self.unread > READ_AT_ONCE and self.acceptance.is_known

    @property
    def rows_of_first_step(self) -> int:
        """Rows of the draft model's first step; what it reads of a new text is read only once."""
        return self.unread if self.acceptance.is_known else 1


class DraftPacing:
    """Chooses the lengths of drafts.

    Args:
        passes: of the model.
        steps: of the draft model; None without one.
    """

    def __init__(self, passes: PassSeconds, steps: PassSeconds | None = None) -> None:
        self.passes = passes
        self._steps = steps or PassSeconds()

    def lengths(
        self, offers: Sequence[Offer], num_jobs: int, num_rows: int, rows_left: int
    ) -> list[int]:
        """Choose how many tokens to draft in the next pass.

        Args:
            offers: at most one a job.
            num_jobs: number of jobs in the pass.
            num_rows: its rows without drafts.
            rows_left: most rows of all drafts together.

        Returns:
            The number of tokens of each offer; 0 for those that would be a loss.
        """
        if not offers or not self.passes.is_known(num_rows):
            # Without the time of a pass without drafts nothing can be compared with it.
            return [0] * len(offers)
        _, counts = self._best(offers, num_jobs, num_rows, rows_left)
        for offer, count in zip(offers, counts, strict=True):
            rows_left -= offer.rows * count
            num_rows += offer.rows * count
        seconds = self.passes.estimate(num_rows)
        for i, offer in enumerate(offers):
            if not offer.unread:
                continue
            credit = offer.acceptance.credit + _PROBE_SHARE * seconds / num_jobs
            offer.acceptance.credit = min(credit, _MOST_CREDIT * seconds)
            if not counts[i] and offer.most and offer.rows <= rows_left:
                counts[i] = self._probe(offer, num_rows)
                rows_left -= offer.rows * counts[i]
        return counts

    def better(self, first: Offer, second: Offer, num_jobs: int, num_rows: int) -> Offer:
        """Return which of two offers for one job gives more tokens a second; if equal, `first`."""
        rates = [
            self._best([offer], num_jobs, num_rows, offer.rows * offer.most)[0]
            for offer in (first, second)
        ]
        return second if rates[1] > rates[0] else first

    def _best(
        self, offers: Sequence[Offer], num_jobs: int, num_rows: int, rows_left: int
    ) -> tuple[float, list[int]]:
        """Add the likeliest tokens first, and return the best rate on the way and its lengths.

        A token behind others is never likelier than they are, so that the first n tokens in
        this order are the likeliest n.
        """
        chances = [offer.acceptance.chances(offer.most) for offer in offers]
        # Likeliest token for its rows first.
        left = [
            (-chances[i][0] / offer.rows, i)
            for i, offer in enumerate(offers) if offer.most and not offer.lags
        ]
        heapify(left)
        counts = [0] * len(offers)
        steps: list[int] = []  # rows of each step of the draft model
        expected, drafted = float(num_jobs), 0
        step = max(1, num_rows // _ROWS_PER_STEP)
        best = list(counts)
        best_rate = _LEAST_GAIN * _rate(expected, self.passes.estimate(num_rows))
        while left:
            _, i = heappop(left)
            offer, position = offers[i], counts[i]
            if offer.rows > rows_left:
                continue
            rows_left -= offer.rows
            num_rows += offer.rows
            expected += chances[i][position]
            counts[i] += 1
            if counts[i] < offer.most:
                heappush(left, (-chances[i][position + 1] / offer.rows, i))
            if offer.unread:
                if position == len(steps):
                    steps.append(0)
                steps[position] += 1 if position else offer.rows_of_first_step
            drafted += offer.rows
            if drafted % step:
                continue
            seconds = self.passes.estimate(num_rows) + sum(map(self._steps.estimate, steps))
            rate = _rate(expected, seconds)
            if rate > best_rate:
                best, best_rate = list(counts), rate
        return best_rate, best

    def _probe(self, offer: Offer, num_rows: int) -> int:
        """Return 1 if the draft model may guess a token although that would be a loss, else 0."""
        acceptance = offer.acceptance
        if not acceptance.probing:
            longer = self.passes.estimate(num_rows + offer.rows) - self.passes.estimate(num_rows)
            price = longer + self._steps.estimate_reading(offer.unread)
            if price > acceptance.credit:
                return 0
            acceptance.credit -= max(price, 0.0)
            acceptance.probing = True
        return 1


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
