"""All operations of the CPU by compiled kernels, run immediately or prepared for replays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..main_memory import MainMemoryOps
from ..recorder import Function, LinearPairs, MoeSum, TopLogits
from . import attention, linear, rows
from .library import INT, Issue, Kernel, Value, open_kernels, run_now
from .threads import default_threads

if TYPE_CHECKING:
    from ..base import Call, DeviceOps

# Name -> signature of a C function of csrc/cpu.
SIGNATURES = linear.SIGNATURES | attention.SIGNATURES | rows.SIGNATURES

NAMES = ("set_threads", *SIGNATURES)

# Calls that are not one kernel, or whose kernels depend on values of the step.
_RUN_EVERY_TIME = (Function, LinearPairs, MoeSum, TopLogits)


def missing_symbols(library: ctypes.CDLL) -> list[str]:
    """Return the functions that the operations call and that a library does not have."""
    missing = []
    for name in NAMES:
        try:
            library[f"exl_{name}"]
        except AttributeError:
            missing.append(f"exl_{name}")
    return missing


class CpuOps(linear.LinearOps, attention.AttentionOps, rows.RowOps, MainMemoryOps):
    """The operations of `base.DeviceOps` on the CPU.

    Args:
        library: the opened library of csrc/cpu.
        issue: see `KernelOps`.

    Raises:
        InvalidSettings: EXL_LOADER_THREADS is not a number from 1 to 1024.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL, issue: Issue = run_now):
        super().__init__(open_kernels(library, SIGNATURES), issue)
        self._library = library
        set_threads = library["exl_set_threads"]
        set_threads.restype, set_threads.argtypes = INT, (INT,)
        self._set_threads: Callable[[int], int] = set_threads
        if issue is run_now:
            self.set_threads(default_threads())

    def set_threads(self, threads: int) -> int:
        """Set the number of threads, the caller included. No call may be running.

        Returns:
            The number of threads that kernels will use.
        """
        return self._set_threads(threads)

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        function(self)

    def prepare(self, calls: Sequence[Call]) -> list[Callable[[], None]]:
        """Check calls and take their addresses once. A replay only calls one kernel for each."""
        issued: list[tuple[Kernel, tuple[Value, ...]]] = []
        recording = CpuOps(self._library, lambda kernel, values: issued.append((kernel, values)))
        prepared: list[Callable[[], None]] = []
        for call in calls:
            if isinstance(call, _RUN_EVERY_TIME):
                prepared.append(partial(call.run, self))
                continue
            call.run(recording)
            ((kernel, values),) = issued
            issued.clear()
            prepared.append(_replay(kernel, values, call))
        return prepared


def _replay(kernel: Kernel, values: tuple[Value, ...], call: Call) -> Callable[[], None]:
    def replay(
        function: Callable[..., int | None] = kernel.function,
        values: tuple[Value, ...] = values,
        _: Call = call,
    ) -> None:
        # `_` keeps the tensors alive, because `values` has only their addresses.
        if function(*values):
            raise AssertionError(kernel.rule)

    return replay
