"""Main memory: what the system, the container and the process's own limits leave."""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils import windows
from ..base import Capacity, Process

if TYPE_CHECKING:
    import torch

# A cgroup without a limit says 2^63 rounded down to a page (v1) or "max" (v2).
NO_LIMIT = 1 << 62
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
        own = self._own_bytes()
        bounds = [self._machine(), *self._cgroup_bounds()]
        address_space, touchable_bytes = self._address_space(), None
        if address_space is not None:
            touchable_bytes = max(0, min(free for _, free in bounds))
            bounds.append(address_space)
        return Capacity(
            capacity_bytes=min(total for total, _ in bounds),
            free_bytes=max(0, min(free for _, free in bounds)),
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
        found = []
        for folder in self._proc.glob("[0-9]*"):
            if int(folder.name) == os.getpid():
                continue
            status = _fields(folder / "status")
            held = _kib(status.get("VmRSS", ""))
            if held:
                found.append(Process(int(folder.name), status.get("Name", "?"), held))
        return sorted(found, key=lambda process: -process.held_bytes)[:limit]

    def empty(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Map anonymous pages.

        Not malloc: a mapping starts on a page, asks for huge pages (fewer misses while every
        weight is read once a token) and goes back to the system when its last view dies.
        Private, because Linux gives huge pages to shared mappings only where it is told to.
        """
        import torch

        try:
            if sys.platform == "win32":
                pages = mmap.mmap(-1, max(nbytes, 1))
            else:
                private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                pages = mmap.mmap(-1, max(nbytes, 1), private)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(str(error)) from error
        if sys.platform == "linux":
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages serves small ones
        return torch.frombuffer(pages, dtype=torch.uint8)[:nbytes], pages

    def touch(self, buffer: torch.Tensor) -> None:
        """Write one byte a page: what is only promised could be gone when it is needed."""
        buffer[::PAGE_BYTES] = 0

    def _machine(self) -> tuple[int, int]:
        info = _fields(self._proc / "meminfo")
        total = _kib(info.get("MemTotal", ""))
        if total:
            return total, _kib(info.get("MemAvailable", info.get("MemFree", "")))
        if sys.platform == "win32":
            return windows.machine_memory()
        try:  # no /proc
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return NO_LIMIT, NO_LIMIT
        # Where the system does not say what is free, all may be.
        return total, min(total, _mac_free_bytes() or total)

    def _own_bytes(self) -> int:
        status = _fields(self._proc / "self" / "status")
        if sys.platform == "win32" and not status:
            return windows.process_memory()[0]
        return _kib(status.get("VmRSS", ""))

    def _address_space(self) -> tuple[int, int] | None:
        if sys.platform == "win32":
            return None
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        used = _kib(_fields(self._proc / "self" / "status").get("VmSize", ""))
        return limit, limit - used

    def _cgroup_bounds(self) -> Iterator[tuple[int, int]]:
        """Yield (limit, free) of every limited cgroup that this process is in, v1 and v2."""
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
            if number == "0" and not controllers:
                roots = [self._cgroups, self._cgroups / "unified"]
                files = ("memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                roots = [self._cgroups / "memory"]
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            for root in roots:
                for folder in _ancestors(root, path):
                    bound = _cgroup_bound(folder, *files)
                    if bound is not None:
                        yield bound


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """A limit anywhere above counts. Inside a container the path may not exist; its root does."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:depth])


def _cgroup_bound(
    folder: Path, limit_file: str, usage_file: str, prefix: str
) -> tuple[int, int] | None:
    limit, usage = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
    if not limit.isdigit() or int(limit) >= NO_LIMIT or not usage.isdigit():
        return None
    # Cached file pages are counted as used, yet the kernel drops them before it refuses:
    # without them a container that has read its checkpoint once would seem full.
    stat = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if line)
    cached = sum(int(stat.get(prefix + key, 0)) for key in ("inactive_file", "active_file"))
    return int(limit), int(limit) - max(0, int(usage) - cached)


def _mac_free_bytes() -> int | None:
    """What macOS can give without pushing anything out, by vm_stat; None elsewhere."""
    if sys.platform != "darwin":
        return None
    from ..build.toolchain import command_output

    return vm_stat_free_bytes(command_output(["/usr/bin/vm_stat"]) or "")


def vm_stat_free_bytes(text: str) -> int | None:
    """Read what is free of vm_stat's output: pages of nobody, and of files not looked at lately.

    Returns:
        None where it is not such an output.
    """
    page_size = re.search(r"page size of (\d+) bytes", text)
    pages = dict(re.findall(r"^Pages (free|inactive|speculative):\s+(\d+)\.", text, re.MULTILINE))
    if page_size is None or len(pages) < 3:
        return None
    return int(page_size[1]) * sum(map(int, pages.values()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, str]:
    """Read `Key:  value` lines."""
    pairs = (line.partition(":") for line in _text(path).splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _kib(value: str) -> int:
    """`1234 kB` -> bytes; 0 where there is none."""
    number = value.split()[0] if value.split() else ""
    return int(number) * 1024 if number.isdigit() else 0
