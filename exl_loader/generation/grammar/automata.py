"""Automata of the regular parts of a grammar, over the first bytes of characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .nodes import Chars, Choice, Concat, Node, Repeat, RuleRef, Rules, first_bytes

# The analysis of a grammar stops after this many steps, about a tenth of a second.
MAX_STEPS = 300_000


class TooMuch(Exception):
    """The grammar is too large to be analysed."""


@dataclass
class Automaton:
    """A Glushkov automaton: its states are the positions of characters in a tree.

    Sets of positions and sets of bytes are bits of an integer.

    Args:
        nullable: True if it accepts the empty text.
        first, last: positions that begin and end a text.
        bytes_at: position -> first bytes of its characters.
        followers: position -> positions that may come next.
    """

    nullable: bool = True
    first: int = 0
    last: int = 0
    bytes_at: list[int] = field(default_factory=list)
    followers: list[int] = field(default_factory=list)


class Languages:
    """Automata of lexemes, and comparisons of two lexemes; results are kept.

    Args:
        rules: the rules that lexemes refer to.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._automata: dict[Node, Automaton] = {}
        self._compared: dict[tuple[Node, Node], tuple[int, bool]] = {}
        self._steps = 0

    def count(self, steps: int = 1) -> None:
        """Count steps of the analysis.

        Raises:
            TooMuch: there were more than `MAX_STEPS`.
        """
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TooMuch

    def of(self, node: Node) -> Automaton:
        """Return the automaton of a lexeme."""
        if node not in self._automata:
            automaton = Automaton()
            nullable, first, last = self._build(node, automaton)
            automaton.nullable, automaton.first, automaton.last = nullable, first, last
            self._automata[node] = automaton
        return self._automata[node]

    def begins(self, node: Node) -> int:
        """Return the bytes that begin a lexeme."""
        automaton = self.of(node)
        return union(automaton.bytes_at, automaton.first)

    def _build(self, node: Node, into: Automaton) -> tuple[bool, int, int]:
        """Add the positions of a tree; return if it is nullable, and its first and last ones."""
        self.count()
        if isinstance(node, RuleRef):
            return self._build(self._rules[node.name], into)
        if isinstance(node, Chars):
            position = 1 << len(into.bytes_at)
            into.bytes_at.append(first_bytes(node))
            into.followers.append(0)
            return False, position, position
        if isinstance(node, Choice):
            built = [self._build(option, into) for option in node.options]
            return (any(part[0] for part in built), union([part[1] for part in built]),
                    union([part[2] for part in built]))
        if isinstance(node, Repeat):
            nullable, first, last = self._build(node.item, into)
            if node.high != 1:
                self._link(into, last, first)
            return nullable or node.low == 0, first, last
        assert isinstance(node, Concat)
        nullable, first, last = True, 0, 0
        for item in node.items:
            skips, begin, end = self._build(item, into)
            self._link(into, last, begin)
            first |= begin if nullable else 0
            last = end | (last if skips else 0)
            nullable = nullable and skips
        return nullable, first, last

    def _link(self, automaton: Automaton, before: int, after: int) -> None:
        for position in bits(before):
            self.count()
            automaton.followers[position] |= after

    def compare(self, one: Node, other: Node) -> tuple[int, bool]:
        """Compare the texts of two lexemes.

        Returns:
            The first bytes of characters by which texts of `one` can be continued in `other`, and
            whether a text may belong to both.
        """
        key = one, other
        if key not in self._compared:
            self._compared[key] = self._walk(self.of(one), self.of(other))
        return self._compared[key]

    def _walk(self, one: Automaton, other: Automaton) -> tuple[int, bool]:
        seen: set[tuple[int, int]] = set()
        pending = [(one.first, other.first)]
        continued, meet = 0, False
        while pending:
            firsts, seconds = pending.pop()
            for first in bits(firsts):
                for second in bits(seconds):
                    self.count()
                    if (first, second) in seen or not one.bytes_at[first] & other.bytes_at[second]:
                        continue
                    seen.add((first, second))
                    followers = other.followers[second]
                    if one.last >> first & 1:
                        continued |= union(other.bytes_at, followers)
                        meet = meet or bool(other.last >> second & 1)
                    pending.append((one.followers[first], followers))
        return continued, meet


def bits(number: int) -> Iterator[int]:
    """Yield the indices of the set bits, rising."""
    while number:
        yield (number & -number).bit_length() - 1
        number &= number - 1


def union(sets: Sequence[int], of: int = -1) -> int:
    """Return the union of the sets at these indices, given as bits; -1 is all."""
    found = 0
    for index, one in enumerate(sets):
        if of >> index & 1:
            found |= one
    return found
