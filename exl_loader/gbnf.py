r"""GBNF, the grammars of llama.cpp, turned into llguidance's dialect of Lark.

llguidance brings a converter of its own, but what it makes means something else: it joins
characters into lexemes, which are as long as they can be, so that `[a-z]* "b"` never finds its
"b". Here every terminal is one character, and one character cannot be cut in two ways: the
Earley parser alone decides, as llama.cpp's does.

The syntax is that of llama.cpp's grammars/README.md, but for its tokens (`<think>`), which are
no text.
"""

from __future__ import annotations

import re

# Repeats are written out by llguidance: a larger number would be a typing error or an attack.
MAX_REPEATS = 10_000
MAX_DEPTH = 100

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_REPEAT = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d+)?\s*)?\}")
_HEX_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_LAST_CHARACTER = 0x10FFFF


class GbnfError(ValueError):
    """The text is no GBNF; the message names the line."""


def gbnf_to_lark(text: str, leading_space: bool = False) -> str:
    """Write a grammar in llguidance's Lark.

    Args:
        text: rules, one of them named `root`.
        leading_space: allow one space before what `root` describes.

    Raises:
        GbnfError: it breaks the syntax, or names a rule that is not there.
    """
    return _Converter(text).convert(leading_space)


class _Converter:
    """Reads rules from left to right and writes each as it goes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        # GBNF's names may hold what Lark's may not, so rules are numbered.
        self._numbers: dict[str, int] = {}
        self._first_use: dict[str, int] = {}
        self._rules: dict[str, str] = {}
        self._groups: list[str] = []
        self._classes: dict[str, str] = {}

    def convert(self, leading_space: bool) -> str:
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            self._rule()
            self._skip(_SPACE_AND_LINES)
        for name, at in self._first_use.items():
            if name not in self._rules:
                raise self._error(f"there is no rule {name}", at)
        if "root" not in self._rules:
            raise GbnfError("there is no rule root")
        space = f"{self._terminal([(32, 32)])}? " if leading_space else ""
        lines = ["%llguidance {}", f"start: {space}{self._rule_name('root')}"]
        lines += [f"{self._rule_name(name)}: {body}" for name, body in self._rules.items()]
        lines += [f"g{number}: {body}" for number, body in enumerate(self._groups)]
        lines += [f"{terminal}: /{pattern}/" for pattern, terminal in self._classes.items()]
        return "\n".join(lines) + "\n"

    def _rule(self) -> None:
        begin, name = self._at, self._name()
        self._skip(_SPACE)
        self._expect("::=")
        self._skip(_SPACE_AND_LINES)
        if name in self._rules:
            raise self._error(f"a second rule {name}", begin)
        self._rules[name] = self._alternatives(_SPACE)
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._error(f"{self._text[self._at]!r} makes no sense here")

    def _alternatives(self, space: re.Pattern[str]) -> str:
        """Read up to what cannot go on; `space` is what may stand between the parts."""
        written = [self._sequence(space)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            written.append(self._sequence(space))
        return " | ".join(written)

    def _sequence(self, space: re.Pattern[str]) -> str:
        items: list[str] = []
        while (item := self._item()) is not None:
            self._skip(space)
            items.append(self._repeated(item, space))
        return " ".join(items) or '""'

    def _item(self) -> str | None:
        character = self._peek()
        if character == '"':
            return self._literal()
        if character == "[":
            return self._character_class()
        if character == "(":
            return self._group()
        if character == ".":
            self._at += 1
            return self._terminal([(0, _LAST_CHARACTER)])
        if character == "<" or self._text.startswith("!<", self._at):
            raise self._error("tokens (<...>) are not supported")
        if not _NAME.match(self._text, self._at):
            return None
        begin, name = self._at, self._name()
        self._first_use.setdefault(name, begin)
        return self._rule_name(name)

    def _group(self) -> str:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} groups in one another")
        self._skip(_SPACE_AND_LINES)
        inner = self._alternatives(_SPACE_AND_LINES)
        self._expect(")")
        self._depth -= 1
        # A rule of its own, because llguidance takes few groups in one another.
        self._groups.append(inner)
        return f"g{len(self._groups) - 1}"

    def _literal(self) -> str:
        self._at += 1
        terminals = []
        while self._peek() != '"':
            code = self._character()
            terminals.append(self._terminal([(code, code)]))
        self._at += 1
        return f"({' '.join(terminals)})" if terminals else '""'

    def _character_class(self) -> str:
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
                raise self._error("a range that ends before it begins")
            ranges.append((first, last))
        self._at += 1
        if not ranges:
            raise self._error("an empty set of characters")
        return self._terminal(ranges, negated)

    def _character(self) -> int:
        """Read one character, perhaps escaped; its code point."""
        character = self._peek()
        if not character:
            raise self._error("the grammar ends in the middle")
        if character != "\\":
            self._at += 1
            return ord(character)
        escape = _HEX_ESCAPE.match(self._text, self._at)
        if escape:
            code = int(escape[1] or escape[2] or escape[3], 16)
            if code > _LAST_CHARACTER or 0xD800 <= code < 0xE000:
                raise self._error(f"{escape[0]} is no character")
            self._at = escape.end()
            return code
        letter = self._text[self._at + 1 : self._at + 2]
        if letter not in _ESCAPED or not letter:
            raise self._error(f"unknown escape \\{letter}")
        self._at += 2
        return ord(_ESCAPED[letter])

    def _terminal(self, ranges: list[tuple[int, int]], negated: bool = False) -> str:
        """Name of the terminal that is one of these characters, or none of them."""
        spans = "".join(
            f"\\x{{{first:X}}}-\\x{{{last:X}}}" if first != last else f"\\x{{{first:X}}}"
            for first, last in ranges
        )
        pattern = f"[{'^' if negated else ''}{spans}]"
        return self._classes.setdefault(pattern, f"C{len(self._classes)}")

    def _repeated(self, item: str, space: re.Pattern[str]) -> str:
        while True:
            repeat = _REPEAT.match(self._text, self._at)
            if repeat:
                low = int(repeat[1])
                high = int(repeat[3]) if repeat[3] else None if repeat[2] else low
                if max(low, high or 0) > MAX_REPEATS or (high is not None and high < low):
                    raise self._error(f"{repeat[0]} is no range up to {MAX_REPEATS}")
                item = f"({item}{{{low},{'' if high is None else high}}})"
                self._at = repeat.end()
            elif self._peek() in ("*", "+", "?"):
                item = f"({item}{self._peek()})"
                self._at += 1
            else:
                return item
            self._skip(space)

    def _name(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._error("expected the name of a rule")
        self._at = match.end()
        return match[0]

    def _rule_name(self, name: str) -> str:
        return f"r{self._numbers.setdefault(name, len(self._numbers))}"

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
