"""The sandbox in which chat templates run, with limits on time and on the length of values.

jinja2's immutable sandbox with the globals, filters and tags that transformers gives to
templates. Every loop pass and macro call looks at the clock; operations that can make a long
value out of short ones look at the length of their result.
"""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RENDER_SECONDS = 5.0
# A conversation that fills a context of a million tokens has about 4 MB of text.
MAX_RENDER_CHARS = 16 << 20

# A width in a format makes a string of any length out of nothing.
_WIDE_FORMAT = re.compile(r"\d{5}|\*")

_TICK = "_exl_loader_tick"
_CONCAT = "_exl_loader_concat"


class LimitReached(Exception):
    """A template ran too long or made too much."""


class _Budget(threading.local):
    """What the render of this thread may still use."""

    deadline = float("inf")

    def running(self) -> _Budget:
        self.deadline = time.monotonic() + MAX_RENDER_SECONDS
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self.deadline = float("inf")

    def tick(self) -> str:
        """Stop the template where its time is over; what it returns is never shown."""
        if time.monotonic() > self.deadline:
            raise LimitReached(f"it did not end within {MAX_RENDER_SECONDS:g} s")
        return ""


_BUDGET = _Budget()


def _check_length(length: int) -> None:
    if length > MAX_RENDER_CHARS:
        raise LimitReached(f"it makes values of more than {MAX_RENDER_CHARS} elements")


def render(template: jinja2.Template, context: dict[str, Any]) -> str:
    """Run a template under the limits.

    Raises:
        LimitReached: it ran too long or made too much.
        Exception: whatever else the template did wrong: templates can raise anything that
            Python code can.
    """
    with _BUDGET.running():
        return _join(template.generate(context))


def _join(pieces: Any) -> str:
    parts: list[str] = []
    length = 0
    for piece in pieces:
        _BUDGET.tick()
        length += len(piece)
        _check_length(length)
        parts.append(piece)
    return "".join(parts)


def _concat(*values: Any) -> str:
    parts = [str(value) for value in values]
    _check_length(sum(map(len, parts)))
    return "".join(parts)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_length(_size(left) + _size(right))
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int):
                    _check_length(_size(value) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise LimitReached("it formats a string to a width of ten thousand or more")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        # jinja2 would print nothing in its place; a template that tries this is no accident.
        raise jinja2.exceptions.SecurityError(
            f"access to {attribute!r} of a {type(obj).__name__} is not allowed"
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: list[nodes.For | nodes.Macro] = [
            *tree.find_all(nodes.For), *tree.find_all(nodes.Macro)
        ]
        for node in repeated:
            call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        _replace_concats(tree)
        tree.set_environment(self)
        return tree


def _replace_concats(tree: nodes.Node) -> None:
    """Turn `a ~ b` into a call that looks at the length of the result."""

    def replaced(value: Any) -> Any:
        if not isinstance(value, nodes.Node):
            return value
        _replace_concats(value)
        if isinstance(value, nodes.Concat):
            name = nodes.Name(_CONCAT, "load")
            return nodes.Call(name, value.nodes, [], None, None).set_lineno(value.lineno)
        return value

    for field, value in tree.iter_fields():
        if isinstance(value, list):
            setattr(tree, field, [replaced(item) for item in value])
        else:
            setattr(tree, field, replaced(value))


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the model's own words; it shows them."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """`namespace()` without underscore names, which lead into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for key in dict(*rest, **kwargs):
            _check_attribute(key)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


class TemplateRefusal(jinja2.TemplateError):
    """The template does not accept this conversation; its own words say why."""


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Make an environment as transformers makes it, with our limits."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
    )
    environment.globals[_TICK] = _BUDGET.tick
    environment.globals[_CONCAT] = _concat
    return environment
