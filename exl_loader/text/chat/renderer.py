"""Run `sandbox.py` in a child process, and start a new one after a template ended it.

The limits of a process bound every filter, method and operator of a template. On Linux the child
limits its own address space and processor time (`setrlimit`, `ITIMER_PROF`). On Windows a job
object limits both. macOS enforces no memory limit, so there this process watches the child's
memory while it renders. The child ends with this process, because its stdin (on Windows, the job)
then closes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from ...utils.system import processes
from . import sandbox

MAX_RENDER_SECONDS = 5.0
# Memory that a template may take: a base, and a multiple of the request. Rendering holds the
# request as JSON, its values, the prompt and its parts, with four bytes a character where one of
# them is an emoji. Escaped as JSON, a character has up to 12 bytes.
BASE_BYTES = 64 << 20
BYTES_PER_REQUEST_BYTE = 32
# Wall-clock time, for a child that gets no processor time: it is stopped, or the machine swaps.
MAX_WAIT_SECONDS = 120.0
_START_SECONDS = 120.0
# How often the child's memory is watched on macOS.
_LOOK_SECONDS = 0.02


class RenderError(Exception):
    """A template was not rendered; the message names its mistake or the limit that it reached."""


class TemplateRefusal(RenderError):
    """The template does not accept this conversation; the message is the template's own."""


class Renderer:
    """Renders templates in a child process, one at a time. The first rendering starts the child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(self, source: str, context: dict[str, Any]) -> str:
        """Render a template.

        Args:
            source: Jinja text.
            context: its variables; JSON data.

        Raises:
            TemplateRefusal: the template does not accept the conversation.
            RenderError: the template is broken, tries what the sandbox forbids, or reached a
                limit.
        """
        try:
            body = json.dumps({"source": source, "context": context}).encode("ascii")
        except RecursionError:
            raise RenderError("the conversation nests too deeply") from None
        with self._lock:
            for _ in range(3):
                answer = self._ask(body)
                if answer is not None:
                    break
            else:
                raise RenderError("the process that renders it ends before it begins")
        kind, text = answer
        if kind == sandbox.REFUSED:
            raise TemplateRefusal(text)
        if kind != sandbox.TEXT:
            raise RenderError(text)
        return text

    def _ask(self, body: bytes) -> tuple[bytes, str] | None:
        """Send a request to the child; return None if the child ended before it began to render."""
        try:
            if self._child is None or self._child.has_ended():
                self._child = None
                self._child = _Child()
            return self._child.ask(body, BASE_BYTES + BYTES_PER_REQUEST_BYTE * len(body))
        except _Ended as ended:
            self.stop()
            if ended.began:
                raise RenderError(str(ended)) from None
            return None
        except BaseException:
            # Ctrl-C, for example: the answer to this request must not be read by the next one.
            self.stop()
            raise

    def stop(self) -> None:
        """End the child. The next rendering starts another one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def forget(self) -> None:
        """In a forked process: leave the child to the parent process."""
        child = self._child
        self.__init__()  # type: ignore[misc]
        if child is not None:
            child.close()


class _Ended(Exception):
    """The child ended. `began` is True if it had begun to render."""

    def __init__(self, why: str, began: bool) -> None:
        super().__init__(why)
        self.began = began


class _Child:
    """A running `sandbox.py`."""

    def __init__(self) -> None:
        paths = [os.path.abspath(path) for path in sys.path if path]
        try:
            self._process = subprocess.Popen(
                [processes.python_program(), "-I", "-S", "-B", os.path.abspath(sandbox.__file__),
                 json.dumps(paths)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                bufsize=0,
                # Ctrl-C in a terminal must not reach the child.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
                | getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise RenderError(
                f"the process that renders it does not start: {error.strerror or error}"
            ) from None
        self._why = ""
        try:
            self._job = processes.create_job(self._process)
            with _Watch(self, _START_SECONDS):
                if self._read(1, began=True) != sandbox.READY:
                    raise _Ended("the process that renders it does not start", began=True)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def has_ended(self) -> bool:
        """Return whether the process has ended, for whatever reason."""
        return self._process.poll() is not None

    def ask(self, body: bytes, memory_bytes: int) -> tuple[bytes, str]:
        """Send a request; return the kind of answer and its text.

        Raises:
            _Ended: the process ended before it answered.
        """
        if self._job is not None:
            self._job.limit(sandbox.IDLE_BYTES + memory_bytes, MAX_RENDER_SECONDS)
        header = sandbox.HEADER.pack(len(body), memory_bytes, MAX_RENDER_SECONDS)
        with _Watch(self, MAX_WAIT_SECONDS, memory_bytes):
            self._write(header + body)
            self._read(1, began=False)
            answer = self._read(1 + sandbox.LENGTH.size, began=True)
            (length,) = sandbox.LENGTH.unpack(answer[1:])
            if length > 4 * sandbox.MAX_PROMPT_CHARS:
                raise _Ended("the process that renders it answers nonsense", began=True)
            return answer[:1], self._read(length, began=True).decode("utf-8", "surrogatepass")

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        left = memoryview(data)
        try:
            while left:
                left = left[self._process.stdin.write(left):]
        except OSError:
            raise _Ended("", began=False) from None

    def _read(self, count: int, began: bool) -> bytes:
        assert self._process.stdout is not None
        parts = []
        while count:
            data = self._process.stdout.read(min(count, 1 << 20))
            if not data:
                raise _Ended(self._describe_end(), began)
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def _describe_end(self) -> str:
        code = self._process.wait()
        if self._why:
            return self._why
        if code == processes.OUT_OF_TIME_CODE:
            return f"it did not end within {MAX_RENDER_SECONDS:g} s of processor time"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the process that renders it ended by {signal.Signals(-code).name}"
        return f"the process that renders it ended with code {code}"

    def kill(self, why: str = "") -> None:
        """End the process at once.

        Args:
            why: the reason, for the error message.
        """
        self._why = self._why or why
        self._process.kill()
        if not why:
            self._process.wait()
            self.close()

    def close(self) -> None:
        """Close this process's ends of the pipes."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

class _Watch:
    """Ends a child that takes too much wall-clock time or, on macOS, too much memory.

    Args:
        child: the child that is watched during the block.
        seconds: most wall-clock time.
        memory_bytes: most memory beyond what the child has at the beginning.
    """

    def __init__(self, child: _Child, seconds: float, memory_bytes: int = 1 << 62) -> None:
        self._child = child
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        deadline = time.monotonic() + self._seconds
        held = processes.watched_memory_bytes(self._child.pid)
        if held is None:
            if not self._done.wait(self._seconds):
                self._child.kill(f"it did not end within {self._seconds:g} s")
            return
        most = held + self._memory_bytes
        while not self._done.wait(_LOOK_SECONDS):
            if (processes.watched_memory_bytes(self._child.pid) or 0) > most:
                self._child.kill("it needs too much memory")
            elif time.monotonic() > deadline:
                self._child.kill(f"it did not end within {self._seconds:g} s")


RENDERER = Renderer()
"""The renderer of this process, which all models share."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RENDERER.forget)
atexit.register(RENDERER.stop)
