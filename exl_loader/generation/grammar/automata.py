"""What texts the regular parts of a grammar describe, by the first bytes of their characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .nodes import Chars, Choice, Concat, Node, Repeat, Rules, Use, first_bytes

# Grammars that take more steps are not looked through: about a tenth of a second.
MAX_STEPS = 300_000


class TooMuch(Exception):
    """The grammar is too large to be looked through."""


@dataclass
class Automaton:
    """A Glushkov automaton: the places of characters in a tree, as bits, and what follows them.

    Args:
        nullable: the empty text is one of its texts.
        first, last: places that begin and end a text.
        bytes_at: of each place, its characters' first bytes.
        followers: of each place, those that may come next.
    """

    nullable: bool = True
    first: int = 0
    last: int = 0
    bytes_at: list[int] = field(default_factory=list)
    followers: list[int] = field(default_factory=list)


class Languages:
    """What is known of lexemes, and of two of them together.

    Args:
        rules: those that lexemes use.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._automata: dict[Node, Automaton] = {}
        self._compared: dict[tuple[Node, Node], tuple[int, bool]] = {}
        self._steps = 0

    def count(self, steps: int = 1) -> None:
        """Note that something was looked at.

        Raises:
            TooMuch: it was too often.
        """
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TooMuch

    def of(self, node: Node) -> Automaton:
        """The automaton of a lexeme."""
        if node not in self._automata:
            automaton = Automaton()
            nullable, first, last = self._build(node, automaton)
            automaton.nullable, automaton.first, automaton.last = nullable, first, last
            self._automata[node] = automaton
        return self._automata[node]

    def begins(self, node: Node) -> int:
        """First bytes of a lexeme, as bits."""
        automaton = self.of(node)
        return union(automaton.bytes_at, automaton.first)

    def _build(self, node: Node, into: Automaton) -> tuple[bool, int, int]:
        """Add a tree's places; whether it may be empty, and which begin and end it."""
        self.count()
        if isinstance(node, Use):
            return self._build(self._rules[node.name], into)
        if isinstance(node, Chars):
            place = 1 << len(into.bytes_at)
            into.bytes_at.append(first_bytes(node))
            into.followers.append(0)
            return False, place, place
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

    def _link(self, automaton: Automaton, before: int, behind: int) -> None:
        for place in bits(before):
            self.count()
            automaton.followers[place] |= behind

    def compare(self, one: Node, other: Node) -> tuple[int, bool]:
        """Look at the texts that two lexemes share.

        Returns:
            First bytes of characters with which a text of `one` goes on in `other`, as bits;
            and whether some text may be both.
        """
        key = one, other
        if key not in self._compared:
            self._compared[key] = self._walk(self.of(one), self.of(other))
        return self._compared[key]

    def _walk(self, one: Automaton, other: Automaton) -> tuple[int, bool]:
        seen: set[tuple[int, int]] = set()
        wanted = [(one.first, other.first)]
        goes_on, meet = 0, False
        while wanted:
            here, there = wanted.pop()
            for place in bits(here):
                for second in bits(there):
                    self.count()
                    if (place, second) in seen or not one.bytes_at[place] & other.bytes_at[second]:
                        continue
                    seen.add((place, second))
                    followers = other.followers[second]
                    if one.last >> place & 1:
                        goes_on |= union(other.bytes_at, followers)
                        meet = meet or bool(other.last >> second & 1)
                    wanted.append((one.followers[place], followers))
        return goes_on, meet


def bits(number: int) -> Iterator[int]:
    """Places of the bits that are set, rising."""
    while number:
        yield (number & -number).bit_length() - 1
        number &= number - 1


def union(sets: Sequence[int], of: int = -1) -> int:
    """Union of the sets at these places, of all for -1."""
    found = 0
    for place, one in enumerate(sets):
        if of >> place & 1:
            found |= one
    return found
