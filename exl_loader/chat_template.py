"""Chat templates: Jinja programs that come with a model, hence from strangers.

They run in jinja2's immutable sandbox with the globals, filters and tags that transformers
gives them, and under two limits of our own: a template that runs too long or writes too much
is stopped. Every loop pass and macro call looks at the clock; operations that can make a
long value out of short ones look at the length of their result.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import ExlLoaderError, InvalidSettings, InvalidTokenizer
from .json_keys import read_json_object

MAX_RENDER_SECONDS = 5.0
# A conversation that fills a context of a million tokens has about 4 MB of text.
MAX_RENDER_CHARS = 16 << 20

_REMEDY = "Use the original model's template, or give a plain prompt"
_TICK = "_exl_loader_tick"
_CONCAT = "_exl_loader_concat"


class _LimitReached(Exception):
    """A template ran too long or made too much."""


class ChatTemplates:
    """The templates of one model folder.

    Args:
        sources: name -> Jinja source; the usual one is called `default`.
        where: what errors call them.
    """

    def __init__(self, sources: Mapping[str, str], where: str = "chat template") -> None:
        self.sources = dict(sources)
        self.where = where
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_dir(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplates:
        """Collect the folder's templates.

        `chat_template.jinja` and `additional_chat_templates/*.jinja` win over
        `chat_template.json`, and that over `tokenizer_config.json`, as in transformers.

        Raises:
            InvalidTokenizer: a file cannot be read or holds no template.
        """
        return cls(
            _from_jinja_files(folder)
            or _from_value(_json_template(folder / "chat_template.json"), folder)
            or _from_value(tokenizer_config.get("chat_template"), folder),
            f"chat template of {folder}",
        )

    def __bool__(self) -> bool:
        return bool(self.sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation.

        Args:
            messages: JSON objects with `role` and mostly `content`; keys that are None are
                left out, as transformers does.
            tools: JSON schemas; with tools, the template `tool_use` is the default.
            add_generation_prompt: end with the header of the model's answer.
            name: which template.
            variables: what else the template may read.

        Raises:
            InvalidSettings: messages are no list of objects, or hold what is no JSON.
            InvalidTokenizer: no such template, it is broken, refuses the conversation,
                tries what the sandbox forbids, or does not end in time.
        """
        template = self._template(self._choose(name, tools))
        context = {
            "messages": _plain_messages(messages),
            "tools": _plain(tools, "tools") if tools is not None else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{key: _plain(value, key) for key, value in variables.items()},
        }
        with _BUDGET.running():
            try:
                return _join(template.generate(context))
            except ExlLoaderError:
                raise
            except Exception as error:
                # Templates can raise anything that Python code can: jinja2's own errors,
                # TypeError, OverflowError from range(), RecursionError from macros.
                raise self._error(error) from None

    def _choose(self, name: str | None, tools: Any) -> str:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise InvalidTokenizer(
                f"{self.where}: {name!r}",
                expected=f"one of {sorted(self.sources)}" if self.sources else "a template",
                actual="no such template" if self.sources else "none in this folder",
                remedy=_REMEDY,
            )
        return name

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self.sources[name])
            except (jinja2.TemplateError, RecursionError, ValueError) as error:
                raise self._error(error) from None
        return self._compiled[name]

    def _error(self, error: Exception) -> InvalidTokenizer:
        message = str(error) or type(error).__name__
        if isinstance(error, jinja2.TemplateSyntaxError):
            message += f" (line {error.lineno})"
        return InvalidTokenizer(
            self.where, expected="a template that renders this conversation",
            actual=message, remedy=_REMEDY,
        )


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
            raise _LimitReached(f"it did not end within {MAX_RENDER_SECONDS:g} s")
        return ""


_BUDGET = _Budget()


def _check_length(length: int) -> None:
    if length > MAX_RENDER_CHARS:
        raise _LimitReached(f"it makes values of more than {MAX_RENDER_CHARS} elements")


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
        elif operator == "%" and isinstance(left, str):
            # A width in a format makes a string of any length out of nothing.
            raise _LimitReached("it formats strings with %, which is not supported")
        return super().call_binop(context, operator, left, right)

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


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:
    # jinja2's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> _Environment:
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


def _plain(value: Any, what: str) -> Any:
    """Copy JSON data, so that a template sees no object with methods of its own."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSettings(what, expected="JSON data", actual=str(error)) from None


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    expected = "a list of objects with `role` and `content`"
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidSettings("messages", expected=expected, actual=type(messages).__name__)
    if not messages:
        raise InvalidSettings("messages", expected=expected, actual="an empty list")
    plain = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InvalidSettings("messages", expected=expected,
                                  actual=f"a message of type {type(message).__name__}")
        present = {key: value for key, value in message.items() if value is not None}
        plain.append(_plain(present, "messages"))
    return plain


def _from_jinja_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    sources = {}
    for name, path in files.items():
        try:
            sources[name] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidTokenizer(str(path), expected="a UTF-8 text file", actual=str(error),
                                   remedy=_REMEDY) from None
    return sources


def _json_template(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return read_json_object(path).get("chat_template")
    except ExlLoaderError as error:
        raise InvalidTokenizer(str(path), expected=error.expected, actual=error.actual,
                               remedy=_REMEDY) from None


def _from_value(value: Any, folder: Path) -> dict[str, str]:
    """Read `chat_template`: a string, a list of {name, template}, or name -> template."""
    named: Any = value
    if value is None:
        return {}
    if isinstance(value, str):
        named = {"default": value}
    elif isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
    if not isinstance(named, dict) or not all(
        isinstance(text, str) for pair in named.items() for text in pair
    ):
        raise InvalidTokenizer(
            f"chat_template of {folder}", expected="a string or a list of {name, template}",
            actual=repr(value)[:80], remedy=_REMEDY,
        )
    return named
