"""Run a command that must not outlive whoever started it; standard library alone.

    python -I -S supervise.py COMMAND...
    python -I -S supervise.py --bounded COMMAND...

stdin is a pipe to which nothing is written. Its other end closes when the starter closes it,
and when the starter dies, of whatever: a signal that ends a host without a word, or the
system's killer where memory is full, leaves no chance to run anything of ours in it. Then the
command is ended, with all that it started.

With `--bounded` only the beginning and the end of a command's output are passed on. ninja keeps
the whole output of a compiler in memory until the compiler ends, so each compiler runs under it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping

# The exit code where the command cannot be started, as of env(1) and timeout(1).
START_FAILED = 125
# ninja waits for its compilers, which end as soon as they are told.
GRACE_S = 10.0

BOUNDED = "--bounded"
# How much of the beginning, and of the end, of an output is kept.
KEPT_BYTES = 1 << 16
_READ_BYTES = 1 << 16


class BoundedOutput:
    """The beginning and the end of a text of any length, in a fixed amount of memory.

    Args:
        kept_bytes: how much of each.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._head = b""
        self._tail = b""
        self._left_out_bytes = 0

    def add(self, data: bytes) -> None:
        """Append to the text."""
        room = self._kept_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        excess = len(self._tail) - self._kept_bytes
        if excess > 0:
            self._left_out_bytes += excess
            self._tail = self._tail[excess:]

    def get(self) -> bytes:
        """Return what is kept, with a line in place of what is not."""
        if not self._left_out_bytes:
            return self._head + self._tail
        gap = f"\n... {self._left_out_bytes} bytes of output are left out here ...\n"
        return self._head + gap.encode() + self._tail


def start(command: list[str] | str, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command that ends when this process does, or when the result's stdin is closed.

    A terminal's Ctrl-C, and its end, do not reach the command: they reach this process, which
    says what becomes of it.

    Args:
        command: a program and its arguments; or, on Windows alone, a whole command line.
        environ: of the command.

    Returns:
        The supervisor, whose exit code is the command's (`START_FAILED` where it cannot be
        started) and whose stdout is the command's stdout and stderr.

    Raises:
        OSError: the supervisor cannot be started.
    """
    words = [command] if isinstance(command, str) else command
    return subprocess.Popen(
        # -I -S: neither environment variables nor site-packages may change what it does.
        [sys.executable, "-I", "-S", os.path.abspath(__file__), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def run(words: list[str]) -> int:
    """Run a command until it ends, or until stdin does.

    Args:
        words: as `start` passes them on.

    Returns:
        The command's exit code; 128 + n where signal n ended it.
    """
    command = words[0] if sys.platform == "win32" and len(words) == 1 else words
    job = _enter_job() if sys.platform == "win32" else None
    try:
        # With SIGPIPE ignored, as Python itself does: what has nobody left to write to must
        # live on to end its children.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, restore_signals=False)
    except OSError as error:
        print(error.strerror or error, flush=True)
        return START_FAILED
    threading.Thread(target=_end_with_stdin, args=(process, job), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def run_bounded(command: list[str]) -> int:
    """Run a command and pass on the beginning and the end of its stdout and stderr.

    Returns:
        As `run`.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror or error}", flush=True)
        return START_FAILED
    assert process.stdout is not None
    output = BoundedOutput()
    while data := os.read(process.stdout.fileno(), _READ_BYTES):
        output.add(data)
    code = process.wait()
    kept = memoryview(output.get())
    while kept:
        kept = kept[os.write(1, kept):]
    return code if code >= 0 else 128 - code


def _enter_job() -> int | None:
    """Make a job object of this process and all that it will start; Windows alone."""
    import ctypes

    kernel32 = ctypes.CDLL("kernel32")
    kernel32.CreateJobObjectW.restype = kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    job = kernel32.CreateJobObjectW(None, None)
    this = ctypes.c_void_p(kernel32.GetCurrentProcess())
    kernel32.AssignProcessToJobObject(ctypes.c_void_p(job), this)
    return job


def _end_with_stdin(process: subprocess.Popen[bytes], job: int | None) -> None:
    while os.read(0, 1):
        pass
    if job is not None:
        import ctypes

        ctypes.CDLL("kernel32").TerminateJobObject(ctypes.c_void_p(job), 1)
        return
    # ninja passes it on to the process group of every compiler that it runs.
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    # At once: on Windows an orderly end could wait for the thread that reads.
    if sys.argv[1:2] == [BOUNDED]:
        os._exit(run_bounded(sys.argv[2:]))
    os._exit(run(sys.argv[1:]))
