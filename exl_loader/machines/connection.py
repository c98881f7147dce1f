"""The first machine's side of the connection: questions to each machine, frames around the ring."""

from __future__ import annotations

import atexit
import itertools
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from ..utils.errors import MachineLost, MachineRefused, drop_locals
from ..utils.progress import NullProgress, Progress, task
from .address import Address
from .frames import Frame
from .link import BEAT_S, TIMEOUT_S
from .meeting import meet
from .ring import Machine, Ring, error_from

# How long the first machine waits for machines that are missing.
PATIENCE_S = 60.0
# How long closing waits until BYE has come around.
_CLOSE_S = 2.0


class _Event:
    """What comes back for a question: progress, its reply, or the end of the session (None)."""

    def __init__(self, place: int, fields: dict[str, Any] | None, is_reply: bool) -> None:
        self.place = place
        self.fields = fields
        self.is_reply = is_reply


class Machines:
    """The other machines, as the first one sees them.

    `send` and `receive` belong to one thread. Questions may be asked by any thread.

    Attributes:
        others: the other machines in the order of the ring.
        in_use: whether a model is loaded over them; the user's word.
    """

    in_use = False

    def __init__(self, address: Address, patience: float, timeout: float, beat: float,
                 progress: Progress) -> None:
        with task(progress, f"waiting for machines at {address}", None, ""):
            members, outgoing, incoming, self._store = meet(
                address, patience, timeout, beat, lambda line: _say(progress, line)
            )
        self.address = address
        self.first, self.others = members[0], members[1:]
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._asked: dict[int, SimpleQueue[_Event]] = {}
        self._ring = Ring(
            0, members, outgoing, incoming, timeout, beat, self._express, self._end
        )

    def ask(self, place: int, question: str, fields: dict[str, Any] | None = None, *,
            progress: Progress | None = None) -> dict[str, Any]:
        """Ask one machine and wait for its reply.

        Args:
            place: the machine's place in the ring: its index in `others` + 1.
            question, fields: for its handler.
            progress: gets the machine's tasks, each with the machine's name behind it.

        Returns:
            What its handler returned.

        Raises:
            ExlLoaderError: its handler raised it; the machine is named. An error that is none of
                this package's arrives as `MachineFailed`.
            MachineLost: the session ended.
        """
        return self.ask_each({place: fields or {}}, question, progress=progress)[place]

    def ask_all(self, question: str, fields: dict[str, Any] | None = None, *,
                progress: Progress | None = None) -> list[dict[str, Any]]:
        """Ask all other machines at the same time; return their replies in order.

        Raises:
            ExlLoaderError: as `ask`. All machines have replied by then.
            MachineLost: the session ended.
        """
        same = {machine.place: fields or {} for machine in self.others}
        return list(self.ask_each(same, question, progress=progress).values())

    def ask_each(self, fields: dict[int, dict[str, Any]], question: str, *,
                 progress: Progress | None = None) -> dict[int, dict[str, Any]]:
        """Ask some machines at the same time, each with its own fields.

        Args:
            fields: by place.

        Returns:
            The replies by place, in the order of `fields`.

        Raises:
            ExlLoaderError: as `ask`: the first error by place. All machines have replied by then.
            MachineLost: the session ended.
        """
        shown = _Tasks(progress or NullProgress())
        events: SimpleQueue[_Event] = SimpleQueue()
        numbers = {place: next(self._numbers) for place in fields}
        with self._lock:
            self._asked |= {number: events for number in numbers.values()}
        try:
            # After the questions are noted, so that an end that comes now reaches them.
            self._ring.check()
            for place, number in numbers.items():
                self._ring.send(
                    Frame("question", {"id": number, "question": question,
                                       "fields": fields[place]}), place,
                )
            replies = self._replies(events, len(numbers), shown)
        finally:
            shown.finish()
            with self._lock:
                for number in numbers.values():
                    del self._asked[number]
        for place in fields:
            if "error" in replies[place]:
                raise error_from(replies[place]["error"], self.others[place - 1])
        return {place: replies[place]["result"] for place in fields}

    def _replies(
        self, events: SimpleQueue[_Event], count: int, shown: _Tasks
    ) -> dict[int, dict[str, Any]]:
        replies: dict[int, dict[str, Any]] = {}
        while len(replies) < count:
            event = events.get()
            if event.fields is None:
                raise self._ring.end_error()
            if event.is_reply:
                replies[event.place] = event.fields
            else:
                shown.update(self.others[event.place - 1], event.fields)
        return replies

    def send(self, frame: Frame) -> None:
        """Send an ordered frame to the machine at place 1. Its arrays may be changed afterwards.

        Raises:
            MachineLost: the session ended.
        """
        self._ring.check()
        self._ring.send(frame)

    def receive(self) -> Frame:
        """Return the next ordered frame that came around. Release it when its arrays are read.

        Raises:
            MachineLost: the session ended.
        """
        frame = None if self._ring.ended else self._ring.next()
        if frame is None:
            raise self._ring.end_error()
        return frame

    def check(self) -> None:
        """Raise if a machine or a link was lost, or the connection was closed.

        Raises:
            MachineLost: it is so.
        """
        self._ring.check()

    @property
    def has_ended(self) -> bool:
        """Whether a machine or a link was lost, or the connection was closed."""
        return self._ring.ended

    def reserve(self, count: int, nbytes: int) -> None:
        """Keep buffers for frames longer than `link.SHORT_BYTES`.

        Args:
            count: frames that wait to be sent, are received or are read at a time.
            nbytes: the largest, see `frames.room`.
        """
        self._ring.blocks.reserve(count, nbytes)

    def ping(self, nbytes: int, count: int) -> list[float]:
        """Send frames that the next machine answers; return the seconds until each answer.

        Raises:
            MachineLost: the session ended.
        """
        return self._ring.ping(nbytes, count)

    def close(self) -> None:
        """End the session. The other machines free what they hold and wait for the next."""
        self._ring.end(None)
        self._ring.join(_CLOSE_S)
        # The address is free again when nothing refers to the store.
        self.__dict__.pop("_store", None)

    def _express(self, frame: Frame) -> None:
        """Give a reply or progress to the question it belongs to."""
        origin = frame.envelope.origin if frame.envelope else 0
        number = frame.fields.get("id")
        with self._lock:
            events = self._asked.get(number) if isinstance(number, int) else None
        # Without a question its asker was interrupted.
        if events is not None and 1 <= origin <= len(self.others):
            events.put(_Event(origin, frame.fields, frame.kind == "reply"))
        frame.release()

    def _end(self, error: MachineLost | None) -> None:
        with self._lock:
            asked = list(self._asked.values())
        for events in asked:
            events.put(_Event(0, None, False))


def _say(progress: Progress, line: str) -> None:
    """Show a line while machines are missing: it is the name of a task that ends at once."""
    progress.start(line, None, "")
    progress.finish(line)


class _Tasks:
    """Shows the tasks of other machines under names that tell the machines apart."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._running: set[str] = set()

    def update(self, machine: Machine, fields: dict[str, Any]) -> None:
        name = f"{fields.get('task')}, {machine.name}"
        step = fields.get("step")
        total, n = fields.get("total"), fields.get("n")
        if step == "start":
            self._running.add(name)
            self._progress.start(
                name, total if isinstance(total, int) else None, str(fields.get("unit", ""))
            )
        elif step == "advance" and isinstance(n, int):
            self._progress.advance(name, n)
        elif step == "finish":
            self._running.discard(name)
            self._progress.finish(name)

    def finish(self) -> None:
        """End the tasks that an error left running."""
        for name in sorted(self._running):
            self._progress.finish(name)


_connections: dict[Address, Machines] = {}
_connecting = threading.Lock()


def connect(
    address: Address, progress: Progress | None = None, *, patience: float = PATIENCE_S,
    timeout: float = TIMEOUT_S, beat: float = BEAT_S,
) -> Machines:
    """Return this process's connection to the machines of an address.

    It is made once and kept until it fails, is closed or the process ends.

    Args:
        address: the first machine's own.
        progress: says for whom it waits.
        patience: seconds to wait for machines that are missing.
        timeout: seconds without a sign after which a machine counts as lost.
        beat: seconds between signs of a machine that has nothing else to send.

    Raises:
        MachineRefused: a machine is missing or does not fit; or the address is not usable.
        MachineLost: a machine that had answered did not connect.
    """
    with _connecting:
        kept = _usable(address)
        if kept is not None:
            return kept
        try:
            machines = Machines(address, patience, timeout, beat, progress or NullProgress())
        except BaseException as error:
            # The store listens as long as a frame of the traceback refers to it.
            drop_locals(error)
            raise
        _connections[address] = machines
        return machines


def _usable(address: Address) -> Machines | None:
    """Return the kept connection of an address; close one that failed or has other machines.

    Raises:
        MachineRefused: a model runs over other machines at this host and port.
    """
    for known, kept in list(_connections.items()):
        if (known.host, known.port) != (address.host, address.port):
            continue
        if not kept.has_ended:
            if known == address:
                return kept
            if kept.in_use:
                raise MachineRefused(
                    str(address), expected="no other machines at this host and port",
                    actual="a model that is loaded over them", remedy="Unload it first",
                )
        del _connections[known]
        kept.close()
    return None


def close_all(addresses: Sequence[Address] | None = None) -> None:
    """Close this process's connections, or those to some addresses."""
    with _connecting:
        for address in list(_connections) if addresses is None else addresses:
            kept = _connections.pop(address, None)
            if kept is not None:
                kept.close()


atexit.register(close_all)
