"""Measure how fast this machine reads memory: the upper limit of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable

from exl_loader.backends.build.spec import require_cpu_spec
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.backends.cpu.open import open_compiled
from exl_loader.backends.cpu.ops import CpuOps

BUFFER_BYTES = CpuBackend.read_buffer_bytes


class Bandwidth:
    """Measure bytes a second of plain loads over a buffer larger than any cache.

    Args:
        threads: number of threads that read, as many as the measured engine uses.

    Raises:
        KernelBuildError: there is no C++ compiler, or it failed.
    """

    def __init__(self, threads: int):
        require_cpu_spec()
        ops = open_compiled()
        assert isinstance(ops, CpuOps)
        ops.set_threads(threads)
        # The kind of memory that holds weights, with huge pages: small ones cost a sixth.
        self._buffer, self._owner = CpuBackend().empty("cpu", BUFFER_BYTES)
        self._buffer.fill_(1)
        self._ops = ops

    def measure(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Return bytes a second of one pass over the buffer."""
        start = clock()
        return self._ops.read_through(self._buffer) / (clock() - start)
