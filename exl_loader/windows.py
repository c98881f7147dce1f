"""What Windows says of memory and processors, asked through its own functions.

Structures and functions: Microsoft's Win32 reference (sysinfoapi.h, psapi.h, winbase.h). On
64-bit Windows all functions have one calling convention, so that `CDLL` serves.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

# LOGICAL_PROCESSOR_RELATIONSHIP
_CORE = 0


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("total_commit", ctypes.c_uint64),
        ("available_commit", ctypes.c_uint64),
        ("total_addresses", ctypes.c_uint64),
        ("available_addresses", ctypes.c_uint64),
        ("available_extended", ctypes.c_uint64),
    ]


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_resident", ctypes.c_size_t),
        ("resident", ctypes.c_size_t),
        ("pools", ctypes.c_size_t * 4),
        ("commit", ctypes.c_size_t),
        ("peak_commit", ctypes.c_size_t),
    ]


class _Processors(ctypes.Structure):
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION: processors that share something, as bits."""

    _fields_ = [
        ("mask", ctypes.c_size_t),
        ("relationship", ctypes.c_uint32),
        ("details", ctypes.c_uint64 * 2),
    ]


def machine_memory() -> tuple[int, int]:
    """Return the machine's main memory and what of it can be had now, in bytes.

    What is taken is charged to main memory and page file together, whose limit may be the
    nearer one: then it is what can be had.

    Raises:
        OSError: the system does not say.
    """
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not _kernel32().GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return status.total, min(status.available, status.available_commit)


def process_memory() -> tuple[int, int]:
    """Return the main memory that this process holds, and the most it has held, in bytes.

    Raises:
        OSError: the system does not say.
    """
    counters = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    library = _kernel32()
    process = ctypes.c_void_p(library.GetCurrentProcess())
    if not library.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length):
        raise OSError("GetProcessMemoryInfo failed")
    return counters.resident, counters.peak_resident


def physical_cores() -> int | None:
    """Count the cores on which this process may run; None where the system does not say.

    Of machines with more than 64 processors those of one group, to which a process keeps
    unless it says otherwise.
    """
    library = _kernel32()
    allowed, present = ctypes.c_size_t(), ctypes.c_size_t()
    process = ctypes.c_void_p(library.GetCurrentProcess())
    if not library.GetProcessAffinityMask(process, ctypes.byref(allowed), ctypes.byref(present)):
        return None
    nbytes = ctypes.c_uint32()
    library.GetLogicalProcessorInformation(None, ctypes.byref(nbytes))
    found = (_Processors * (nbytes.value // ctypes.sizeof(_Processors)))()
    if not library.GetLogicalProcessorInformation(found, ctypes.byref(nbytes)):
        return None
    cores = [each.mask for each in found if each.relationship == _CORE]
    return sum(bool(mask & allowed.value) for mask in cores) or None


@functools.cache
def _kernel32() -> Any:
    library = ctypes.CDLL("kernel32.dll")
    library.GetCurrentProcess.restype = ctypes.c_void_p
    return library
