"""Processes: the output of a command, a child's limits, and Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import windows

if TYPE_CHECKING:
    import subprocess

# A command that takes longer to answer is treated as one that cannot be run.
COMMAND_TIMEOUT_S = 20.0
# GCC's answer to --version has 300 bytes.
MAX_COMMAND_OUTPUT_BYTES = 1 << 20

# How often a thread that waits for a lock must wake so that Ctrl-C is noticed; None where Ctrl-C
# interrupts the wait. Windows does not interrupt a thread that waits for a lock.
INTERRUPT_POLL_S = 0.1 if sys.platform == "win32" else None


def command_output(command: list[str]) -> str | None:
    """Return what a command writes to stdout.

    Returns:
        None where the command cannot be run, fails, takes longer than `COMMAND_TIMEOUT_S` or
        writes more than `MAX_COMMAND_OUTPUT_BYTES`.
    """
    # Imported here, because a plan imports this module and runs no command on most systems.
    import subprocess

    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return None
    read: list[bytes] = []
    # A thread, because a child of the command may keep the pipe open after the command ended.
    reader = threading.Thread(target=_read_output, args=(process, read), daemon=True)
    reader.start()
    reader.join(COMMAND_TIMEOUT_S)
    process.kill()
    code = process.wait()
    if not read or code != 0:
        return None
    return read[0].decode("utf-8", "replace").replace("\r\n", "\n")


def _read_output(process: subprocess.Popen[bytes], read: list[bytes]) -> None:
    """Read a command's output and wait for its end; leave `read` empty if there is too much."""
    assert process.stdout is not None
    with process.stdout as pipe:
        output = pipe.read(MAX_COMMAND_OUTPUT_BYTES + 1)
    if len(output) <= MAX_COMMAND_OUTPUT_BYTES:
        process.wait()
        read.append(output)


def split_command(text: str) -> list[str]:
    """Split a command line into words, by the quoting rules of this system."""
    return shlex.split(text, posix=sys.platform != "win32")


def join_command(words: Sequence[str]) -> str:
    """Quote words as the command line that this system's shell splits into them."""
    if sys.platform != "win32":
        return shlex.join(words)
    import subprocess

    return subprocess.list2cmdline(words)


def python_program() -> str:
    """Return the Python interpreter that a child process runs.

    On Windows a virtual environment's Python starts the real one as a child of its own, which
    limits and kills would miss. The real one is returned there.
    """
    base = getattr(sys, "_base_executable", None) if sys.platform == "win32" else None
    return base or sys.executable


def create_job(process: subprocess.Popen[bytes]) -> windows.Job | None:
    """Put a child that has just been started into a job object, which can bound it.

    Returns:
        None on systems without job objects. There the child has to set its own limits.

    Raises:
        OSError: the system refuses.
    """
    return windows.Job(process) if sys.platform == "win32" else None


# The exit code (negative: minus the signal) of a child whose processor time is used up: by a job
# object on Windows, by ITIMER_PROF elsewhere.
if sys.platform == "win32":
    OUT_OF_TIME_CODE = windows.OUT_OF_TIME
else:
    OUT_OF_TIME_CODE = -signal.SIGPROF


def watched_memory_bytes(pid: int) -> int | None:
    """Return the memory of a child, in bytes, on a system that enforces no limit of memory.

    That is macOS, which accepts limits and ignores them. Elsewhere None: the child's own limit
    or its job object bounds its memory.
    """
    if sys.platform != "darwin":
        return None
    usage = (ctypes.c_uint64 * 32)()
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    # struct rusage_info_v0 of <sys/resource.h>: a UUID of 16 bytes, then 64-bit fields, of
    # which the eighth is ri_phys_footprint.
    if library.proc_pid_rusage(pid, 0, ctypes.byref(usage)) != 0:
        return 0
    return usage[2 + 7]


def end_by_interrupt() -> None:
    """End this process by SIGINT, as if nothing had caught it; return where there are no signals.

    A shell ends its loop or script only after a program that the signal itself ended. After an
    exit code of 130 it would run the next command.
    """
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
