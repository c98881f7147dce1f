r"""GBNF, the grammars of llama.cpp, turned into llguidance's dialect of Lark.

llguidance brings a converter of its own, but what it makes means something else: it joins
characters into lexemes, which are as long as they can be, so that `[a-z]* "b"` never finds its
"b". Here a grammar without recursion becomes one regular expression, which is exact and quick.
In any other every terminal is one character, and one character cannot be cut in two ways: the
Earley parser alone decides, as llama.cpp's does, at some cost where much is allowed.

The syntax is that of llama.cpp's grammars/README.md, but for its tokens (`<think>`), which are
no text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Repeats are written out by llguidance: a larger number would be a typing error or an attack.
MAX_REPEATS = 10_000
MAX_DEPTH = 100

# Rules are written out where they are used; a regular expression longer than this is not tried.
MAX_REGEX_LEN = 20_000

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_USE = re.compile(r"<([A-Za-z0-9_-]+)>")
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


class _Piece(NamedTuple):
    """A part of a rule, as Lark and as a regular expression with `<name>` for rules."""

    lark: str
    regex: str


class _Converter:
    """Reads rules from left to right and writes each as it goes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        # GBNF's names may hold what Lark's may not, so rules are numbered.
        self._numbers: dict[str, int] = {}
        self._first_use: dict[str, int] = {}
        self._rules: dict[str, _Piece] = {}
        self._groups: list[str] = []
        self._regexes: dict[str, str | None] = {}
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
        regex = self._regex_of("root")
        if regex is not None:
            space = "[\\x{20}]?" if leading_space else ""
            return f"%llguidance {{}}\nstart: /{space}{regex}/\n"
        space = f"{self._terminal([(32, 32)]).lark}? " if leading_space else ""
        lines = ["%llguidance {}", f"start: {space}{self._rule_name('root')}"]
        lines += [f"{self._rule_name(name)}: {body.lark}" for name, body in self._rules.items()]
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

    def _regex_of(self, name: str, depth: int = 0) -> str | None:
        """A rule with all others written out; None where it is recursive, or gets too long."""
        if name in self._regexes:
            return self._regexes[name]
        # What is asked for again while it is worked out contains itself.
        self._regexes[name] = None
        body = self._rules[name].regex
        uses = _USE.findall(body)
        if depth == MAX_DEPTH:
            return None
        inner = {used: self._regex_of(used, depth + 1) for used in dict.fromkeys(uses)}
        if None in inner.values():
            return None
        if len(body) + sum(len(inner[used] or "") for used in uses) > MAX_REGEX_LEN:
            return None
        self._regexes[name] = f"(?:{_USE.sub(lambda use: inner[use[1]] or '', body)})"
        return self._regexes[name]

    def _alternatives(self, space: re.Pattern[str]) -> _Piece:
        """Read up to what cannot go on; `space` is what may stand between the parts."""
        written = [self._sequence(space)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_SPACE_AND_LINES)
            written.append(self._sequence(space))
        return _Piece(" | ".join(piece.lark for piece in written),
                      "|".join(piece.regex for piece in written))

    def _sequence(self, space: re.Pattern[str]) -> _Piece:
        items: list[_Piece] = []
        while (item := self._item()) is not None:
            self._skip(space)
            items.append(self._repeated(item, space))
        return _Piece(" ".join(item.lark for item in items) or '""',
                      "".join(item.regex for item in items))

    def _item(self) -> _Piece | None:
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
        return _Piece(self._rule_name(name), f"<{name}>")

    def _group(self) -> _Piece:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} groups in one another")
        self._skip(_SPACE_AND_LINES)
        inner = self._alternatives(_SPACE_AND_LINES)
        self._expect(")")
        self._depth -= 1
        # A rule of its own, because llguidance takes few groups in one another.
        self._groups.append(inner.lark)
        return _Piece(f"g{len(self._groups) - 1}", f"(?:{inner.regex})")

    def _literal(self) -> _Piece:
        self._at += 1
        terminals = []
        while self._peek() != '"':
            code = self._character()
            terminals.append(self._terminal([(code, code)]))
        self._at += 1
        if not terminals:
            return _Piece('""', "(?:)")
        return _Piece(f"({' '.join(terminal.lark for terminal in terminals)})",
                      f"(?:{''.join(terminal.regex for terminal in terminals)})")

    def _character_class(self) -> _Piece:
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

    def _terminal(self, ranges: list[tuple[int, int]], negated: bool = False) -> _Piece:
        """The terminal that is one of these characters, or none of them."""
        spans = "".join(
            f"\\x{{{first:X}}}-\\x{{{last:X}}}" if first != last else f"\\x{{{first:X}}}"
            for first, last in ranges
        )
        pattern = f"[{'^' if negated else ''}{spans}]"
        return _Piece(self._classes.setdefault(pattern, f"C{len(self._classes)}"), pattern)

    def _repeated(self, item: _Piece, space: re.Pattern[str]) -> _Piece:
        while True:
            repeat = _REPEAT.match(self._text, self._at)
            if repeat:
                low = int(repeat[1])
                high = int(repeat[3]) if repeat[3] else None if repeat[2] else low
                if max(low, high or 0) > MAX_REPEATS or (high is not None and high < low):
                    raise self._error(f"{repeat[0]} is no range up to {MAX_REPEATS}")
                times = f"{{{low},{'' if high is None else high}}}"
                item = _Piece(f"({item.lark}{times})", f"(?:{item.regex}{times})")
                self._at = repeat.end()
            elif self._peek() in ("*", "+", "?"):
                times = self._peek()
                item = _Piece(f"({item.lark}{times})", f"(?:{item.regex}{times})")
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
