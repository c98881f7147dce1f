"""Render chat templates in a separate process, with the standard library and jinja2 only.

    python -I -S -B sandbox.py SYS_PATH_AS_JSON

Templates are untrusted programs. jinja2's immutable sandbox keeps them away from Python's
internals, and the limits of this process bound the time and memory that they use. `renderer.py`
starts the process, sends it requests and starts a new one after a template ended it.

A request on stdin is `HEADER` (length of the body, limits) and a JSON body with `source` and
`context`. An answer on stdout is `STARTED`, then one of the kinds below, a length and UTF-8 text.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections import OrderedDict
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    # The import path of the starting process, which -I and -S leave out.
    sys.path[:] = json.loads(sys.argv[1])

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Bytes of the body; bytes of memory beyond that of the idle process; seconds of processor time.
HEADER = struct.Struct(">QQd")
LENGTH = struct.Struct(">Q")

READY, STARTED = b"r", b"s"
# The prompt; the template's own refusal; the template's mistake; the limit that it reached.
TEXT, REFUSED, FAILED, TOO_MUCH = b"t", b"x", b"f", b"m"

# A conversation that fills a context of a million tokens has about 4 MB of text.
MAX_PROMPT_CHARS = 16 << 20
# The longest templates of models have about 20,000 characters.
MAX_TEMPLATE_CHARS = 1 << 20
MAX_ERROR_CHARS = 1000

# Most memory that Windows charges the idle process with.
IDLE_BYTES = 64 << 20

_COMPILED_TEMPLATES = 8

# Methods of strings that return bytes, or that look characters up in an object of the template.
_UNSAFE_STR_METHODS = frozenset({"encode", "translate", "maketrans"})


class TemplateRefusal(jinja2.TemplateError):
    """The template does not accept this conversation; the message is the template's own."""


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, but access to Python's internals is an error and not empty text."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (int, float, bytes)):
            return False
        if isinstance(obj, str) and attr in _UNSAFE_STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(
            f"access to {attribute!r} of a {type(obj).__name__} is not allowed"
        )


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: renders the model's own text, which it marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """`namespace()` without names that begin with an underscore, which reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for key in dict(*rest, **kwargs):
            _check_attribute(key)
        Namespace.__init__(self, *rest, **kwargs)

    def __repr__(self) -> str:
        # Namespaces may contain each other, without end.
        return "<Namespace>"

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


class _Dict:
    """`dict` as a callable without the methods of the class, which could change a dict."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Instead of jinja2's own filter, which escapes characters that are special in HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Return an environment with the tags, filters and globals that transformers offers."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update({
        "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        "namespace": _Namespace, "dict": _Dict(),
    })
    return environment


class Templates:
    """Compiles templates and keeps the most recently used ones."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[str, jinja2.Template] = OrderedDict()

    def render(self, source: str, context: dict[str, Any]) -> str:
        """Render a template.

        Raises:
            Exception: templates can raise anything that Python code can.
        """
        template = self._compiled.pop(source, None)
        if template is None:
            if len(source) > MAX_TEMPLATE_CHARS:
                raise jinja2.TemplateError(
                    f"a template of more than {MAX_TEMPLATE_CHARS} characters")
            template = make_environment().from_string(source)
            if len(self._compiled) >= _COMPILED_TEMPLATES:
                self._compiled.popitem(last=False)
        self._compiled[source] = template
        return template.render(context)

    def answer(self, body: bytes) -> tuple[bytes, str]:
        """Answer a request; return the kind of answer and its text."""
        try:
            request = json.loads(body)
            prompt = self.render(request["source"], request["context"])
            if len(prompt) > MAX_PROMPT_CHARS:
                return TOO_MUCH, f"it writes more than {MAX_PROMPT_CHARS} characters"
            return TEXT, prompt
        except MemoryError:
            return TOO_MUCH, "it needs too much memory"
        except TemplateRefusal as error:
            return REFUSED, str(error)[:MAX_ERROR_CHARS]
        except Exception as error:
            # Besides jinja2's own errors: TypeError, OverflowError from range(), RecursionError
            # from macros and from the parser, SyntaxError where brackets nest too deeply.
            message = str(error)[:MAX_ERROR_CHARS] or type(error).__name__
            if isinstance(error, jinja2.TemplateSyntaxError):
                message += f" (line {error.lineno})"
            return FAILED, message


def _give_up_rights() -> None:
    """Give up rights that rendering does not need, in case a template escapes the sandbox."""
    if sys.platform == "win32":
        return
    import resource

    # Files can still be read, because Python imports codecs and parts of jinja2 on demand.
    limits = [resource.RLIMIT_CORE, resource.RLIMIT_FSIZE]
    limits += [resource.RLIMIT_NPROC] if hasattr(resource, "RLIMIT_NPROC") else []
    for limit in limits:
        resource.setrlimit(limit, (0, 0))
    # The starting process may ignore or block this signal, and children inherit that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def _address_space_bytes() -> int | None:
    """Return the size of the address space in use; None where this process cannot limit it."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _limit(idle_bytes: int | None, memory_bytes: int, seconds: float) -> None:
    """Limit memory and processor time of the next rendering; on Windows the renderer does."""
    if sys.platform == "win32":
        return
    if idle_bytes is not None:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = idle_bytes + memory_bytes
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    # The signal ends the process at once, even in compiled code.
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _read(count: int) -> bytes:
    """Read from stdin; exit when the renderer has ended."""
    parts = []
    while count:
        data = os.read(0, min(count, 1 << 20))
        if not data:
            os._exit(0)
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def _write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(1, left):]


def serve() -> None:
    """Answer requests until stdin closes, which happens when the renderer's process ends."""
    if sys.platform == "win32":
        import msvcrt

        for descriptor in (0, 1):
            msvcrt.setmode(descriptor, os.O_BINARY)
    idle_bytes = _address_space_bytes()
    _give_up_rights()
    templates = Templates()
    _write(READY)
    while True:
        length, memory_bytes, seconds = HEADER.unpack(_read(HEADER.size))
        body = _read(length)
        _write(STARTED)
        _limit(idle_bytes, memory_bytes, seconds)
        kind, text = templates.answer(body)
        try:
            data = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            kind, data = TOO_MUCH, b"it needs too much memory"
        del text, body
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)
        _write(kind + LENGTH.pack(len(data)))
        _write(data)
        if kind == TOO_MUCH:
            # Memory that is still held could make the next template fail.
            os._exit(0)


if __name__ == "__main__":
    serve()
