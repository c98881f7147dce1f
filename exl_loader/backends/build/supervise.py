"""Run a command that ends with the process that started it; standard library alone.

    python -I -S supervise.py COMMAND...

stdin is a pipe to which nothing is written. The system closes its other end when the starting
process closes it or dies. A process that is killed, by a signal or because memory is full, runs
no code of its own any more, so this process watches the pipe and then ends the command with all
processes that the command started. Linux's PR_SET_PDEATHSIG would end ninja only, and only on
Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping

# The exit code where the command cannot be started, as env(1) and timeout(1) have it.
START_FAILED = 125
# Between the request to end and the kill. ninja waits for its compilers to end.
GRACE_S = 10.0


def start(command: list[str] | str, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command that ends when this process does, or when the result's stdin is closed.

    Signals of a terminal (Ctrl-C, its closing) reach only this process, which decides whether
    the command ends.

    Args:
        command: a program and its arguments; on Windows it may be a whole command line.
        environ: the command's environment variables.

    Returns:
        The supervisor, whose exit code is the command's (`START_FAILED` where it cannot be
        started) and whose stdout is the command's stdout and stderr.

    Raises:
        OSError: the supervisor cannot be started.
    """
    arguments = [command] if isinstance(command, str) else command
    return subprocess.Popen(
        # -I -S: neither environment variables nor site-packages may change what it does.
        [sys.executable, "-I", "-S", os.path.abspath(__file__), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def run(arguments: list[str]) -> int:
    """Run a command until it ends or stdin is closed.

    Args:
        arguments: as `start` passes them on.

    Returns:
        The command's exit code; 128 + n where signal n ended it.
    """
    is_line = sys.platform == "win32" and len(arguments) == 1
    command = arguments[0] if is_line else arguments
    job = _enter_job() if sys.platform == "win32" else None
    try:
        # SIGPIPE stays ignored, because ninja must survive a closed stdout to end its compilers.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, restore_signals=False)
    except OSError as error:
        print(error.strerror or error, flush=True)
        return START_FAILED
    threading.Thread(target=_end_with_stdin, args=(process, job), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _enter_job() -> int | None:
    """Put this process, and all that it will start, into a job object (Windows only)."""
    import ctypes

    kernel32 = ctypes.CDLL("kernel32")
    kernel32.CreateJobObjectW.restype = kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    job = kernel32.CreateJobObjectW(None, None)
    this = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.AssignProcessToJobObject(ctypes.c_void_p(job), this)
    return job


def _end_with_stdin(process: subprocess.Popen[bytes], job: int | None) -> None:
    """Wait until stdin is closed, then end a command and what it started."""
    while os.read(0, 1):
        pass
    if job is not None:
        import ctypes

        ctypes.CDLL("kernel32").TerminateJobObject(ctypes.c_void_p(job), 1)
        return
    # ninja passes SIGTERM on to the process group of every compiler that it runs.
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    # Not by sys.exit, because on Windows an orderly exit may wait for the thread that reads.
    os._exit(run(sys.argv[1:]))
