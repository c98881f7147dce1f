"""How a host is changed: attributes of its modules, and modules while they are imported.

Nothing here knows which host it is or what is changed. Every change to an attribute or a table can
be taken back.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

After = Callable[[ModuleType], None]
Around = Callable[[], AbstractContextManager[None]]


class Patches:
    """Changes to a host that can all be taken back."""

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


# ---- Modules, right after or while they are imported ----


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
