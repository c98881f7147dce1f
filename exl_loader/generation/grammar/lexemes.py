"""Which parts of a recursive grammar may be read as one piece.

llguidance first cuts a text into lexemes, each as long as it can be, among those that the
grammar allows there, and then parses them. GBNF means all ways of cutting, so a part of a
grammar may be a lexeme only where no other way is lost: wherever one lexeme ends and one that
is allowed in its place could go on, what goes on must not be able to begin what follows the
first. Single characters always suit, but then a mask takes the parser through every character
of every token, hundreds of times as long.

Lexemes are as large as can be at first, regular stretches of the rules, and those that go on
where another one has to end are split. What is computed errs on the safe side: repeats have no
bounds, a lexeme is followed by whatever follows it anywhere, and characters are equal whose
first bytes are, because a lexer that has begun a character cannot go back.
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
    Rules,
    Use,
    choice,
    concat,
    parts_of,
)

# Larger lexemes are split.
MAX_NODES = 300


def cut_into_lexemes(rules: Rules, root: str) -> Rules:
    """Write rules whose leaves are lexemes and other rules, and that describe the same texts.

    Args:
        rules: all that are used.
        root: the first one.

    Returns:
        Those that are needed, the first one first.
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
    """Puts lexemes into rules.

    Args:
        split: what must not be one; None for everything but single characters.
    """

    def __init__(self, rules: Rules, split: set[Node] | None) -> None:
        self._rules, self._split = rules, split
        self._regexes = Regexes(rules, MAX_NODES)
        # Rules that are written out around what is being marked.
        self._written_out: list[Use] = []

    def mark_all(self, root: str) -> Rules:
        marked: Rules = {}
        wanted = [root]
        while wanted:
            name = wanted.pop()
            if name not in marked:
                marked[name] = self._mark(self._rules[name])
                wanted += [leaf.name for leaf in leaves(marked[name]) if isinstance(leaf, Use)]
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
        """Neighbours that are regular become one lexeme."""
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
        """Those that are regular become one lexeme."""
        regular, others = self._sorted_out(options)
        if regular is not None:
            yield self._mark(regular)
        yield from map(self._mark, others)

    def _sorted_out(self, options: tuple[Node, ...]) -> tuple[Node | None, list[Node]]:
        """What can be one lexeme, and the other options."""
        regular = [option for option in options if self._regexes.can_write(option)]
        together = choice(regular) if regular else None
        if together is None or not self._is_lexeme(together):
            return None, list(options)
        return together, [option for option in options if option not in regular]

    def _mark_repeat(self, node: Repeat) -> Node:
        """(A | b)* is A* (b A*)*, so that a regular A is one lexeme as often as it comes."""
        item = node.item
        if isinstance(item, Use) and item not in self._written_out:
            self._written_out.append(item)
            item = self._rules[item.name]
        parts = self._told_apart(item, node) if isinstance(item, Choice) else None
        marked = (Repeat(self._mark(node.item), node.low, node.high) if parts is None
                  else self._mark(parts))
        if item is not node.item:
            self._written_out.pop()
        return marked

    def _told_apart(self, item: Choice, node: Repeat) -> Node | None:
        """A repeat without bounds as repeats of its regular options and the others between."""
        regular, others = self._sorted_out(item.options)
        if node.high is not None or node.low > 1 or regular is None or not others:
            return None
        begin = Repeat(regular, 0, None)
        goes_on = Repeat(concat((choice(others), begin)), node.low, None)
        if node.low == 0:
            return concat((begin, goes_on))
        return choice((concat((begin, goes_on)), Repeat(regular, 1, None)))


def leaves(node: Node) -> Iterator[Node]:
    """Lexemes and uses of rules."""
    if isinstance(node, (Lexeme, Use)):
        yield node
    for part in parts_of(node):
        yield from leaves(part)


class _Neighbours:
    """What may follow a lexeme, and what may be read in its place; sets of lexemes are bits.

    Args:
        marked: the rules, whose leaves are lexemes and uses.
    """

    def __init__(self, marked: Rules, root: str, languages: Languages) -> None:
        self._marked, self._root, self._languages = marked, root, languages
        found = (leaf.node for body in marked.values() for leaf in leaves(body)
                 if isinstance(leaf, Lexeme))
        self._nodes = list(dict.fromkeys(found))
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._begins: dict[str, tuple[bool, int]] = dict.fromkeys(marked, (False, 0))
        self._behind_rule: dict[str, int] = dict.fromkeys(marked, 0)
        self._behind = [0] * len(self._nodes)

    def conflicts(self) -> set[Node]:
        """Lexemes that go on where another one must end."""
        # What is needed first mostly stands behind what needs it.
        while any([self._note_begin(name) for name in reversed(self._marked)]):
            pass
        while any([self._note_behind(body, self._behind_rule[name])
                   for name, body in self._marked.items()]):
            pass
        found: set[Node] = set()
        for place, others in enumerate(self._allowed_together()):
            node = self._nodes[place]
            behind = union([self._languages.begins(other) for other in self._nodes],
                            self._behind[place])
            found.update(self._nodes[other] for other in bits(others)
                         if self._languages.compare(node, self._nodes[other])[0] & behind)
        return found

    def _note_begin(self, name: str) -> bool:
        """Note what a rule begins with; True where that is news."""
        before = self._begins[name]
        self._begins[name] = self._begin(self._marked[name])
        return self._begins[name] != before

    def _begin(self, node: Node) -> tuple[bool, int]:
        """Whether a tree may be empty, and which lexemes begin it."""
        self._languages.count()
        if isinstance(node, Lexeme):
            return self._languages.of(node.node).nullable, 1 << self._place[node.node]
        if isinstance(node, Use):
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

    def _note_behind(self, node: Node, behind: int) -> bool:
        """Note what stands behind everything in a tree; True where any of that is news."""
        self._languages.count()
        if isinstance(node, Lexeme):
            place = self._place[node.node]
            new = behind & ~self._behind[place]
            self._behind[place] |= behind
            return bool(new)
        if isinstance(node, Use):
            new = behind & ~self._behind_rule[node.name]
            self._behind_rule[node.name] |= behind
            return bool(new)
        if isinstance(node, Repeat):
            return self._note_behind(node.item, behind | self._begin(node.item)[1])
        if isinstance(node, Choice):
            return any([self._note_behind(option, behind) for option in node.options])
        news = False
        for item in reversed(parts_of(node)):
            news = self._note_behind(item, behind) or news
            nullable, begin = self._begin(item)
            behind = begin | (behind if nullable else 0)
        return news

    def _allowed_together(self) -> list[int]:
        """Of each lexeme those that may be read where it is.

        All that begin a text; and behind two that are allowed together and have a text in
        common, all that follow the one or the other.
        """
        together = [0] * len(self._nodes)
        begin = self._begins[self._root][1]
        wanted = [(begin, begin)]
        while wanted:
            ones, others = wanted.pop()
            for place in bits(ones):
                self._languages.count()
                for other in bits(others & ~together[place]):
                    together[place] |= 1 << other
                    if self._languages.compare(self._nodes[place], self._nodes[other])[1]:
                        wanted.append((self._behind[place], self._behind[other]))
        return together
