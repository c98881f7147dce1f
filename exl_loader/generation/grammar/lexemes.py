"""Decides which parts of a recursive grammar may be lexemes.

llguidance first cuts a text into lexemes and then parses them. Each lexeme is the longest one
that the grammar allows at its position. GBNF allows every way of cutting. So a part of a grammar
may be a lexeme only if no other way of cutting is lost: whenever a lexeme ends and another one
that is allowed at the same position could continue, the continuation must not be able to begin
what follows the first. Single characters are always correct as lexemes, but then a mask takes
the parser through every character of every token, which is hundreds of times slower.

Lexemes are at first as large as possible: the regular parts of the rules. Those that could
continue where another one must end are split. The analysis is conservative: repetitions count as
unbounded, a lexeme may be followed by whatever follows it anywhere, and characters with equal
first bytes count as equal, because a lexer that has begun a character cannot go back.
"""

from __future__ import annotations

from collections.abc import Iterator

from .automata import Languages, TooMuch, bits, union
from .nodes import (
    EMPTY,
    Chars,
    Choice,
    Concat,
    Lexeme,
    Node,
    Regexes,
    Repeat,
    RuleRef,
    Rules,
    choice,
    concat,
    parts_of,
)

# Larger lexemes are split.
MAX_NODES = 300


def cut_into_lexemes(rules: Rules, root: str) -> Rules:
    """Rewrite rules so that their leaves are lexemes and references, with the same texts.

    Args:
        rules: all rules that are used.
        root: the name of the first rule.

    Returns:
        The rules that are needed, the first rule first.
    """
    languages = Languages(rules)
    split: set[Node] = set()
    try:
        while True:
            marked = _Marker(rules, split).mark_all(root)
            conflicts = _Neighbours(marked, root, languages).conflicts()
            if not conflicts:
                return marked
            split |= conflicts
    except TooMuch:
        return _Marker(rules, None).mark_all(root)


class _Marker:
    """Marks lexemes in rules.

    Args:
        split: trees that must not be lexemes; None for all except single characters.
    """

    def __init__(self, rules: Rules, split: set[Node] | None) -> None:
        self._rules, self._split = rules, split
        self._regexes = Regexes(rules, MAX_NODES)
        # References that are replaced by their rule around the tree that is being marked.
        self._written_out: list[RuleRef] = []

    def mark_all(self, root: str) -> Rules:
        marked: Rules = {}
        wanted = [root]
        while wanted:
            name = wanted.pop()
            if name not in marked:
                marked[name] = self._mark(self._rules[name])
                wanted += [leaf.name for leaf in leaves(marked[name]) if isinstance(leaf, RuleRef)]
        return marked

    def _mark(self, node: Node) -> Node:
        if self._is_lexeme(node):
            return Lexeme(node) if self._regexes.has_characters(node) else EMPTY
        if isinstance(node, Concat):
            return Concat(tuple(self._mark_runs(node.items)))
        if isinstance(node, Choice):
            return Choice(tuple(self._mark_options(node.options)))
        if isinstance(node, Repeat):
            return self._mark_repeat(node)
        return node

    def _is_lexeme(self, node: Node) -> bool:
        if isinstance(node, Chars) or self._split is None:
            return isinstance(node, Chars)
        return node not in self._split and self._regexes.can_write(node)

    def _mark_runs(self, items: tuple[Node, ...]) -> Iterator[Node]:
        """Mark items; adjacent regular items become one lexeme."""
        run: list[Node] = []
        for item in (*items, None):
            if item is not None and self._regexes.can_write(item):
                run.append(item)
                continue
            if run and self._is_lexeme(concat(run)):
                run = [concat(run)]
            yield from map(self._mark, run)
            run = []
            if item is not None:
                yield self._mark(item)

    def _mark_options(self, options: tuple[Node, ...]) -> Iterator[Node]:
        """Mark options; the regular options become one lexeme."""
        regular, others = self._sorted_out(options)
        if regular is not None:
            yield self._mark(regular)
        yield from map(self._mark, others)

    def _sorted_out(self, options: tuple[Node, ...]) -> tuple[Node | None, list[Node]]:
        """Return the choice of the options that can be one lexeme, and the other options."""
        regular = [option for option in options if self._regexes.can_write(option)]
        together = choice(regular) if regular else None
        if together is None or not self._is_lexeme(together):
            return None, list(options)
        return together, [option for option in options if option not in regular]

    def _mark_repeat(self, node: Repeat) -> Node:
        """Mark a repetition; (A | b)* becomes A* (b A*)*, so that a regular A* is one lexeme."""
        item = node.item
        if isinstance(item, RuleRef) and item not in self._written_out:
            self._written_out.append(item)
            item = self._rules[item.name]
        parts = self._told_apart(item, node) if isinstance(item, Choice) else None
        marked = (Repeat(self._mark(node.item), node.low, node.high) if parts is None
                  else self._mark(parts))
        if item is not node.item:
            self._written_out.pop()
        return marked

    def _told_apart(self, item: Choice, node: Repeat) -> Node | None:
        """Write an unbounded repetition as its regular options between the other options."""
        regular, others = self._sorted_out(item.options)
        if node.high is not None or node.low > 1 or regular is None or not others:
            return None
        begin = Repeat(regular, 0, None)
        further = Repeat(concat((choice(others), begin)), node.low, None)
        if node.low == 0:
            return concat((begin, further))
        return choice((concat((begin, further)), Repeat(regular, 1, None)))


def leaves(node: Node) -> Iterator[Node]:
    """Yield the lexemes and references of a tree."""
    if isinstance(node, (Lexeme, RuleRef)):
        yield node
    for part in parts_of(node):
        yield from leaves(part)


class _Neighbours:
    """Which lexemes may follow a lexeme, and which may be read at the same position.

    Sets of lexemes are bits of an integer.

    Args:
        marked: the rules, whose leaves are lexemes and references.
        root: the name of the first rule.
        languages: compares lexemes.
    """

    def __init__(self, marked: Rules, root: str, languages: Languages) -> None:
        self._marked, self._root, self._languages = marked, root, languages
        found = (leaf.node for body in marked.values() for leaf in leaves(body)
                 if isinstance(leaf, Lexeme))
        self._nodes = list(dict.fromkeys(found))
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._begins: dict[str, tuple[bool, int]] = dict.fromkeys(marked, (False, 0))
        self._after_rule: dict[str, int] = dict.fromkeys(marked, 0)
        self._after = [0] * len(self._nodes)

    def conflicts(self) -> set[Node]:
        """Return the lexemes that could continue where another one must end."""
        # Rules mostly refer to later rules, so the last rule is computed first.
        while any([self._add_begin(name) for name in reversed(self._marked)]):
            pass
        while any([self._add_followers(body, self._after_rule[name])
                   for name, body in self._marked.items()]):
            pass
        found: set[Node] = set()
        for index, others in enumerate(self._allowed_together()):
            node = self._nodes[index]
            after = union([self._languages.begins(other) for other in self._nodes],
                          self._after[index])
            found.update(self._nodes[other] for other in bits(others)
                         if self._languages.compare(node, self._nodes[other])[0] & after)
        return found

    def _add_begin(self, name: str) -> bool:
        """Update the lexemes that begin a rule; return whether they changed."""
        before = self._begins[name]
        self._begins[name] = self._begin(self._marked[name])
        return self._begins[name] != before

    def _begin(self, node: Node) -> tuple[bool, int]:
        """Return whether a tree is nullable, and the lexemes that begin it."""
        self._languages.count()
        if isinstance(node, Lexeme):
            return self._languages.of(node.node).nullable, 1 << self._index[node.node]
        if isinstance(node, RuleRef):
            return self._begins[node.name]
        if isinstance(node, Repeat):
            nullable, begin = self._begin(node.item)
            return nullable or node.low == 0, begin
        if isinstance(node, Choice):
            options = [self._begin(option) for option in node.options]
            return any(nullable for nullable, _ in options), union([begin for _, begin in options])
        nullable, begin = True, 0
        for item in parts_of(node):
            skips, more = self._begin(item)
            begin |= more if nullable else 0
            nullable = nullable and skips
        return nullable, begin

    def _add_followers(self, node: Node, after: int) -> bool:
        """Add the lexemes that follow each part of a tree; return whether any were new."""
        self._languages.count()
        if isinstance(node, Lexeme):
            index = self._index[node.node]
            new = after & ~self._after[index]
            self._after[index] |= after
            return bool(new)
        if isinstance(node, RuleRef):
            new = after & ~self._after_rule[node.name]
            self._after_rule[node.name] |= after
            return bool(new)
        if isinstance(node, Repeat):
            return self._add_followers(node.item, after | self._begin(node.item)[1])
        if isinstance(node, Choice):
            return any([self._add_followers(option, after) for option in node.options])
        changed = False
        for item in reversed(parts_of(node)):
            changed = self._add_followers(item, after) or changed
            nullable, begin = self._begin(item)
            after = begin | (after if nullable else 0)
        return changed

    def _allowed_together(self) -> list[int]:
        """Return for each lexeme the lexemes that may be read at the same position.

        These are all lexemes that begin a text. If two of them have a text in common, then also
        all lexemes that follow either of the two.
        """
        together = [0] * len(self._nodes)
        begin = self._begins[self._root][1]
        pending = [(begin, begin)]
        while pending:
            ones, others = pending.pop()
            for one in bits(ones):
                self._languages.count()
                for other in bits(others & ~together[one]):
                    together[one] |= 1 << other
                    if self._languages.compare(self._nodes[one], self._nodes[other])[1]:
                        pending.append((self._after[one], self._after[other]))
        return together
