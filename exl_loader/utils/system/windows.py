"""Win32 functions: memory, processors, and job objects that bound a child process.

Structures and functions: Microsoft's Win32 reference (sysinfoapi.h, psapi.h, winbase.h,
jobapi2.h). On 64-bit Windows all functions have one calling convention, so `CDLL` can call them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

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
    """SYSTEM_LOGICAL_PROCESSOR_INFORMATION: a bit mask of processors that share something."""

    _fields_ = [
        ("mask", ctypes.c_size_t),
        ("relationship", ctypes.c_uint32),
        ("details", ctypes.c_uint64 * 2),
    ]


class _JobLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = [
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    ]


_JOB_EXTENDED_LIMITS = 9
_LIMIT_PROCESS_TIME, _LIMIT_PROCESSES = 0x2, 0x8
_LIMIT_PROCESS_MEMORY, _LIMIT_KILL_ON_CLOSE = 0x100, 0x2000
# ERROR_NOT_ENOUGH_QUOTA: the exit code of a process whose processor time a job ended.
OUT_OF_TIME = 1816


class Job:
    """A job object that bounds a child process and ends it when this process ends.

    Args:
        process: a child that has just been started.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        library = _kernel32()
        library.CreateJobObjectW.restype = ctypes.c_void_p
        self._process = ctypes.c_void_p(int(process._handle))  # type: ignore[attr-defined,unused-ignore]
        # Closing the handle ends the child. The end of this process closes it.
        self._job = ctypes.c_void_p(library.CreateJobObjectW(None, None))
        self._set(_JobLimits(flags=_LIMIT_KILL_ON_CLOSE | _LIMIT_PROCESSES, processes=1))
        if not library.AssignProcessToJobObject(self._job, self._process):
            raise OSError("AssignProcessToJobObject failed")

    def __del__(self) -> None:
        _kernel32().CloseHandle(self._job)

    def limit(self, memory_bytes: int, seconds: float) -> None:
        """Set what the child may use from now on.

        Args:
            memory_bytes: total committed memory.
            seconds: further processor time.

        Raises:
            OSError: the system refuses.
        """
        times = (ctypes.c_uint64 * 4)()
        each = [ctypes.byref(times, 8 * index) for index in range(4)]
        if not _kernel32().GetProcessTimes(self._process, *each):
            raise OSError("GetProcessTimes failed")
        # The fourth is the time in user mode, in units of 100 ns.
        self._set(_JobLimits(
            flags=_LIMIT_KILL_ON_CLOSE | _LIMIT_PROCESSES | _LIMIT_PROCESS_MEMORY
            | _LIMIT_PROCESS_TIME,
            processes=1, process_memory=memory_bytes,
            process_time=times[3] + int(seconds * 10**7),
        ))

    def _set(self, limits: _JobLimits) -> None:
        if not _kernel32().SetInformationJobObject(
            self._job, _JOB_EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
        ):
            raise OSError("SetInformationJobObject failed")


def machine_memory() -> tuple[int, int]:
    """Return the machine's main memory and the part of it that can be taken now, in bytes.

    Memory is charged to main memory and to the sum of main memory and page file. The smaller
    remainder is what can be taken.

    Raises:
        OSError: the system does not report it.
    """
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not _kernel32().GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return status.total, min(status.available, status.available_commit)


def process_memory() -> tuple[int, int]:
    """Return the main memory that this process holds, and the most that it has held, in bytes.

    Raises:
        OSError: the system does not report it.
    """
    counters = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    library = _kernel32()
    process = ctypes.c_void_p(library.GetCurrentProcess())
    if not library.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length):
        raise OSError("GetProcessMemoryInfo failed")
    return counters.resident, counters.peak_resident


def physical_cores() -> int | None:
    """Count the cores on which this process may run; None where the system does not report them.

    On a machine with more than 64 processors, only one group of them is counted, because a
    process runs on one group unless it asks for others.
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
