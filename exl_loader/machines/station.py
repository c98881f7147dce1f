"""The side of every machine but the first: it serves one session after another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Protocol

from ..utils.errors import ExlLoaderError, MachineLost
from ..utils.progress import Progress
from . import probe
from .address import Seat
from .frames import Frame
from .meeting import Guest, Invitation, Unreachable
from .ring import Machine, Ring, error_fields

# Progress is reported at most this often for each task.
_REPORT_S = 0.1
# How long a session that is over waits for its threads. The links have a timeout of their own.
_CLOSE_S = 2.0


class Handler(Protocol):
    """What a machine does. One thread makes all calls, in the order of the frames."""

    def answer(
        self, question: str, fields: dict[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Answer a question of the first machine.

        What it raises goes to the first machine, and the session continues. `progress` raises
        `MachineLost` once the session is over, which ends a long load.
        """

    def execute(self, frame: Frame) -> Iterable[Frame]:
        """Handle an ordered frame; return or yield the frames for the next machine.

        The arrays of `frame` are valid until all frames are sent. What it raises ends the session.
        """

    def lost(self) -> None:
        """The session is over, whatever the reason: free what belongs to it."""


class Station:
    """A machine that waits for the first one and then serves it.

    Args:
        seat: where the first machine is, and this machine's rank.
        say: shows a line to the user.
    """

    def __init__(self, seat: Seat, say: Callable[[str], None]) -> None:
        self._guest = Guest(seat, say)
        self._say = say
        self._closed = False
        self._ring: Ring | None = None

    @property
    def members(self) -> tuple[Machine, ...]:
        """The machines of the current session in the order of the ring."""
        return self._current().members

    @property
    def place(self) -> int:
        """This machine's place in the current session."""
        return self._current().place

    def reserve(self, count: int, nbytes: int) -> None:
        """Keep buffers for this session; see `connection.Machines.reserve`."""
        self._current().blocks.reserve(count, nbytes)

    def check(self) -> None:
        """Raise if the current session is over.

        Raises:
            MachineLost: it is.
        """
        self._current().check()

    def close(self) -> None:
        """Let `serve` return. Any thread may call."""
        self._closed = True
        if self._ring is not None:
            self._ring.end(MachineLost(
                self._ring.members[self._ring.place].name, actual="it was stopped"
            ))

    def serve(self, handler: Handler) -> None:
        """Serve sessions until `close` is called or the process is interrupted."""
        try:
            while not self._closed:
                invitation = self._guest.attend(lambda: self._closed)
                if invitation is not None:
                    self._serve_session(invitation, handler)
        finally:
            self.close()
            if self._ring is not None:
                self._ring.join(_CLOSE_S)

    def _current(self) -> Ring:
        if self._ring is None:
            raise MachineLost("the first machine", actual="no session has begun")
        return self._ring

    def _serve_session(self, invitation: Invitation, handler: Handler) -> None:
        try:
            outgoing, incoming = invitation.connect()
        except Unreachable as error:
            self._say(f"a neighbour did not connect: {error}")
            return
        # Questions and ordered frames, in the order in which they came.
        work: SimpleQueue[Frame | None] = SimpleQueue()
        ring = Ring(
            invitation.place, invitation.members, outgoing, incoming, invitation.timeout,
            invitation.beat, work.put, lambda error: work.put(None), inbox=work,
        )
        del outgoing, incoming
        self._ring = ring
        self._say(f"connected as place {ring.place} of {len(ring.members)} machines")
        try:
            while not self._closed and not ring.ended:
                frame = ring.next()
                if frame is None:
                    break
                self._handle(ring, handler, frame)
        except BaseException:
            # An interrupt: the others learn it before this machine frees its memory.
            self.close()
            raise
        finally:
            try:
                handler.lost()
            finally:
                if self._closed:
                    self.close()
                ring.join(_CLOSE_S)
        self._say(f"the session is over: {ring.end_error()}")

    def _handle(self, ring: Ring, handler: Handler, frame: Frame) -> None:
        if frame.kind == "question" and frame.is_express:
            self._answer(ring, handler, frame)
            return
        try:
            with frame:
                for following in handler.execute(frame):
                    ring.send(following)
        except Exception as error:
            fields = error_fields(error)
            lost = MachineLost(
                f"{ring.members[ring.place].name}: {fields['thing']}",
                **{key: fields.get(key) for key in ("expected", "actual", "remedy", "details")},
            )
            lost.__cause__ = error
            ring.end(lost)

    def _answer(self, ring: Ring, handler: Handler, frame: Frame) -> None:
        fields = frame.fields
        number, question = fields.get("id"), str(fields.get("question"))
        frame.release()
        progress = _RemoteProgress(ring, number)
        try:
            asked = fields.get("fields")
            if not isinstance(asked, dict):
                asked = {}
            if question.startswith(probe.PREFIX):
                result = probe.answer(ring, question, asked)
            else:
                result = handler.answer(question, asked, progress)
            reply: dict[str, Any] = {"id": number, "result": result}
        except Exception as error:
            if not isinstance(error, ExlLoaderError):
                # The traceback goes to the first machine, too.
                self._say(f"{question}: {type(error).__name__}: {error}")
            reply = {"id": number, "error": error_fields(error)}
        progress.flush()
        ring.send(Frame("reply", reply), 0)


class _RemoteProgress:
    """Reports progress to the question of the first machine."""

    def __init__(self, ring: Ring, number: Any) -> None:
        self._ring = ring
        self._number = number
        self._counted: dict[str, int] = {}
        self._reported: dict[str, float] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._report(task, step="start", total=total, unit=unit)

    def advance(self, task: str, n: int = 1) -> None:
        self._ring.check()
        self._counted[task] = self._counted.get(task, 0) + n
        if time.monotonic() >= self._reported.get(task, 0.0) + _REPORT_S:
            self._count(task)

    def finish(self, task: str) -> None:
        self._count(task)
        # A task ends after an error too, and that error must not be replaced.
        with contextlib.suppress(MachineLost):
            self._report(task, step="finish")

    def flush(self) -> None:
        """Report what was counted and not yet said."""
        for task in list(self._counted):
            self._count(task)

    def _count(self, task: str) -> None:
        n = self._counted.pop(task, 0)
        if n:
            with contextlib.suppress(MachineLost):
                self._report(task, step="advance", n=n)

    def _report(self, task: str, **fields: Any) -> None:
        self._ring.check()
        self._reported[task] = time.monotonic()
        self._ring.send(Frame("progress", {"id": self._number, "task": task, **fields}), 0)
