"""Keeps banned strings out of a text: holds their beginnings back, and draws again.

A token is held back while its text may be the beginning of a banned string. When a banned string
is complete, the text goes back to the token in which the string begins. This token is excluded
there, and another one is drawn. Tokens that the caller has got are never taken back.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings
from .forward_model import LogitsRow
from .sampling import NoTokenLeft

if TYPE_CHECKING:
    from .jobs import Job, JobState

# Of so many held tokens the logits are kept, so that nothing is computed again for a redraw.
# Before further ones the last token of the text is run again.
KEPT_ROWS = 16

# Most draws in one step; other jobs run before the next ones.
DRAWS_IN_STEP = 16

# Most tokens that are taken back without one that is final. A grammar may allow nothing but
# banned strings, in more spellings than can be tried.
MOST_REJECTED = 10_000


class BannedStrings:
    """Finds banned strings in text that arrives in pieces. Case does not matter.

    Args:
        banned_strings: texts of at least one character.

    Attributes:
        num_read: number of characters so far.
    """

    def __init__(self, banned_strings: Iterable[str]) -> None:
        self._banned = frozenset(text.casefold() for text in banned_strings)
        self._sorted = sorted(self._banned)
        self._lengths = sorted(set(map(len, self._banned)))
        self.num_read = 0
        # The longest end of the text that begins a banned string, in folded case. A character may
        # become several ones, so each has the index of the one that it comes from.
        self._tail = ""
        self._indices: tuple[int, ...] = ()

    def copy(self) -> BannedStrings:
        """Return an object that continues from here on its own."""
        return copy.copy(self)

    @property
    def first_undecided(self) -> int:
        """Index of the first character that may belong to a banned string; none: `num_read`."""
        return self._indices[0] if self._indices else self.num_read

    def push(self, piece: str) -> int | None:
        """Add text.

        Returns:
            The index at which the first banned string that is complete begins, of several that
            end with the same character the shortest. None if there is none.
        """
        for character in piece:
            for folded in character.casefold():
                self._tail += folded
                self._indices += (self.num_read,)
                for length in self._lengths:
                    if length > len(self._tail):
                        break
                    if self._tail[-length:] in self._banned:
                        return self._indices[-length]
                while self._tail and not self._begins_one(self._tail):
                    self._tail = self._tail[1:]
                    self._indices = self._indices[1:]
            self.num_read += 1
        return None

    def _begins_one(self, text: str) -> bool:
        index = bisect_left(self._sorted, text)
        return index < len(self._sorted) and self._sorted[index].startswith(text)


@dataclass(eq=False)
class _HeldToken:
    """A token that the caller has not got yet.

    Args:
        token_id: its id.
        text: text to show with it.
        reach: number of characters of the answer that have begun with it.
        excluded: ids that may not be drawn in its place.
        row: the logits that it was drawn from; None if they are not kept.
        job, strings: the states before it.
    """

    token_id: int
    text: str
    reach: int
    excluded: frozenset[int]
    row: LogitsRow | None
    job: JobState
    strings: BannedStrings

    @property
    def is_forced(self) -> bool:
        """True if no other token may be in its place."""
        return self.job.sampler.is_forced


class Rewind:
    """Draws the tokens of one job so that its text has no banned string.

    Args:
        banned_strings: texts of at least one character.

    Attributes:
        went_back: True if the last call of `take_logits` took tokens back.
        num_final: number of the answer's tokens that are never taken back.
    """

    def __init__(self, banned_strings: Iterable[str]) -> None:
        self.went_back = False
        self.num_final = 0
        self._strings = BannedStrings(banned_strings)
        self._held: list[_HeldToken] = []
        # Ids that may not be drawn next.
        self._excluded: frozenset[int] = frozenset()
        self._num_rejected = 0

    def take_logits(self, job: Job, row: LogitsRow) -> str | None:
        """Draw the next token of a job, and others in place of tokens that cannot stay.

        Afterwards the text has one token more, unless it went back. Then it may be shorter, or
        as long as before, and the logits after its last token are wanted next.

        Args:
            job: gets the tokens that are final as output.
            row: the logits after its last token.

        Returns:
            Why the job ends; None if it continues.

        Raises:
            InvalidSettings: every token that may be drawn completes a banned string.
            As `Sampler.sample`.
        """
        self.went_back = False
        for _ in range(DRAWS_IN_STEP):
            try:
                reason, first = self._draw(job, row)
            except NoTokenLeft:
                if not self._excluded:
                    raise
                # No token can follow the one before, so that one cannot stay either.
                reason, first = None, len(self._held) - 1
                if first < 0:
                    raise _no_way_on(f"none, after {len(self._excluded)} others") from None
            if first is None:
                self._release(job, self._num_decided() if reason is None else len(self._held))
                if self._held and self._held[-1].row is row:
                    keeps = len(self._held) <= KEPT_ROWS
                    self._held[-1].row = LogitsRow(row.values.copy()) if keeps else None
                return reason
            kept = self._go_back(job, first)
            self._num_rejected += 1
            if self._num_rejected > MOST_REJECTED:
                raise _no_way_on(f"none among {MOST_REJECTED} that were tried")
            if kept is None:
                break
            row = kept
        return None

    def finish(self, job: Job) -> None:
        """Take back what is held of a job that ends without a reason of its text.

        So a text that is cancelled is the beginning of the whole one.
        """
        if self._held:
            self._go_back(job, 0)

    def _draw(self, job: Job, row: LogitsRow) -> tuple[str | None, int | None]:
        """Draw a token.

        Returns:
            Why the job would end, and the index of the held token in which a banned string
            begins that is complete now; None if there is none.

        Raises:
            NoTokenLeft: none may be drawn; nothing has changed.
        """
        state, strings, excluded = job.state(), self._strings.copy(), self._excluded
        drawn: list[tuple[int, str]] = []
        reason = job.draw(row, drawn, excluded)
        self._excluded = frozenset()
        start = None
        for token_id, text in drawn:
            reach = self._strings.num_read + len(text) + job.num_held
            self._held.append(_HeldToken(token_id, text, reach, excluded, row, state, strings))
            start = self._strings.push(text)
        if start is None and reason is not None:
            start = self._strings.push(job.remaining_text())
        return reason, None if start is None else self._first_of(start)

    def _first_of(self, start: int) -> int:
        """Return the index of the held token to replace, where a banned string begins.

        It is the token in which character `start` begins, or after forced ones the first that is
        not forced.
        """
        reached = (i for i, token in enumerate(self._held) if token.reach > start)
        # Some vocabularies are decoded by their tokenizer alone, and say too late what has begun.
        first = next(reached, len(self._held) - 1)
        drawn = (i for i in range(first, len(self._held)) if not self._held[i].is_forced)
        return next(drawn, first)

    def _go_back(self, job: Job, index: int) -> LogitsRow | None:
        """Take back a held token and all after it; return the logits that it was drawn from."""
        token = self._held[index]
        del self._held[index:]
        job.restore(token.job)
        self._strings = token.strings
        self._excluded = token.excluded | {token.token_id}
        self.went_back = True
        return token.row

    def _num_decided(self) -> int:
        """Return how many of the held tokens belong to no banned string, whatever follows.

        Any text may take the place of the first token that is not decided. So before this token
        no banned string may have begun either.
        """
        count, strings = len(self._held), self._strings
        while True:
            end = strings.first_undecided
            decided = next((i for i, t in enumerate(self._held[:count]) if t.reach > end), count)
            if decided == count:
                return count
            count, strings = decided, self._held[decided].strings

    def _release(self, job: Job, count: int) -> None:
        """Give the caller the first `count` of the held tokens."""
        # First the number, because a caller that has taken a token may ask for it.
        self.num_final += count
        job.output.extend((token.token_id, token.text) for token in self._held[:count])
        del self._held[:count]
        if count:
            self._num_rejected = 0


def _no_way_on(found: str) -> InvalidSettings:
    return InvalidSettings(
        "banned_strings", expected="a token that completes no banned string", actual=found,
        remedy="Ban fewer strings, or allow more tokens",
    )
