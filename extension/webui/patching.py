"""How the web UI is changed: attributes, code of functions, modules while they are imported.

Nothing here knows what the plugin changes. Every change to an attribute, a table or a function
can be taken back.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .contract import WebuiDiffers, say

After = Callable[[ModuleType], None]
Around = Callable[[], AbstractContextManager[None]]


class Patches:
    """Changes to the web UI that can all be taken back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        if name in vars(owner):
            old = vars(owner)[name]
            self._undo.append(lambda: setattr(owner, name, old))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, value)

    def put(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Add a key that a table does not have yet."""
        table[key] = value
        self._undo.append(lambda: table.pop(key, None))

    def replace(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Replace a function in every module that imported it by value."""
        for owner, name in _holders(old):
            if inspect.ismodule(owner):
                self.set(owner, name, new)

    def code(self, function: Any, code: Any) -> None:
        """Replace a function's body in place, so that every reference to it runs the new one."""
        old = function.__code__
        self._undo.append(lambda: setattr(function, "__code__", old))
        function.__code__ = code

    def later(self, undo: Callable[[], None]) -> None:
        """Add a step to be done when all changes are taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take all changes back, the last one first."""
        while self._undo:
            self._undo.pop()()


def _holders(value: object) -> Iterator[tuple[ModuleType, str]]:
    """Yield every imported module that has this very object, and under which name."""
    for found in list(sys.modules.values()):
        if isinstance(found, ModuleType):
            for name, held in list(vars(found).items()):
                if held is value:
                    yield found, name


# ---- Functions with one more dict entry or constant ----
# Both functions change a function's code in place: a module that imported the function by value
# runs the new body, and everything else in the body stays the web UI's.


def add_dict_entries(
    patches: Patches, function: Any, variable: str, entries: Mapping[str, str]
) -> None:
    """Add entries to a dict that a function builds in a local variable.

    Args:
        function: of a module whose source can be read.
        variable: the local name that one dict display is assigned to.
        entries: key -> global name of the value.

    Raises:
        WebuiDiffers: the function has no such assignment, or no source.
    """
    try:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        raise WebuiDiffers(f"the source of {function.__name__} cannot be read: {error}") from None
    displays = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets)
    ]
    if len(displays) != 1 or function.__code__.co_freevars:
        raise WebuiDiffers(f"{function.__name__} builds no dict {variable}")
    for key, name in entries.items():
        displays[0].keys.append(ast.Constant(key))
        displays[0].values.append(ast.Name(name, ast.Load()))
    # So that tracebacks point into the web UI's own file.
    ast.increment_lineno(tree, first_line - 1)
    ast.fix_missing_locations(tree)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), namespace)
    patches.code(function, namespace[function.__name__].__code__)


def extend_constant(
    patches: Patches, module: ModuleType, constant: tuple[str, ...], extended: tuple[str, ...]
) -> int:
    """Replace a tuple of names in every function of a module, nested functions included.

    Returns:
        how many code objects had it.
    """
    count = 0
    for function in list(vars(module).values()):
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            code, found = _with_constant(function.__code__, constant, extended)
            if found:
                patches.code(function, code)
                count += found
    return count


def _with_constant(
    code: CodeType, old: tuple[str, ...], new: tuple[str, ...]
) -> tuple[CodeType, int]:
    count = 0
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant, inner = _with_constant(constant, old, new)
            count += inner
        elif type(constant) is tuple and constant == old:
            constant = new
            count += 1
        constants.append(constant)
    return (code.replace(co_consts=tuple(constants)) if count else code), count


# ---- Modules, right after or while they are imported ----
# The web UI loads `--model` before any extension, and imports its API and its page even later.
# `modules` is a namespace package, so it has no __init__.py that could be asked to wait.


class Watcher:
    """A finder that lets the ordinary finder work, and then calls back.

    Attributes:
        after: module name -> what to call with the module once it is imported.
        around: module name -> a context to import it in.
        report: called with exceptions of either; none of them reaches the import.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        self.after: dict[str, After] = {}
        self.around: dict[str, Around] = {}
        self.report = report
        self._executed: set[str] = set()

    def start(self) -> None:
        """Watch from now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Stop watching."""
        self._executed.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        """Find watched modules as `PathFinder` does, with a loader that calls back."""
        if fullname not in self.after and fullname not in self.around:
            return None
        spec = PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def call(self, name: str, module: ModuleType) -> None:
        """Call what waits for a module, once; failures are reported and swallowed."""
        self._executed.add(name)
        callback = self.after.pop(name, None)
        if callback is None:
            return
        try:
            callback(module)
        except Exception as error:
            self.report(name, error)

    def is_initializing(self, name: str) -> bool:
        """Return whether a module is being executed now and may lack part of its content."""
        spec = getattr(sys.modules.get(name), "__spec__", None)
        # Python counts a module whose callback runs as still being imported.
        return bool(getattr(spec, "_initializing", False)) and name not in self._executed

    def context(self, name: str) -> AbstractContextManager[None]:
        """Return the context to import a module in; a failure to make it is reported."""
        try:
            return self.around.pop(name, nullcontext)()
        except Exception as error:
            self.report(name, error)
            return nullcontext()


class _WatchedLoader(Loader):
    def __init__(self, inner: Loader, watcher: Watcher) -> None:
        self._inner = inner
        self._watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had not been watched, to tracebacks and `inspect` too.
        assert module.__spec__ is not None
        module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        with self._watcher.context(module.__name__):
            self._inner.exec_module(module)
        self._watcher.call(module.__name__, module)


def _report(name: str, error: Exception) -> None:
    say(f"{name} could not be extended and is left unchanged: {error}")


# One per process: `early` starts it before any module of the web UI is imported.
watcher = Watcher(_report)
