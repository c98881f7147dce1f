"""Context-free grammars over characters, as trees, and simplifications of them.

`rules` always maps the name of a rule to its tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

LAST_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)

# The first byte of UTF-8 by range of characters: the last character of the range, the number of
# bits in the bytes after the first, and the constant bits of the first byte.
_UTF8 = ((0x7F, 0, 0x00), (0x7FF, 6, 0xC0), (0xFFFF, 12, 0xE0), (LAST_CHARACTER, 18, 0xF0))


@dataclass(frozen=True)
class Chars:
    """One character of these ranges, (first, last), rising and disjoint; no surrogates."""

    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RuleRef:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True)
class Concat:
    """Its items in order; without items, the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of its options, at least two."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """Its item `low` to `high` times; None for no limit."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Lexeme:
    """A tree that the lexer reads as one piece; lexemes contain no lexemes."""

    node: Node


Node: TypeAlias = "Chars | RuleRef | Concat | Choice | Repeat | Lexeme"

Rules: TypeAlias = dict[str, Node]

EMPTY = Concat(())


def chars(spans: Iterable[tuple[int, int]], negated: bool = False) -> Chars:
    """Make one character of ranges in any order, or with `negated` any other character."""
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
    """Return the first bytes of the characters in UTF-8, as the bits of a number."""
    found, least = 0, 0
    for most, shift, prefix in _UTF8:
        for first, last in node.spans:
            low, high = max(first, least) >> shift, min(last, most) >> shift
            if max(first, least) <= min(last, most):
                found |= (1 << (prefix + high + 1)) - (1 << (prefix + low))
        least = most + 1
    return found


def concat(items: Iterable[Node]) -> Node:
    """Make a sequence of items."""
    flat = [part for item in items
            for part in (item.items if isinstance(item, Concat) else (item,))]
    return flat[0] if len(flat) == 1 else Concat(tuple(flat))


def choice(options: Iterable[Node]) -> Node:
    """Make a choice of options, at least one."""
    flat = [part for option in options
            for part in (option.options if isinstance(option, Choice) else (option,))]
    distinct = tuple(dict.fromkeys(flat))
    return distinct[0] if len(distinct) == 1 else Choice(distinct)


def repeat(item: Node, low: int, high: int | None) -> Node:
    """Make a repetition of an item, `low` to `high` times."""
    if high == 0 or item == EMPTY:
        return EMPTY
    return item if (low, high) == (1, 1) else Repeat(item, low, high)


def without_aliases(rules: Rules) -> Rules:
    """Replace references to rules that only name another rule by that rule.

    Rules that name each other in a circle stay.
    """
    target: dict[str, str] = {}
    for name in rules:
        path = {name: None}
        end = name
        while end not in target and isinstance(body := rules.get(end), RuleRef):
            if body.name in path:
                break
            end = body.name
            path[end] = None
        target.update(dict.fromkeys(path, target.get(end, end)))
    return {name: _renamed(body, target) for name, body in rules.items()}


def _renamed(node: Node, target: Mapping[str, str]) -> Node:
    if isinstance(node, RuleRef):
        return RuleRef(target.get(node.name, node.name))
    if isinstance(node, Concat):
        return concat(_renamed(item, target) for item in node.items)
    if isinstance(node, Choice):
        return choice(_renamed(option, target) for option in node.options)
    if isinstance(node, Repeat):
        return repeat(_renamed(node.item, target), node.low, node.high)
    return node


def rule_names(node: Node) -> set[str]:
    """Return the names of the rules that a tree refers to."""
    if isinstance(node, RuleRef):
        return {node.name}
    inner: tuple[Node, ...] = ()
    if isinstance(node, Concat):
        inner = node.items
    elif isinstance(node, Choice):
        inner = node.options
    elif isinstance(node, Repeat):
        inner = (node.item,)
    return set().union(*map(rule_names, inner))


def without_linear_recursion(name: str, body: Node) -> Node:
    """Write a rule that refers to itself at its end or its beginning as a repetition.

    R = a R | b has the same texts as R = a* b, and R = R a | b as R = b a* (Arden 1961).
    """
    options, itself = _options(body), RuleRef(name)
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
    """Return the options of a tree; a tree that is no choice is its only option."""
    if isinstance(node, Choice):
        return [part for option in node.options for part in _options(option)]
    if isinstance(node, Repeat) and (node.low, node.high) == (0, 1):
        return [*_options(node.item), EMPTY]
    return [node]


class Regexes:
    """Writes trees as regular expressions, in which references are replaced by the rules.

    Args:
        rules: the rules that trees refer to.
        max_nodes: larger expressions are not written.
    """

    # Each level of a tree takes one or two nested calls.
    MAX_HEIGHT = 150

    def __init__(self, rules: Rules, max_nodes: int) -> None:
        self._rules = rules
        self._max_nodes = max_nodes
        self._sizes: dict[str, float] = {}
        self._with_characters: dict[str, bool] = {}

    def can_write(self, node: Node) -> bool:
        """Return False if a tree is recursive, or its expression would be too long."""
        return self._size(node, 0) <= self._max_nodes

    def has_characters(self, node: Node) -> bool:
        """Return False if a tree that can be written describes at most the empty text."""
        if isinstance(node, RuleRef):
            if node.name not in self._with_characters:
                self._with_characters[node.name] = self.has_characters(self._rules[node.name])
            return self._with_characters[node.name]
        return isinstance(node, Chars) or any(map(self.has_characters, parts_of(node)))

    def _size(self, node: Node, height: int) -> float:
        """Return the number of nodes without references; infinite if recursive or too deep."""
        if height > self.MAX_HEIGHT:
            return float("inf")
        if isinstance(node, RuleRef):
            if node.name not in self._sizes:
                # A rule whose size is requested while it is computed contains itself.
                self._sizes[node.name] = float("inf")
                self._sizes[node.name] = self._size(self._rules[node.name], height + 1)
            return self._sizes[node.name]
        return 1 + sum(self._size(part, height + 1) for part in parts_of(node))

    def write(self, node: Node) -> str:
        """Return the expression of a tree that can be written."""
        if isinstance(node, Chars):
            return write_chars(node)
        if isinstance(node, RuleRef):
            return self.write(self._rules[node.name])
        if isinstance(node, Repeat):
            return f"(?:{self.write(node.item)}){times(node)}"
        if isinstance(node, Concat):
            return "".join(map(self.write, node.items))
        assert isinstance(node, Choice)
        return f"(?:{'|'.join(map(self.write, node.options))})"


def parts_of(node: Node) -> tuple[Node, ...]:
    """Return the direct parts of a tree; a reference to a rule has none."""
    if isinstance(node, Concat):
        return node.items
    if isinstance(node, Choice):
        return node.options
    return (node.item,) if isinstance(node, Repeat) else ()


def write_chars(node: Chars) -> str:
    """Write one character as a regular expression."""
    if not node.spans:
        return f"[^\\x{{0}}-\\x{{{LAST_CHARACTER:X}}}]"
    return "[" + "".join(
        f"\\x{{{first:X}}}-\\x{{{last:X}}}" if first != last else f"\\x{{{first:X}}}"
        for first, last in node.spans
    ) + "]"


def times(node: Repeat) -> str:
    """Write the number of repetitions as regular expressions and Lark do."""
    short = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((node.low, node.high))
    return short or f"{{{node.low},{'' if node.high is None else node.high}}}"
