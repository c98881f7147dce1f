"""A recorder of operations: parts run on it once for each shape of a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..backends.base import Ops

Call = Callable[[], Any]


class Recorder:
    """Stands in for an `Ops` and collects the calls instead of running them.

    An implementation may offer `bind(operation, *args) -> callable without arguments`, which
    prepares a call once for all its replays, or `bind_all([(operation, args), ...]) -> list of
    callables`, which may run neighbours as one.

    `reads_values` says whether a collected function looks at values of the step, so that what
    runs is not the same every time.
    """

    def __init__(self, ops: Ops):
        self._ops = ops
        self._bind = getattr(ops, "bind", None)
        self._bind_all = getattr(ops, "bind_all", None)
        self._calls: list[Call] = []
        self._pending: list[tuple[str, tuple[Any, ...]]] = []
        self.reads_values = False

    def __getattr__(self, operation: str) -> Callable[..., None]:
        def record(*args: Any) -> None:
            if self._bind_all is not None:
                self._pending.append((operation, args))
            elif self._bind is not None:
                self._calls.append(self._bind(operation, *args))
            else:
                self._calls.append(partial(getattr(self._ops, operation), *args))

        return record

    @property
    def calls(self) -> list[Call]:
        """What was collected, ready to run."""
        if self._bind_all is not None and self._pending:
            self._calls += self._bind_all(self._pending)
            self._pending = []
        return self._calls

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Collect a call of a function whose operations depend on values of the step."""
        self.reads_values = True
        self.calls.append(partial(function, self._ops, *args))
