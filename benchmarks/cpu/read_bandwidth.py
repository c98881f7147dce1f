"""Measure how fast this machine reads memory: the upper limit of decoding."""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import REPO
from exl_loader.backends.build.spec import require_cpu_spec
from exl_loader.backends.cpu.memory import MainMemory

# Several times a last-level cache of 32 MiB, in whole claims of read_bandwidth.cpp.
BUFFER_BYTES = 150_000_000
CLAIM_INTS = 65536


class Bandwidth:
    """Measure bytes a second of plain loads over a buffer larger than any cache.

    Args:
        threads: number of threads that read, as many as the measured engine uses.
        directory: folder that the loop is compiled into.

    Raises:
        KernelBuildError: there is no C++ compiler.
        subprocess.CalledProcessError: the compiler failed.
    """

    def __init__(self, threads: int, directory: str):
        spec = require_cpu_spec()
        library = str(Path(directory) / "read_bandwidth.so")
        names = ("benchmarks/cpu/read_bandwidth.cpp", "csrc/cpu/threads.cpp")
        sources = [str(REPO / name) for name in names]
        subprocess.run(
            [*spec.compiler.command, *spec.flags, f"-I{REPO / 'csrc'}", *spec.link_flags,
             *sources, "-o", library],
            check=True,
        )  # fmt: skip
        opened = ctypes.CDLL(library)
        opened.exl_set_threads(threads)
        self._sum = opened.read_bandwidth_sum
        self._sum.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        # The kind of memory that holds weights, with huge pages: small ones cost a sixth.
        buffer, self._owner = MainMemory().empty("cpu", BUFFER_BYTES)
        count = BUFFER_BYTES // 4 // CLAIM_INTS * CLAIM_INTS
        self._data = buffer.view(torch.int32)[:count].fill_(1)

    def measure(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Return bytes a second of one pass over the buffer."""
        start = clock()
        self._sum(self._data.data_ptr(), self._data.numel())
        return self._data.nbytes / (clock() - start)
