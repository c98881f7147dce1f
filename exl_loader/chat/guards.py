"""Looks at what a template calls before it is done, where a short call can make a long value.

Filters, methods of strings and operators of Python run to their end once they are called, with
no place to look at the clock. So each that makes more than its arguments (a width, a separator,
a count) has its result estimated first, never too low; what all others make is weighed after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import pass_eval_context

from .budget import (
    BUDGET,
    CONTAINER_CHARS,
    ENTRY_CHARS,
    MAX_INTEGER_BITS,
    MAX_RENDER_CHARS,
    LimitReached,
)

# No template of a conversation needs these, and they take long over long texts.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")

# These take a text apart: into characters, or as bad, into words.
_TAKING_APART = frozenset({
    "batch", "groupby", "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse",
    "select", "selectattr", "slice", "sort", "sum", "title", "unique", "urlencode", "wordcount",
})

# Methods of strings that make bytes, or anything from a table.
UNSAFE_STR_METHODS = frozenset({"encode", "translate", "maketrans", "striptags", "unescape"})

_NUMBER = re.compile("[0-9]+")
_STAR = re.compile(r"%[-+ #0-9.]*\*")
_MAX_PRECISION = 308
# All that `split()` and `splitlines()` split at.
_BLANKS = "".join(chr(point) for point in range(0x3001) if chr(point).isspace())


def _expect(chars: Any) -> None:
    if isinstance(chars, (int, float)) and chars > MAX_RENDER_CHARS:
        BUDGET.tick(MAX_RENDER_CHARS + 1)


def _widths(text: str) -> int:
    """Sum all the numbers in a format: an upper bound for its widths and precisions."""
    # Nine digits are over every limit already.
    return sum(int(digits.lstrip("0")[:9] or 0) for digits in _NUMBER.findall(text))


def expect_formatted(text: str, values: Iterable[Any]) -> None:
    """Estimate `text % values`."""
    if _STAR.search(text):
        raise LimitReached("it takes the width of a format from a value")
    longest = max((BUDGET.check(value) for value in values), default=0)
    _expect(len(text) + _widths(text) + text.count("%") * longest)


def expect_operation(operator: str, left: Any, right: Any) -> None:
    """Estimate `left operator right`."""
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(value, (str, list, tuple)):
                each = 1 if isinstance(value, str) else ENTRY_CHARS
                _expect(each * len(value) * count)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * right > MAX_INTEGER_BITS:
            raise LimitReached(f"it makes numbers of more than {MAX_INTEGER_BITS} bits")
    elif operator == "%" and isinstance(left, str):
        expect_formatted(left, (right,))


# Methods of strings


def _replaced(text: str, old: Any = "", new: Any = "", count: Any = -1) -> None:
    old, new = str(old), str(new)
    _expect(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _expanded(text: str, size: Any = 8) -> None:
    _expect(len(text) + text.count("\t") * size)


def _split(text: str, separator: Any = None, *_: Any, **__: Any) -> None:
    if isinstance(separator, str) and separator:
        parts = text.count(separator)
    else:
        parts = sum(map(text.count, _BLANKS))
    _expect(len(text) + (CONTAINER_CHARS + ENTRY_CHARS) * (parts + 1))


def _split_lines(text: str, *_: Any, **__: Any) -> None:
    _split(text)


def _padded(text: str, width: Any = 80, *_: Any, **__: Any) -> None:
    _expect(width)


_METHODS: dict[str, Callable[..., None]] = {
    "center": _padded, "ljust": _padded, "rjust": _padded, "zfill": _padded,
    "expandtabs": _expanded, "replace": _replaced,
    "split": _split, "rsplit": _split, "splitlines": _split_lines,
}


def guarded_call(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Estimate what a call makes.

    Returns:
        The arguments to call it with: an iterator among them may have been read.
    """
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, str):
        if name == "join" and args:
            args = (joinable(args[0], owner), *args[1:])
        elif name in _METHODS:
            _METHODS[name](owner, *args, **kwargs)
    return args


def joinable(values: Iterable[Any], separator: str) -> list[Any]:
    """Read an iterable, and estimate the text of its members with separators between them."""
    items = []
    chars = 0
    for value in values:
        chars += BUDGET.check(value) + len(separator) + ENTRY_CHARS
        _expect(chars)
        BUDGET.tick()
        items.append(value)
    return items


# Filters


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    each = len(width) if isinstance(width, str) else width
    text = str(text)
    _expect(len(text) + (len(text.splitlines()) + 1) * each)


def _batched(value: Any, linecount: Any = 0, *_: Any, **__: Any) -> None:
    _expect(linecount * ENTRY_CHARS)


def _sliced(value: Any, slices: Any = 0, *_: Any, **__: Any) -> None:
    _expect(slices * CONTAINER_CHARS)


def _rounded(value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if abs(precision) > _MAX_PRECISION:
        raise LimitReached("it rounds to more places than a number has")


def _summed(value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise SecurityError("only numbers can be summed")


def _formatted(text: Any, *args: Any, **kwargs: Any) -> None:
    expect_formatted(str(text), (*args, *kwargs.values()))


_FILTERS: dict[str, Callable[..., None]] = {
    "batch": _batched, "center": _padded, "format": _formatted, "indent": _indented,
    "replace": _replaced, "round": _rounded, "slice": _sliced, "sum": _summed,
}


def _guard(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Some filters get their surroundings as the first argument, before the value.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    estimate = _FILTERS.get(name)

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        BUDGET.tick()
        for value in (*args[first:], *kwargs.values()):
            BUDGET.check(value)
        if estimate is not None:
            estimate(*args[first:], **kwargs)
        if name in _TAKING_APART and isinstance(args[first], str):
            _expect(len(args[first]) * ENTRY_CHARS)
        return BUDGET.made(function(*args, **kwargs))

    return guarded


@pass_eval_context
def _join(eval_context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(eval_context.environment, attribute), value)
    return FILTERS["join"](eval_context, joinable(value, str(d)), d)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:
    """Write JSON as it is; jinja2's own filter escapes for HTML, which no model has seen."""
    _expect(indent)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                               sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        BUDGET.tick(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def guarded_filters() -> dict[str, Callable[..., Any]]:
    """Make the filters of templates: jinja2's, each with a look at what it makes."""
    filters = {name: function for name, function in FILTERS.items() if name not in _LEFT_OUT}
    filters.update(tojson=_tojson, join=_join)
    return {name: _guard(name, function) for name, function in filters.items()}


def _timed(function: Any) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        BUDGET.tick()
        return function(*args, **kwargs)

    return timed


def guarded_tests() -> dict[str, Any]:
    """Make the tests of templates, for `select` and its like go through them without end."""
    return {name: _timed(function) for name, function in TESTS.items()}


# `str.format`


class GuardedFormatter(SandboxedFormatter):
    """jinja2's formatter, with a look at each field's value and width."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        found = super().get_field(field_name, args, kwargs)
        BUDGET.tick(BUDGET.check(found[0]))
        return found

    def format_field(self, value: Any, format_spec: str) -> Any:
        BUDGET.tick(_widths(format_spec))
        return super().format_field(value, format_spec)


class GuardedEscapeFormatter(GuardedFormatter, SandboxedEscapeFormatter):
    """The same for text that is marked as HTML."""
