"""Main memory, within the limits of the system, the container and the process."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.parallel import run_tasks
from ...utils.system import main_memory
from ..base import Capacity, Process
from .threads import default_threads

if TYPE_CHECKING:
    import torch

PAGE_BYTES = mmap.PAGESIZE

# Bytes that a thread touches at a time: whole huge pages.
TOUCH_PIECE_BYTES = 32 << 20

# PyTorch, numpy and our kernels take 224 MiB with PyTorch 2.13 on x86-64 Linux. A process that
# only computes a reservation has not imported them. Loading a model will import them.
ASSUMED_RUNTIME_BYTES = 256 << 20


class MainMemory:
    """The memory part of `Backend`, read from /proc, cgroup files or other systems' interfaces.

    Args:
        proc: where /proc is mounted; tests pass a folder of their own.
        cgroups: where the cgroup files are mounted; likewise.
    """

    def __init__(self, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
        self._proc = Path(proc)
        self._cgroups = Path(cgroups)

    def capacity(self, device: str) -> Capacity:
        """Return the smallest of the machine's, its cgroups' and the process's address space's."""
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
        """Import PyTorch, whose libraries are the memory that is taken outside our buffers."""
        import torch  # noqa: F401

    def is_initialized(self, device: str) -> bool:
        """Return whether PyTorch is imported."""
        return "torch" in sys.modules

    def overhead(self, device: str) -> tuple[int, bool]:
        """Return 0 if PyTorch is imported, otherwise the assumed bytes of its libraries."""
        return (0, True) if "torch" in sys.modules else (ASSUMED_RUNTIME_BYTES, False)

    def processes(self, device: str, limit: int) -> list[Process]:
        """Return the other processes with the most resident memory."""
        found = [Process(*each) for each in main_memory.other_processes(self._proc)]
        return sorted(found, key=lambda process: -process.held_bytes)[:limit]

    def empty(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Map anonymous pages.

        A mapping is used instead of malloc because it starts at a page, it can request huge
        pages (fewer TLB misses, because every weight is read once a token), and the system gets
        it back when its last view is deleted.
        """
        import torch

        pages = main_memory.map_pages(nbytes)
        return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes], pages

    def empty_mapped(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Allocate as `empty` does: operations read all of main memory."""
        return self.empty(device, nbytes)

    def touch(self, buffer: torch.Tensor) -> None:
        """Write one byte a page, because the system takes memory for written pages only.

        It runs on several threads, because the system clears each page on the thread that touches
        it, and a virtual machine may have to ask its host for the page first.
        """
        pieces = buffer.split(TOUCH_PIECE_BYTES)
        run_tasks([partial(_touch_piece, piece) for piece in pieces], default_threads())


def _touch_piece(piece: torch.Tensor, advance: Callable[[int], None]) -> None:
    # Unlike an assignment to a slice, a method runs without Python's lock.
    piece[::PAGE_BYTES].zero_()
