"""A session of one machine in the ring: what it sends on, what it keeps, and how it ends.

Both sides use it: `connection.Machines` (the first machine) and `station.Station` (the others).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from ..utils import errors
from ..utils.errors import ExlLoaderError, MachineLost, known_line
from .frames import Envelope, Frame, FrameClass, InvalidFrame
from .link import Block, Blocks, Group, Receiver, Sender, unpack

FAILURE = "failure"


@dataclass(frozen=True)
class Machine:
    """A machine of the ring.

    Attributes:
        place: its place in the ring; 0 is the first machine.
        rank: the number it was started with.
        host: its host name.
    """

    place: int
    rank: int
    host: str

    @property
    def name(self) -> str:
        """The name for messages: `machine 1 (node-b)`; 1 is its rank, as it was started."""
        return f"machine {self.rank} ({self.host})" if self.place else (
            f"the first machine ({self.host})"
        )


class Ring:
    """One machine's two links, for one session.

    Args:
        place: this machine's.
        members: all machines in the order of the ring.
        outgoing, incoming: gloo's groups to the next machine and from the one before.
        timeout, beat: seconds, see `link`.
        on_express: called on the receiver's thread with each express frame for this machine.
        on_end: called once, by any thread, when the session ends: with the error, or None after
            the machine before said BYE.

    Attributes:
        inbox: ordered frames for this machine, and None behind the last.
    """

    def __init__(
        self, place: int, members: tuple[Machine, ...], outgoing: Group,
        incoming: Group, timeout: float, beat: float,
        on_express: Callable[[Frame], None], on_end: Callable[[MachineLost | None], None],
        inbox: SimpleQueue[Frame | None] | None = None,
    ) -> None:
        self.place = place
        self.members = members
        self.inbox: SimpleQueue[Frame | None] = SimpleQueue() if inbox is None else inbox
        self.blocks = Blocks()
        self._on_express = on_express
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ended = False
        self._error: MachineLost | None = None
        self._next = members[(place + 1) % len(members)]
        self._previous = members[place - 1]
        self._sender = Sender(outgoing, self.blocks, place, timeout, beat, self._send_failed)
        self._receiver = Receiver(
            incoming, self.blocks, timeout, self._receive, self._receiving_ended
        )
        self._sender.start()
        self._receiver.start()

    def send(self, frame: Frame, destination: int | None = None) -> None:
        """Send a frame: ordered to the next machine, or express to the machine at a place."""
        frame_class = FrameClass.ORDERED if destination is None else FrameClass.EXPRESS
        self._sender.send(frame, Envelope(frame_class, destination or 0, self.place))

    def ping(self, nbytes: int, count: int) -> list[float]:
        """Send frames that the next machine answers; return the seconds until each answer.

        Raises:
            MachineLost: the session ended.
        """
        seconds = [self._sender.ping(nbytes) for _ in range(count)]
        self.check()
        return seconds

    @property
    def ended(self) -> bool:
        """True once the session is over."""
        return self._ended

    def check(self) -> None:
        """Raise why the session ended, if it did.

        Raises:
            MachineLost: it ended.
        """
        if self._ended:
            raise self.end_error()

    def end_error(self) -> MachineLost:
        """Return a new error that says why the session ended."""
        error = self._error
        if error is None:
            return MachineLost("the connection between machines was closed")
        again = MachineLost(
            error.thing, expected=error.expected, actual=error.actual, remedy=error.remedy,
            details=error.details,
        )
        again.__cause__ = error.__cause__
        return again

    def next(self) -> Frame | None:
        """Wait for the next frame in the inbox; None behind the last. One thread may call."""
        return self._receiver.next(self.inbox)

    def end(self, error: MachineLost | None) -> None:
        """End the session: the first call decides why. Frames that wait are dropped."""
        with self._lock:
            if self._ended:
                return
            self._ended, self._error = True, error
        if error is not None and self.place:
            fields = {"error": error_fields(error), "from": self.place}
            self.send(Frame(FAILURE, fields), 0)
        self._sender.finish(drop=error is not None)
        self.inbox.put(None)
        self._on_end(error)

    def join(self, timeout: float) -> bool:
        """Wait until both threads have ended, which closes the links; return whether they have."""
        self._sender.join(timeout)
        return self._receiver.join(timeout)

    def _send_failed(self, reason: str) -> None:
        self.end(self._lost(self._next, reason))

    def _lost(self, machine: Machine, reason: str) -> MachineLost:
        return MachineLost(
            machine.name, actual=f"the connection to it was lost: {reason}",
            remedy="Start it again, or load with the machines that are left" if machine.place
            else None,
        )

    def _receiving_ended(self, reason: str | None) -> None:
        self.end(None if reason is None else self._lost(self._previous, reason))

    def _receive(self, envelope: Envelope, block: Block, nbytes: int) -> None:
        if envelope.frame_class == FrameClass.EXPRESS and envelope.destination != self.place:
            if envelope.origin == self.place or envelope.destination >= len(self.members):
                # It went around once and is for nobody.
                raise InvalidFrame(f"a frame for place {envelope.destination}")
            self._sender.forward(block, nbytes)
            return
        frame = unpack(block, nbytes, self.blocks)
        if envelope.frame_class == FrameClass.ORDERED:
            self.inbox.put(frame)
        elif frame.kind == FAILURE:
            self._fail(frame)
        else:
            self._on_express(frame)

    def _fail(self, frame: Frame) -> None:
        """Take another machine's word for why the session is over."""
        error = error_from(frame.fields.get("error"), None)
        self.end(error if isinstance(error, MachineLost) else _ended_by(error))


def _ended_by(error: ExlLoaderError) -> MachineLost:
    lost = MachineLost(str(error), details=error.details)
    lost.__cause__ = error
    return lost


def error_fields(error: BaseException) -> dict[str, Any]:
    """Write an error so that another machine can raise it."""
    if isinstance(error, ExlLoaderError):
        parts = {
            key: None if getattr(error, key) is None else str(getattr(error, key))
            for key in ("thing", "expected", "actual", "remedy", "details")
        }
        return {"type": type(error).__name__, **parts}
    line = known_line(error)
    if isinstance(error, MemoryError):
        return {"type": "InsufficientMemory", "thing": line}
    details = "".join(errors.traceback.format_exception(error)) if line is None else None
    return {
        "type": "MachineFailed", "thing": line or f"{type(error).__name__}: {error}",
        "details": details,
    }


def error_from(fields: Any, machine: Machine | None) -> ExlLoaderError:
    """Make the error that another machine wrote.

    Args:
        fields: what `error_fields` returned there.
        machine: which machine it was, named in the error; None where the error names it.
    """
    if not isinstance(fields, dict):
        fields = {}
    kind = getattr(errors, str(fields.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, ExlLoaderError)):
        kind = errors.MachineFailed
    parts = {
        key: str(fields[key]) for key in ("expected", "actual", "remedy", "details")
        if fields.get(key) is not None
    }
    thing = str(fields.get("thing", "an error without a text"))
    return kind(f"{machine.name}: {thing}" if machine is not None else thing, **parts)
