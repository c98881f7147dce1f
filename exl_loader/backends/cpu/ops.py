"""All operations of the CPU by compiled kernels, run immediately or prepared for replays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ...formats.layer import LOAD_THREADS
from ..main_memory import MainMemoryOps
from ..recorder import Function, LinearPairs, MoeSum, TopLogits
from . import attention, linear, rounding, rows
from .library import (
    INT,
    INT32,
    INT64,
    POINTER,
    Issue,
    Kernel,
    Replay,
    Signature,
    Value,
    open_kernels,
    run_now,
)
from .threads import default_threads

if TYPE_CHECKING:
    from ..base import Call, DeviceOps

# Name -> signature of a C function of csrc/cpu.
SIGNATURES = {
    **linear.SIGNATURES, **attention.SIGNATURES, **rows.SIGNATURES, **rounding.SIGNATURES,
    "read_sum": Signature((POINTER, INT64, POINTER), replayed=False),
}

NAMES = (
    "set_threads", "set_amx", "replay", *SIGNATURES,
    *(f"replay_{name}" for name, signature in SIGNATURES.items() if signature.replayed),
)

# Kernels of a replay, those of about one layer of a model. Python handles an interrupt between
# two replays, and the layers of a long prompt may take seconds.
_JOINED_CALLS = 16

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


class CpuOps(
    linear.LinearOps, attention.AttentionOps, rows.RowOps, rounding.RoundingOps, MainMemoryOps
):
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
        set_amx = library["exl_set_amx"]
        set_amx.restype, set_amx.argtypes = INT, (INT,)
        self._set_amx: Callable[[int], int] = set_amx
        self.load_threads = min(default_threads(), LOAD_THREADS)
        if issue is run_now:
            self.set_threads(default_threads())

    def set_threads(self, threads: int) -> int:
        """Set the number of threads, the caller included. No call may be running.

        Returns:
            The number of threads that kernels will use.
        """
        return self._set_threads(threads)

    def set_amx(self, on: bool) -> int:
        """Use AMX tiles for products of many rows, or not; not until the first call.

        Returns:
            One of the results in `amx.py`.
        """
        return self._set_amx(on)

    def read_through(self, buffer: torch.Tensor) -> int:
        nbytes: int = buffer.nbytes
        self._call("read_sum", buffer.data_ptr(), nbytes // 4, ctypes.byref(INT32()))
        return nbytes

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        function(self)

    def prepare(self, calls: Sequence[Call]) -> list[Callable[[], None]]:
        """Check calls and take their addresses once. Consecutive kernels become one replay."""
        issued: list[tuple[Kernel, tuple[Value, ...]]] = []
        recording = CpuOps(self._library, lambda kernel, values: issued.append((kernel, values)))
        prepared: list[Callable[[], None]] = []
        for runs_every_time, group in groupby(calls, _runs_every_time):
            if runs_every_time:
                prepared += [partial(call.run, self) for call in group]
                continue
            kernel_calls = list(group)
            for first in range(0, len(kernel_calls), _JOINED_CALLS):
                joined = kernel_calls[first : first + _JOINED_CALLS]
                for call in joined:
                    call.run(recording)
                # The calls keep the tensors alive.
                prepared.append(Replay(self._library, tuple(issued), joined))
                issued.clear()
        return prepared


def _runs_every_time(call: Call) -> bool:
    return isinstance(call, _RUN_EVERY_TIME)
