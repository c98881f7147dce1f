r"""Converts GBNF, the grammars of llama.cpp, to llguidance's dialect of Lark.

llguidance has its own converter, but the result has another meaning: it joins characters into
lexemes, which are as long as possible, so that `[a-z]* "b"` never finds its "b". Here a grammar
without recursion becomes one regular expression, which is exact and fast. For other grammars,
`lexemes.py` decides which parts may be lexemes without a change of meaning.

The syntax is that of llama.cpp's grammars/README.md, except for its tokens (`<think>`), which
are not text.
"""

from __future__ import annotations

import re

from .automata import Languages
from .lexemes import MAX_NODES, cut_into_lexemes
from .nodes import (
    EMPTY,
    LAST_CHARACTER,
    Chars,
    Choice,
    Concat,
    Lexeme,
    Node,
    Regexes,
    Repeat,
    RuleRef,
    Rules,
    chars,
    choice,
    concat,
    repeat,
    rule_names,
    times,
    without_aliases,
    without_linear_recursion,
)
from .reach import MAX_RULES, reach

# llguidance expands repetitions; a larger number is a typing error or an attack.
MAX_REPEATS = 10_000
MAX_DEPTH = 100

# Most nodes of a grammar that is written as one regular expression.
MAX_REGEX_NODES = 2000

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d+)?\s*)?\}")
_TIMES: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_HEX_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}

# Not a valid name in GBNF.
_START = "<start>"

# Lexemes of llguidance must not be empty, so a nullable lexeme is written as an optional
# reference to a lexeme that is not empty.
_NOT_EMPTY = f"/[\\x{{0}}-\\x{{{LAST_CHARACTER:X}}}]+/"


class GbnfError(ValueError):
    """The text is not valid GBNF; the message names the line."""


def gbnf_to_lark(text: str, leading_space: bool = False) -> str:
    """Convert a grammar to llguidance's dialect of Lark.

    Args:
        text: rules, one of them named `root`.
        leading_space: allow one space before the text of `root`.

    Raises:
        GbnfError: the syntax is invalid, or a rule does not exist.
    """
    rules = {
        name: without_linear_recursion(name, body) for name, body in _Reader(text).read().items()
    }
    space = repeat(chars([(32, 32)]), 0, 1) if leading_space else EMPTY
    rules[_START] = concat((space, RuleRef("root")))
    regexes = Regexes(rules, MAX_REGEX_NODES)
    if regexes.can_write(rules[_START]):
        return f"%llguidance {{}}\nstart: /{regexes.write(rules[_START])}/\n"
    return _write_lark(cut_into_lexemes(rules, _START), _START, rules)


def _count(digits: str) -> int:
    """Read a number of repetitions; a number with very many digits becomes too large."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(MAX_REPEATS)) else MAX_REPEATS + 1


class _Reader:
    """Reads rules from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._first_use: dict[str, int] = {}
        self._rules: Rules = {}

    def read(self) -> Rules:
        """Return all rules, after checking that `root` and every used rule exist."""
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            self._rule()
            self._skip(_SPACE_AND_LINES)
        for name, at in self._first_use.items():
            if name not in self._rules:
                raise self._error(f"there is no rule {name}", at)
        if "root" not in self._rules:
            raise GbnfError("there is no rule root")
        rules = without_aliases(self._rules)
        if reach("root", {name: rule_names(body) for name, body in rules.items()}, {}) > MAX_RULES:
            raise GbnfError(f"rules that lead through more than {MAX_RULES} others")
        return rules

    def _rule(self) -> None:
        begin, name = self._at, self._name()
        self._skip(_SPACE)
        self._expect("::=")
        self._skip(_SPACE_AND_LINES)
        if name in self._rules:
            raise self._error(f"a second rule {name}", begin)
        self._rules[name] = self._alternatives(_SPACE)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._error(f"{self._text[self._at]!r} is unexpected")

    def _alternatives(self, space: re.Pattern[str]) -> Node:
        """Read alternatives; `space` matches what may separate their parts."""
        options = [self._sequence(space)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            options.append(self._sequence(space))
        return choice(options)

    def _sequence(self, space: re.Pattern[str]) -> Node:
        items: list[Node] = []
        while (item := self._item()) is not None:
            self._skip(space)
            items.append(self._repeated(item, space))
        return concat(items)

    def _item(self) -> Node | None:
        character = self._peek()
        if character == '"':
            return self._literal()
        if character == "[":
            return self._character_class()
        if character == "(":
            return self._group()
        if character == ".":
            self._at += 1
            return chars([(0, LAST_CHARACTER)])
        if character == "<" or self._text.startswith("!<", self._at):
            raise self._error("tokens (<...>) are not supported")
        if not _NAME.match(self._text, self._at):
            return None
        begin, name = self._at, self._name()
        self._first_use.setdefault(name, begin)
        return RuleRef(name)

    def _group(self) -> Node:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"groups are nested deeper than {MAX_DEPTH}")
        self._skip(_SPACE_AND_LINES)
        inner = self._alternatives(_SPACE_AND_LINES)
        self._expect(")")
        self._depth -= 1
        return inner

    def _literal(self) -> Node:
        self._at += 1
        items = []
        while self._peek() != '"':
            code = self._character()
            items.append(chars([(code, code)]))
        self._at += 1
        return concat(items)

    def _character_class(self) -> Chars:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges = []
        while self._peek() != "]":
            first = last = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character()
            if last < first:
                raise self._error("a range ends before it begins")
            ranges.append((first, last))
        self._at += 1
        if not ranges:
            raise self._error("an empty set of characters")
        return chars(ranges, negated)

    def _character(self) -> int:
        """Read one character or escape sequence; return its code point."""
        character = self._peek()
        if not character:
            raise self._error("the grammar ends too early")
        if character != "\\":
            self._at += 1
            return ord(character)
        escape = _HEX_ESCAPE.match(self._text, self._at)
        if escape:
            code = int(escape[1] or escape[2] or escape[3], 16)
            if code > LAST_CHARACTER or 0xD800 <= code < 0xE000:
                raise self._error(f"{escape[0]} is not a character")
            self._at = escape.end()
            return code
        letter = self._text[self._at + 1 : self._at + 2]
        if letter not in _ESCAPED or not letter:
            raise self._error(f"unknown escape \\{letter}")
        self._at += 2
        return ord(_ESCAPED[letter])

    def _repeated(self, item: Node, space: re.Pattern[str]) -> Node:
        for _ in range(MAX_DEPTH):
            written = _REPEAT.match(self._text, self._at)
            if written:
                low = _count(written[1])
                high = _count(written[3]) if written[3] else None if written[2] else low
                if max(low, high or 0) > MAX_REPEATS or (high is not None and high < low):
                    raise self._error(f"{written[0]} is not a range up to {MAX_REPEATS}")
                item = repeat(item, low, high)
                self._at = written.end()
            elif self._peek() in _TIMES:
                item = repeat(item, *_TIMES[self._peek()])
                self._at += 1
            else:
                return item
            self._skip(space)
        raise self._error(f"{MAX_DEPTH} repetitions of one part")

    def _name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._error("expected the name of a rule")
        self._at = match.end()
        return match[0]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        if match is not None:
            self._at = match.end()

    def _expect(self, wanted: str) -> None:
        if not self._text.startswith(wanted, self._at):
            raise self._error(f"expected {wanted}")
        self._at += len(wanted)

    def _error(self, problem: str, at: int | None = None) -> GbnfError:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        return GbnfError(f"line {line}: {problem}, before {self._text[at : at + 20]!r}")


def _write_lark(marked: Rules, root: str, rules: Rules) -> str:
    """Write rules in llguidance's dialect of Lark.

    Args:
        marked: the rules, whose leaves are lexemes and references.
        root: the name of the rule that describes a whole text.
        rules: the rules that lexemes refer to.
    """
    return _Writer(rules).write(marked, root)


class _Writer:
    """Numbers rules, groups and lexemes, and writes each once."""

    def __init__(self, rules: Rules) -> None:
        self._regexes = Regexes(rules, MAX_NODES)
        self._languages = Languages(rules)
        # Rules are numbered, because their names may contain characters that Lark does not allow.
        self._numbers: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._terminals: dict[Node, int] = {}

    def write(self, marked: Rules, root: str) -> str:
        """Return a whole grammar."""
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
        if isinstance(node, RuleRef):
            return self._rule(node.name)
        if isinstance(node, Lexeme):
            number = self._terminals.setdefault(node.node, len(self._terminals))
            return f"T{number}{'?' if self._languages.of(node.node).nullable else ''}"
        # A separate rule, because llguidance limits the nesting of groups.
        body = self._body(node.item if isinstance(node, Repeat) else node)
        number = self._groups.setdefault(body, len(self._groups))
        return f"g{number}{times(node) if isinstance(node, Repeat) else ''}"

    def _rule(self, name: str) -> str:
        return f"r{self._numbers.setdefault(name, len(self._numbers))}"

    def _terminal(self, node: Node) -> str:
        pattern = f"/{self._regexes.write(node)}/"
        return f"{pattern} & {_NOT_EMPTY}" if self._languages.of(node).nullable else pattern
