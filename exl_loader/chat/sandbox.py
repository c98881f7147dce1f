"""The sandbox in which chat templates run, with limits on time and on what they make.

jinja2's immutable sandbox with the globals, filters and tags that transformers gives to
templates. The template's syntax tree is changed so that every loop pass, macro and block counts
its text and looks at the clock, and every list, tuple and dict that is written down is weighed;
operators, calls, filters and output pass `guards`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

from .budget import BUDGET
from .guards import (
    UNSAFE_STR_METHODS,
    GuardedEscapeFormatter,
    GuardedFormatter,
    expect_operation,
    guarded_call,
    guarded_filters,
    guarded_tests,
)

# The longest that models come with have about 20,000 characters.
MAX_TEMPLATE_CHARS = 1 << 20


def render(template: jinja2.Template, context: dict[str, Any]) -> str:
    """Run a template under the limits.

    Raises:
        LimitReached: it ran too long or made too much.
        TemplateRefusal: it does not accept the conversation.
        Exception: whatever else the template did wrong: templates can raise anything that
            Python code can.
    """
    with BUDGET.running():
        return _concat(*template.generate(context))


def compile_template(source: str) -> jinja2.Template:
    """Compile a template under the limits: jinja2 evaluates what is constant.

    Raises:
        LimitReached: a constant is too much.
        Exception: the template is broken.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise jinja2.TemplateError(f"a template of more than {MAX_TEMPLATE_CHARS} characters")
    with BUDGET.running():
        return _make_environment().from_string(source)


def _concat(*values: Any) -> str:
    parts = []
    for value in values:
        BUDGET.check(value)
        parts.append(str(value))
    BUDGET.tick(sum(map(len, parts)))
    return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    # Called by what the syntax tree gets added.
    guarded_pass = staticmethod(BUDGET.tick)
    guarded_value = staticmethod(BUDGET.made)
    guarded_concat = staticmethod(_concat)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        expect_operation(operator, left, right)
        return BUDGET.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Named as in jinja2, so that no keyword of a template's call can collide.
        BUDGET.tick()
        if isinstance(__obj, Macro):
            for value in args:
                BUDGET.made(value)
        args = guarded_call(__obj, args, kwargs)
        return BUDGET.made(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (int, float, bytes)):
            return False
        if isinstance(obj, str) and attr in UNSAFE_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 would print nothing in its place; a template that tries this is no accident.
        raise jinja2.exceptions.SecurityError(
            f"access to {attribute!r} of a {type(obj).__name__} is not allowed"
        )

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def guarded_format(*args: Any, **kwargs: Any) -> str:
            if is_map:
                args, kwargs = (), *args
            if isinstance(text, Markup):
                return Markup(GuardedEscapeFormatter(self, escape=text.escape)
                              .vformat(text, args, kwargs))
            return GuardedFormatter(self).vformat(text, args, kwargs)

        return guarded_format

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        repeated: list[nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block] = [
            *tree.find_all(nodes.For), *tree.find_all(nodes.Macro),
            *tree.find_all(nodes.CallBlock), *tree.find_all(nodes.Block),
        ]
        for node in repeated:
            call = _call("guarded_pass", [nodes.Const(_text_length(node))], node.lineno)
            node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
        _guard_values(tree)
        tree.set_environment(self)
        return tree


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    # No variable: a template could set that to something else.
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


def _text_length(node: nodes.Node) -> int:
    """Count the characters that stand in a piece of template: it may write them each time."""
    text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    return text + sum(
        len(const.value) for const in node.find_all(nodes.Const) if isinstance(const.value, str)
    )


def _guard_values(tree: nodes.Node) -> None:
    """Turn `a ~ b`, lists, tuples and dicts into calls that look at what they make."""

    def guarded(value: Any) -> Any:
        if not isinstance(value, nodes.Node):
            return value
        _guard_values(value)
        if isinstance(value, nodes.Concat):
            return _call("guarded_concat", value.nodes, value.lineno)
        if isinstance(value, (nodes.List, nodes.Dict, nodes.Tuple)) and (
            getattr(value, "ctx", "load") == "load"  # else it is the target of an assignment
        ):
            return _call("guarded_value", [value], value.lineno)
        return value

    for field, value in tree.iter_fields():
        if isinstance(value, list):
            setattr(tree, field, [guarded(item) for item in value])
        else:
            setattr(tree, field, guarded(value))


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

    def __repr__(self) -> str:
        # Namespaces may contain each other without end.
        return "<Namespace>"

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


class _Dict:
    """`dict`, as something to call: methods of the class itself could change a dict."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_environment() -> ImmutableSandboxedEnvironment:
    """Make an environment as transformers makes it, with our limits."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols],
        finalize=BUDGET.made,
    )
    environment.filters = guarded_filters()
    environment.tests = guarded_tests()
    # Text without end, which no conversation needs.
    del environment.globals["lipsum"]
    environment.globals.update({
        "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        "namespace": _Namespace, "dict": _Dict(),
    })
    return environment
