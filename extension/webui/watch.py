"""Does something right after, or while, the web UI imports one of its modules.

The web UI loads `--model` before any extension, and imports its API and its page later still;
`modules` is a namespace package, so nothing of its own could be asked to wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .host import say

After = Callable[[ModuleType], None]
Around = Callable[[], AbstractContextManager[None]]


class Watcher:
    """A finder that lets the ordinary one find, and calls back.

    Attributes:
        after: module name -> what to call with the module once it is imported.
        around: module name -> a context to import it in.
        report: told about exceptions of either; none of them reaches the import.
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
        """Watch no more."""
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
            spec.loader = _Loader(spec.loader, self)
        return spec

    def call(self, name: str, module: ModuleType) -> None:
        """Do what was left for a module, once; failures are reported and swallowed."""
        self._executed.add(name)
        callback = self.after.pop(name, None)
        if callback is None:
            return
        try:
            callback(module)
        except Exception as error:
            self.report(name, error)

    def is_initializing(self, name: str) -> bool:
        """Whether a module is being executed right now, and lacks what comes further down."""
        spec = getattr(sys.modules.get(name), "__spec__", None)
        # To Python a module whose callback runs is still being imported.
        return bool(getattr(spec, "_initializing", False)) and name not in self._executed

    def context(self, name: str) -> AbstractContextManager[None]:
        """The context to import a module in; failing to make it is reported."""
        try:
            return self.around.pop(name, nullcontext)()
        except Exception as error:
            self.report(name, error)
            return nullcontext()


class _Loader(Loader):
    def __init__(self, inner: Loader, watcher: Watcher) -> None:
        self._inner = inner
        self._watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is to look as if nobody had watched, tracebacks and `inspect` included.
        assert module.__spec__ is not None
        module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        with self._watcher.context(module.__name__):
            self._inner.exec_module(module)
        self._watcher.call(module.__name__, module)


def _report(name: str, error: Exception) -> None:
    say(f"{name} could not be extended and stays as it is: {error}")


# The one of this process: registration may begin before any module of the web UI is there.
watcher = Watcher(_report)
