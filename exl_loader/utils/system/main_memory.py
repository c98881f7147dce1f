"""Main memory: the machine's, what limits leave of it, what processes hold, and mapping pages.

Linux answers by /proc and the cgroup files, Windows by functions, macOS by sysconf and vm_stat.
`proc` and `cgroups` are where Linux mounts its files; tests pass folders of their own.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import windows
from .processes import command_output

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

# The limit of a cgroup without one: 2^63 rounded down to a page (v1) or "max" (v2).
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class MemoryBound:
    """A limit that this process is under.

    Args:
        total_bytes: the limit.
        free_bytes: what is left of it; may be negative.
    """

    total_bytes: int
    free_bytes: int


def machine_memory(proc: Path = PROC) -> MemoryBound:
    """Return the machine's main memory and what a process can take of it now.

    Raises:
        OSError: Windows does not report it.
    """
    info = _fields(proc / "meminfo")
    total = _kib(info.get("MemTotal", ""))
    if total:
        return MemoryBound(total, _kib(info.get("MemAvailable", info.get("MemFree", ""))))
    if sys.platform == "win32":
        return MemoryBound(*windows.machine_memory())
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return MemoryBound(NO_LIMIT, NO_LIMIT)
    # Where the system does not report free memory, assume that everything is.
    return MemoryBound(total, min(total, _mac_free_bytes() or total))


def cgroup_bounds(proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[MemoryBound]:
    """Yield the bound of every limited cgroup that this process is in, of versions 1 and 2."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0" and not controllers:
            roots = [cgroups, cgroups / "unified"]
            files = ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for root in roots:
            for folder in _ancestors(root, path):
                bound = _cgroup_bound(folder, *files)
                if bound is not None:
                    yield bound


def _ancestors(root: Path, path: str) -> Iterator[Path]:
    """Yield a cgroup's folder and those above it, whose limits count as well.

    Inside a container the path may not exist; its root does.
    """
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:depth])


def _cgroup_bound(
    folder: Path, limit_file: str, usage_file: str, prefix: str
) -> MemoryBound | None:
    limit, usage = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
    if not limit.isdigit() or int(limit) >= NO_LIMIT or not usage.isdigit():
        return None
    # Cached file pages are counted as used, but the kernel drops them before it refuses memory.
    # If they counted, a container that has read its checkpoint once would seem full.
    stat = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if line)
    cached = sum(int(stat.get(prefix + key, 0)) for key in ("inactive_file", "active_file"))
    return MemoryBound(int(limit), int(limit) - max(0, int(usage) - cached))


def address_space(proc: Path = PROC) -> MemoryBound | None:
    """Return the limit of this process's address space (RLIMIT_AS), or None without one."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = _kib(_fields(proc / "self" / "status").get("VmSize", ""))
    return MemoryBound(limit, limit - used)


def process_bytes(proc: Path = PROC) -> int:
    """Return the main memory that this process holds, in bytes; 0 where unknown."""
    status = _fields(proc / "self" / "status")
    if sys.platform == "win32" and not status:
        return windows.process_memory()[0]
    return _kib(status.get("VmRSS", ""))


def peak_process_bytes() -> int:
    """Return the most main memory that this process has held so far, in bytes."""
    if sys.platform == "win32":
        return windows.process_memory()[1]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux units of 1024.
    return peak if sys.platform == "darwin" else peak * 1024


def other_processes(proc: Path = PROC) -> Iterator[tuple[int, str, int]]:
    """Yield process id, name and main memory in bytes of each process but this one; Linux only."""
    for folder in proc.glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        status = _fields(folder / "status")
        held = _kib(status.get("VmRSS", ""))
        if held:
            yield int(folder.name), status.get("Name", "?"), held


def map_pages(nbytes: int) -> mmap.mmap:
    """Map private anonymous pages, huge ones where Linux has them.

    Private, because Linux gives huge pages to shared mappings only where it is configured to.

    Raises:
        MemoryError: the system refuses.
    """
    try:
        if sys.platform == "win32":
            pages = mmap.mmap(-1, max(nbytes, 1))
        else:
            pages = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(str(error)) from error
    if sys.platform == "linux":
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages provides small ones
    return pages


def _mac_free_bytes() -> int | None:
    """Return what macOS can provide without swapping, by vm_stat; None elsewhere."""
    if sys.platform != "darwin":
        return None
    return vm_stat_free_bytes(command_output(["/usr/bin/vm_stat"]) or "")


def vm_stat_free_bytes(text: str) -> int | None:
    """Read the free memory out of vm_stat's output: unused pages, and pages of files not used
    lately.

    Returns:
        Bytes, or None where the text is no such output.
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
    """Convert `1234 kB` to bytes; 0 where there is no number."""
    number = value.split()[0] if value.split() else ""
    return int(number) * 1024 if number.isdigit() else 0
