"""Writes grammars in llguidance's dialect of Lark."""

from __future__ import annotations

from .automata import Languages
from .lexemes import MAX_NODES
from .nodes import (
    LAST_CHARACTER,
    Choice,
    Concat,
    Lexeme,
    Node,
    Regexes,
    Repeat,
    Rules,
    Use,
    times,
)

# A lexeme is never empty: that is said where it is used.
_NOT_EMPTY = f"/[\\x{{0}}-\\x{{{LAST_CHARACTER:X}}}]+/"


def write_lark(marked: Rules, root: str, rules: Rules) -> str:
    """Write rules whose leaves are lexemes and other rules.

    Args:
        root: the rule that describes a whole text.
        rules: those that lexemes use.
    """
    return _Writer(rules).write(marked, root)


class _Writer:
    """Gives names to rules, groups and lexemes, and writes each once."""

    def __init__(self, rules: Rules) -> None:
        self._regexes = Regexes(rules, MAX_NODES)
        self._languages = Languages(rules)
        # A rule's own name may hold what Lark's may not, so rules are numbered.
        self._numbers: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._terminals: dict[Node, int] = {}

    def write(self, marked: Rules, root: str) -> str:
        """All of a grammar."""
        lines = ["%llguidance {}", f"start: {self._rule(root)}"]
        lines += [f"{self._rule(name)}: {self._body(body)}" for name, body in marked.items()]
        lines += [f"g{number}: {body}" for body, number in self._groups.items()]
        lines += [f"T{number}: {self._terminal(node)}" for node, number in self._terminals.items()]
        return "\n".join(lines) + "\n"

    def _body(self, node: Node) -> str:
        if isinstance(node, Choice):
            return " | ".join(map(self._body, node.options))
        if isinstance(node, Concat):
            return " ".join(map(self._name, node.items)) or '""'
        return self._name(node)

    def _name(self, node: Node) -> str:
        if isinstance(node, Use):
            return self._rule(node.name)
        if isinstance(node, Lexeme):
            number = self._terminals.setdefault(node.node, len(self._terminals))
            return f"T{number}{'?' if self._languages.of(node.node).nullable else ''}"
        # A rule of its own, because llguidance takes few groups in one another.
        body = self._body(node.item if isinstance(node, Repeat) else node)
        number = self._groups.setdefault(body, len(self._groups))
        return f"g{number}{times(node) if isinstance(node, Repeat) else ''}"

    def _rule(self, name: str) -> str:
        return f"r{self._numbers.setdefault(name, len(self._numbers))}"

    def _terminal(self, node: Node) -> str:
        pattern = f"/{self._regexes.write(node)}/"
        return f"{pattern} & {_NOT_EMPTY}" if self._languages.of(node).nullable else pattern
