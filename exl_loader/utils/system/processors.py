"""Processors: cores that this process may use, their instruction set, and PyTorch's threads."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import machine_type, windows
from .processes import command_output

# More processors than any machine has: the quota of a process without a quota.
NO_QUOTA = 1 << 30


def physical_cores() -> int:
    """Count the physical cores on which this process may run."""
    if sys.platform == "win32":
        return windows.physical_cores() or os.cpu_count() or 1
    if sys.platform != "linux":
        answer = (command_output(["/usr/sbin/sysctl", "-n", "hw.physicalcpu"]) or "").strip()
        return int(answer) if answer.isdecimal() else os.cpu_count() or 1
    return _count_cores(frozenset(os.sched_getaffinity(0)))


@functools.cache
def _count_cores(processors: frozenset[int]) -> int:
    """Count cores among processors; siblings of one core count once."""
    cores = set()
    for processor in processors:
        path = f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        try:
            with open(path, encoding="ascii") as file:
                cores.add(file.read().strip())
        except OSError:
            cores.add(str(processor))
    return len(cores)


def processor_quota() -> int:
    """Return the whole processors that a container's quota allows, or `NO_QUOTA`."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return NO_QUOTA


def cpu_features() -> tuple[str, ...]:
    """Name what this CPU's instruction set has, sorted, with the machine type first.

    Linux: all flags of /proc/cpuinfo's first processor (the kernel shows only what every
    processor has). macOS: sysctl. Windows: the features that MSVC's /arch distinguishes.
    """
    if sys.platform == "linux":
        features = _linux_features(Path("/proc/cpuinfo"))
    elif sys.platform == "darwin":
        features = _mac_features()
    elif sys.platform == "win32":
        features = _windows_features()
    else:
        features = set()
    return (machine_type(), *sorted(features))


def _linux_features(cpuinfo: Path) -> set[str]:
    """Read the flags of the first processor; the rest takes time on machines with hundreds."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return set(value.split())
    except OSError:
        pass
    return set()


def _mac_features() -> set[str]:
    features: set[str] = set()
    for name in ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features"):
        answer = command_output(["/usr/sbin/sysctl", "-n", name]) or ""
        features.update(answer.lower().split())
    return features


def _windows_features() -> set[str]:
    # PF_AVX_..., PF_AVX2_... and PF_AVX512F_INSTRUCTIONS_AVAILABLE of winnt.h.
    numbers = {"avx": 39, "avx2": 40, "avx512f": 41}
    present = ctypes.windll.kernel32.IsProcessorFeaturePresent  # type: ignore[attr-defined,unused-ignore]
    return {name for name, number in numbers.items() if present(number)}


def cpu_name() -> str:
    """Return the maker's name of the CPU, for a person."""
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        except OSError:
            text = ""
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_lock = threading.Lock()
_callers = 0
_usual_threads = 1
# `depth`: blocks of this thread that are open.
_own = threading.local()


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Keep PyTorch to the calling thread during the block, and restore its setting afterwards.

    PyTorch's threads wait for each other in loops. That costs little on an idle machine. Where
    another program or the kernels' own threads need the cores, a load of small operations took
    six times as long.
    """
    import torch

    global _callers, _usual_threads
    with _lock:
        if _callers == 0:
            _usual_threads = torch.get_num_threads()
        _callers += 1
        torch.set_num_threads(1)
    depth = _own.depth = getattr(_own, "depth", 0) + 1
    try:
        yield
    finally:
        _own.depth -= 1
        # The setting belongs to each thread and is also what new threads start with. So every
        # one of several simultaneous loads restores both, to the value before the first load.
        with _lock:
            _callers -= 1
            if depth == 1:
                torch.set_num_threads(_usual_threads)
