"""Context-free grammars over characters, as trees, and forms of them that are easier to follow.

`rules` everywhere maps a rule's name to its tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)

# How UTF-8 begins, for characters up to the first number: bits that go into bytes behind the
# first, and what the first is beside the others.
_UTF8 = ((0x7F, 0, 0x00), (0x7FF, 6, 0xC0), (0xFFFF, 12, 0xE0), (LAST_CHARACTER, 18, 0xF0))


@dataclass(frozen=True)
class Chars:
    """One character out of these ranges, (first, last), rising and apart; no surrogates."""

    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Use:
    """What a rule describes."""

    name: str


@dataclass(frozen=True)
class Concat:
    """One after the other; the empty text where there are none."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of these, at least two."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """From `low` to `high` times, None for no limit."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Lexeme:
    """What the tree describes, which the lexer reads as one piece; no part of another one."""

    node: Node


Node: TypeAlias = "Chars | Use | Concat | Choice | Repeat | Lexeme"

Rules: TypeAlias = dict[str, Node]

EMPTY = Concat(())


def chars(spans: Iterable[tuple[int, int]], negated: bool = False) -> Chars:
    """One character out of ranges in any order, or any other one."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted([*spans, _SURROGATES] if negated else spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    if negated:
        ends = [-1, *(bound for span in merged for bound in span), LAST_CHARACTER + 1]
        pairs = zip(ends[::2], ends[1::2], strict=True)
        return Chars(tuple((low + 1, high - 1) for low, high in pairs if low + 1 < high))
    return Chars(tuple(part for span in merged for part in _without_surrogates(span)))


def _without_surrogates(span: tuple[int, int]) -> list[tuple[int, int]]:
    first, last = span
    parts = [(first, min(last, _SURROGATES[0] - 1)), (max(first, _SURROGATES[1] + 1), last)]
    return [part for part in parts if part[0] <= part[1]]


def first_bytes(node: Chars) -> int:
    """Bytes that begin one of the characters in UTF-8, as the bits of a number."""
    found, least = 0, 0
    for most, shift, beside in _UTF8:
        for first, last in node.spans:
            low, high = max(first, least) >> shift, min(last, most) >> shift
            if max(first, least) <= min(last, most):
                found |= (1 << (beside + high + 1)) - (1 << (beside + low))
        least = most + 1
    return found


def concat(items: Iterable[Node]) -> Node:
    """One after the other."""
    flat = [part for item in items
            for part in (item.items if isinstance(item, Concat) else (item,))]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def choice(options: Iterable[Node]) -> Node:
    """One of these, at least one."""
    flat = [part for option in options
            for part in (option.options if isinstance(option, Choice) else (option,))]
    distinct = tuple(dict.fromkeys(flat))
    return distinct[0] if len(distinct) == 1 else Choice(distinct)


def repeat(item: Node, low: int, high: int | None) -> Node:
    """So many times."""
    if high == 0 or item == EMPTY:
        return EMPTY
    return item if (low, high) == (1, 1) else Repeat(item, low, high)


def without_aliases(rules: Rules) -> Rules:
    """Put what it leads to in the place of every rule that is only the name of another.

    Rules that lead to each other in a circle of names stay.
    """
    target: dict[str, str] = {}
    for name in rules:
        path = {name: None}
        end = name
        while end not in target and isinstance(body := rules.get(end), Use):
            if body.name in path:
                break
            end = body.name
            path[end] = None
        target.update(dict.fromkeys(path, target.get(end, end)))
    return {name: _renamed(body, target) for name, body in rules.items()}


def _renamed(node: Node, target: Mapping[str, str]) -> Node:
    if isinstance(node, Use):
        return Use(target.get(node.name, node.name))
    if isinstance(node, Concat):
        return concat(_renamed(item, target) for item in node.items)
    if isinstance(node, Choice):
        return choice(_renamed(option, target) for option in node.options)
    if isinstance(node, Repeat):
        return repeat(_renamed(node.item, target), node.low, node.high)
    return node


def uses(node: Node) -> set[str]:
    """Return the rules that a tree names."""
    if isinstance(node, Use):
        return {node.name}
    inner: tuple[Node, ...] = ()
    if isinstance(node, Concat):
        inner = node.items
    elif isinstance(node, Choice):
        inner = node.options
    elif isinstance(node, Repeat):
        inner = (node.item,)
    return set().union(*map(uses, inner))


def without_linear_recursion(name: str, body: Node) -> Node:
    """A rule that goes on with itself at its end, or at its beginning, as a repeat.

    R = a R | b describes the same texts as R = a* b, and R = R a | b as R = b a* (Arden 1961).
    """
    options, itself = _options(body), Use(name)
    for at, rest in ((-1, slice(0, -1)), (0, slice(1, None))):
        again, ends = [], []
        for option in options:
            items = option.items if isinstance(option, Concat) else (option,)
            if len(items) > 1 and items[at] == itself:
                again.append(concat(items[rest]))
            else:
                ends.append(option)
        if again and ends and itself not in ends:
            parts = [repeat(choice(again), 0, None), choice(ends)]
            return concat(parts if at else reversed(parts))
    return body


def _options(node: Node) -> list[Node]:
    """What a tree is one of."""
    if isinstance(node, Choice):
        return [part for option in node.options for part in _options(option)]
    if isinstance(node, Repeat) and (node.low, node.high) == (0, 1):
        return [*_options(node.item), EMPTY]
    return [node]


class Regexes:
    """Trees as regular expressions, with the rules that they use written out.

    Args:
        max_nodes: larger ones are not written out.
    """

    # Each level of a tree is a call or two.
    MAX_HEIGHT = 150

    def __init__(self, rules: Rules, max_nodes: int) -> None:
        self._rules = rules
        self._max_nodes = max_nodes
        self._sizes: dict[str, float] = {}
        self._with_characters: dict[str, bool] = {}

    def can_write(self, node: Node) -> bool:
        """False for what is recursive, or gets too long."""
        return self._size(node, 0) <= self._max_nodes

    def has_characters(self, node: Node) -> bool:
        """False for what `can_write` and describes the empty text at most."""
        if isinstance(node, Use):
            if node.name not in self._with_characters:
                self._with_characters[node.name] = self.has_characters(self._rules[node.name])
            return self._with_characters[node.name]
        return isinstance(node, Chars) or any(map(self.has_characters, parts_of(node)))

    def _size(self, node: Node, height: int) -> float:
        """How large it is written out; infinite for what is recursive or too deep."""
        if height > self.MAX_HEIGHT:
            return float("inf")
        if isinstance(node, Use):
            if node.name not in self._sizes:
                # What is asked for again while it is worked out contains itself.
                self._sizes[node.name] = float("inf")
                self._sizes[node.name] = self._size(self._rules[node.name], height + 1)
            return self._sizes[node.name]
        return 1 + sum(self._size(part, height + 1) for part in parts_of(node))

    def write(self, node: Node) -> str:
        """The expression of what `can_write`."""
        if isinstance(node, Chars):
            return write_chars(node)
        if isinstance(node, Use):
            return self.write(self._rules[node.name])
        if isinstance(node, Repeat):
            return f"(?:{self.write(node.item)}){times(node)}"
        if isinstance(node, Concat):
            return "".join(map(self.write, node.items))
        assert isinstance(node, Choice)
        return f"(?:{'|'.join(map(self.write, node.options))})"


def parts_of(node: Node) -> tuple[Node, ...]:
    """What a tree is made of, one level down; nothing for the use of a rule."""
    if isinstance(node, Concat):
        return node.items
    if isinstance(node, Choice):
        return node.options
    return (node.item,) if isinstance(node, Repeat) else ()


def write_chars(node: Chars) -> str:
    """One character as a regular expression."""
    if not node.spans:
        return f"[^\\x{{0}}-\\x{{{LAST_CHARACTER:X}}}]"
    return "[" + "".join(
        f"\\x{{{first:X}}}-\\x{{{last:X}}}" if first != last else f"\\x{{{first:X}}}"
        for first, last in node.spans
    ) + "]"


def times(node: Repeat) -> str:
    """How often, as regular expressions and Lark write it."""
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.low, node.high))
    return short or f"{{{node.low},{'' if node.high is None else node.high}}}"
