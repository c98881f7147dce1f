"""Main memory: what the system, the container and the process's own limits leave."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.system import main_memory
from ..base import Capacity, Process

if TYPE_CHECKING:
    import torch

PAGE_BYTES = mmap.PAGESIZE

# PyTorch, numpy and our kernels: 224 MiB resident with PyTorch 2.13 on x86-64 Linux. A process
# that only plans has not loaded them; the one that loads will.
ASSUMED_RUNTIME_BYTES = 256 << 20


class MainMemory:
    """The memory part of `Backend`: /proc and the cgroup files, or what other systems have.

    Args:
        proc, cgroups: where they are mounted; tests bring trees of their own.
    """

    def __init__(self, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
        self._proc = Path(proc)
        self._cgroups = Path(cgroups)

    def capacity(self, device: str) -> Capacity:
        """Return the narrowest of the machine, its cgroups and the process's address space."""
        own = main_memory.process_bytes(self._proc)
        bounds = [
            main_memory.machine_memory(self._proc),
            *main_memory.cgroup_bounds(self._proc, self._cgroups),
        ]
        address_space, touchable_bytes = main_memory.address_space(self._proc), None
        if address_space is not None:
            touchable_bytes = max(0, min(bound.free_bytes for bound in bounds))
            bounds.append(address_space)
        return Capacity(
            capacity_bytes=min(bound.total_bytes for bound in bounds),
            free_bytes=max(0, min(bound.free_bytes for bound in bounds)),
            own_bytes=own,
            touchable_bytes=touchable_bytes,
        )

    def initialize(self, device: str) -> None:
        """Import PyTorch: its libraries are what running takes."""
        import torch  # noqa: F401

    def is_initialized(self, device: str) -> bool:
        """Whether PyTorch is in memory."""
        return "torch" in sys.modules

    def overhead(self, device: str) -> tuple[int, bool]:
        """Nothing once PyTorch is in memory, and its libraries until then."""
        return (0, True) if "torch" in sys.modules else (ASSUMED_RUNTIME_BYTES, False)

    def processes(self, device: str, limit: int) -> list[Process]:
        """Return the processes with the most resident memory, this one left out."""
        found = [Process(*each) for each in main_memory.other_processes(self._proc)]
        return sorted(found, key=lambda process: -process.held_bytes)[:limit]

    def empty(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Map anonymous pages.

        Not malloc: a mapping starts on a page, asks for huge pages (fewer misses while every
        weight is read once a token) and goes back to the system when its last view dies.
        """
        import torch

        pages = main_memory.map_pages(nbytes)
        return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes], pages

    def touch(self, buffer: torch.Tensor) -> None:
        """Write one byte a page: what is only promised could be gone when it is needed."""
        buffer[::PAGE_BYTES] = 0
