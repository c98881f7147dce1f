"""Run `sandbox.py` in a child process, and start another one where a template ended it.

Limits by process bound every filter, method and operator alike. Linux bounds addresses and
processor time by the child's own limits (`setrlimit`, `ITIMER_PROF`). Windows bounds both by a job
object. macOS has no limit of memory that it enforces, so there the child's memory is looked at
while it renders. The child ends when this process does: its stdin then ends, and on Windows the
job.
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
# Of memory. Rendering needs some: the request as JSON, its values, the prompt and its parts, four
# bytes a character where one of them is an emoji. Escaped as JSON a character has up to 12 bytes.
BASE_BYTES = 64 << 20
BYTES_PER_REQUEST_BYTE = 32
# By the clock, for a child that gets no processor time: a stopped one, a machine that swaps.
MAX_WAIT_SECONDS = 120.0
_START_SECONDS = 120.0
# How often a Mac looks at the child's memory.
_LOOK_SECONDS = 0.02


class RenderError(Exception):
    """A template was not rendered: what it did wrong, or which limit it reached."""


class TemplateRefusal(RenderError):
    """The template does not accept this conversation; its own words say why."""


class Renderer:
    """Renders templates in a child process, one at a time; the first rendering starts it."""

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
            RenderError: it is broken, tries what the sandbox forbids, or reached a limit.
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
        """Send a request to the child; None where the child had ended before it began."""
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
            # Ctrl-C among others: the answer that is still to come is not the next request's.
            self.stop()
            raise

    def stop(self) -> None:
        """End the child; the next rendering starts another one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def forget(self) -> None:
        """Leave the child to the process of which this one is a fork."""
        child = self._child
        self.__init__()  # type: ignore[misc]
        if child is not None:
            child.close()


class _Ended(Exception):
    """The child ended; `began` says whether it had begun to render."""

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
                # A terminal's Ctrl-C is for this process alone.
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
        """Send a request; returns the kind of answer and its text.

        Raises:
            _Ended: the process ended before it had answered.
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
            why: what an error says of it.
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
    """Ends a child that takes too long by the clock, or on a Mac too much memory.

    Args:
        child: what is watched during the block.
        seconds: by the clock.
        memory_bytes: beyond what it has at the beginning.
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
"""The process's own: all models share it."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RENDERER.forget)
atexit.register(RENDERER.stop)
