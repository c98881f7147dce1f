"""One direction between two neighbours, over a gloo group of two ranks.

What gloo does, measured with PyTorch 2.13, and what follows from it here:

- A send waits until the other side has posted a receive. The receiver therefore always has some
  posted, into buffers that hold any short frame; only what was sent travels. The rest of a longer
  frame follows in pieces, for which the receiver posts receives when it has read the header.
- An operation whose time is over breaks its whole group. Each direction therefore has a group of
  its own, and silence beyond the timeout is the end of it. Whoever has nothing to send sends a
  beat each second.
- A neighbour whose process ends closes the connection, which ends a waiting receive at once.
- Nothing else ends a waiting receive. The last frame of a session is therefore a BYE.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import numpy as np
import torch

from .frames import (
    Envelope,
    Frame,
    FrameClass,
    InvalidFrame,
    PackedFrame,
    read_frame,
    read_header,
)

# The first send of a frame. A row of hidden state has 32 KiB at hidden size 8,192: sixteen rows
# travel in one send.
SHORT_BYTES = 512 << 10
# Sends of a longer frame's rest. A link must carry one within the timeout: 0.5 MiB/s at 8 s.
PIECE_BYTES = 4 << 20
# Receives that are posted at any time. A frame is sent at once while the sender knows of one.
POSTED = 4
# Short buffers of a machine: those that are posted, and of frames that wait or are read.
KEPT = POSTED + 8
# Frames up to this size are accepted without a reservation: key samples, measured bandwidth.
UNRESERVED_BYTES = 64 << 20
BEAT_S = 1.0
TIMEOUT_S = 8.0

# How often a receiver's thread looks whether it is needed. Frames that come meanwhile are in posted
# buffers.
_LOOK_S = 0.05

# Threads that may wait in gloo or in a store, for `finish_threads`.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
# The longest that ending a process waits for them: no operation lasts longer than a timeout.
_EXIT_S = 12.0

# gloo's tags: the start of each frame, the rest of longer ones, and the answer to a ping, which is
# all that travels against the ring's direction.
_START = 0
_REST = 1
_PONG = 2

T = TypeVar("T")


def daemon(run: Callable[[], None], name: str) -> threading.Thread:
    """Make a thread that may wait for another machine. It does not keep the process alive."""
    thread = threading.Thread(target=run, name=f"machines: {name}", daemon=True)
    _threads.add(thread)
    return thread


@atexit.register
def finish_threads() -> None:
    """Wait until no thread is in C++ any more.

    Python ends daemon threads by force when they return to it at the end of the process. Inside
    of C++ code this aborts the process.
    """
    deadline = time.monotonic() + _EXIT_S
    for thread in list(_threads):
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))


class Work(Protocol):
    """An operation of gloo that has begun."""

    def wait(self, timeout: timedelta) -> bool: ...


class Group(Protocol):
    """What is used of gloo's process group; PyTorch's declarations leave it out."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> Work: ...


class Block:
    """A buffer of bytes, as gloo sees it and as numpy does."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8)
        self.array: np.ndarray = self.tensor.numpy()


class Blocks:
    """The buffers of a machine's two links: short ones, and reserved longer ones.

    A buffer that is asked for while none is free is allocated and not kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = [Block(SHORT_BYTES) for _ in range(KEPT)]
        self._reserved_bytes = 0
        self._reserved = 0
        self._free_reserved: list[Block] = []

    @property
    def limit(self) -> int:
        """The largest frame that is sent and accepted."""
        return max(UNRESERVED_BYTES, self._reserved_bytes)

    def reserve(self, count: int, nbytes: int) -> None:
        """Keep `count` buffers of `nbytes`, allocated now, in place of what was reserved."""
        if nbytes <= SHORT_BYTES:
            count = 0
        blocks = [Block(nbytes) for _ in range(count)]
        for block in blocks:
            # The system assigns memory at the first write.
            block.tensor.zero_()
        with self._lock:
            self._reserved_bytes, self._reserved = nbytes, count
            self._free_reserved = blocks

    def take(self, nbytes: int) -> Block:
        """Return a buffer that holds `nbytes`."""
        with self._lock:
            if nbytes <= SHORT_BYTES:
                if self._free:
                    return self._free.pop()
            elif nbytes <= self._reserved_bytes and self._free_reserved:
                return self._free_reserved.pop()
        return Block(max(nbytes, SHORT_BYTES))

    def give(self, block: Block) -> None:
        """Take a buffer back."""
        with self._lock:
            nbytes = len(block.array)
            if nbytes == self._reserved_bytes and len(self._free_reserved) < self._reserved:
                self._free_reserved.append(block)
            elif nbytes == SHORT_BYTES and len(self._free) < KEPT:
                self._free.append(block)


def transport_bytes(count: int, nbytes: int) -> int:
    """Return the main memory that the links of one machine take.

    Args:
        count, nbytes: what is reserved, as `reserve` gets it.
    """
    # One more is the sender's own.
    return (count * nbytes if nbytes > SHORT_BYTES else 0) + (KEPT + 1) * SHORT_BYTES


class Sender:
    """Sends frames to the next machine.

    A short frame is sent by the calling thread if nothing waits. Everything else is copied and
    sent by a thread of its own, which also sends the beats.

    Args:
        group: gloo's, in which this side is rank 0.
        blocks: the machine's buffers.
        place: this machine's, the origin of frames.
        timeout: seconds in which the other side must take what is sent.
        beat: seconds without a frame after which a beat is sent.
        on_error: called once, by any thread, with the reason when the link is lost.
    """

    def __init__(
        self, group: Group, blocks: Blocks, place: int, timeout: float, beat: float,
        on_error: Callable[[str], None],
    ) -> None:
        self._group = group
        self._blocks = blocks
        self._place = place
        self._timeout = timedelta(seconds=timeout)
        self._beat = beat
        self._on_error = on_error
        # Held while a frame is written to the connection, so that frames do not mix.
        self._wire = threading.Lock()
        self._waiting: deque[tuple[Block, int]] = deque()
        self._express: deque[tuple[Block, int]] = deque()
        self._changed = threading.Condition()
        self._direct = Block(SHORT_BYTES)
        self._sent_at = time.monotonic()
        self._closing = False
        self._broken = False
        self._thread = daemon(self._run, "send")

    def start(self) -> None:
        """Start the thread, and with it the beats."""
        self._thread.start()

    def send(self, frame: Frame, envelope: Envelope) -> None:
        """Send a frame, or queue it. Its arrays may be changed as soon as this returns.

        After the link was lost, frames are dropped: `on_error` has said so.

        Raises:
            ValueError: the frame is larger than what is reserved and allowed.
        """
        packed = PackedFrame(frame, envelope)
        if packed.nbytes > self._blocks.limit:
            raise ValueError(
                f"a frame of {packed.nbytes} bytes; {self._blocks.limit} are reserved or allowed"
            )
        if packed.nbytes <= SHORT_BYTES and self._wire.acquire(blocking=False):
            try:
                if not (self._waiting or self._express or self._closing or self._broken):
                    packed.write(self._direct.array)
                    self._transmit(self._direct.tensor, packed.nbytes)
                    return
            finally:
                self._wire.release()
        block = self._blocks.take(packed.nbytes)
        packed.write(block.array)
        self._queue(block, packed.nbytes, envelope.frame_class)

    def forward(self, block: Block, nbytes: int) -> None:
        """Queue a packed express frame; the buffer is given back when it is sent."""
        self._queue(block, nbytes, FrameClass.EXPRESS)

    def _queue(self, block: Block, nbytes: int, frame_class: FrameClass) -> None:
        with self._changed:
            if self._closing or self._broken:
                self._blocks.give(block)
                return
            queue = self._express if frame_class == FrameClass.EXPRESS else self._waiting
            queue.append((block, nbytes))
            self._changed.notify()

    def ping(self, nbytes: int) -> float:
        """Return the seconds until the next machine has answered a frame of that many bytes.

        After the link was lost it returns at once: `on_error` has said so.
        """
        packed = PackedFrame(
            Frame("", {}, [np.zeros(nbytes, np.uint8)]),
            Envelope(FrameClass.PING, 0, self._place),
        )
        block = self._blocks.take(packed.nbytes)
        packed.write(block.array)
        answer = torch.empty(1, dtype=torch.uint8)
        with self._wire:
            began = time.perf_counter()
            if not self._broken:
                pong = self._group.recv([answer], 1, _PONG)
                self._transmit(block.tensor, packed.nbytes)
            if not self._broken:
                try:
                    pong.wait(self._timeout)
                except RuntimeError as error:
                    self._broken = True
                    self._on_error(gloo_reason(error, self._timeout.total_seconds()))
            seconds = time.perf_counter() - began
        self._blocks.give(block)
        return seconds

    def finish(self, *, drop: bool) -> None:
        """Let the thread send a BYE and end. Does not wait for it.

        Args:
            drop: forget the ordered frames that wait.
        """
        packed = PackedFrame(Frame(""), Envelope(FrameClass.BYE, 0, self._place))
        block = self._blocks.take(packed.nbytes)
        packed.write(block.array)
        with self._changed:
            if self._closing:
                return
            if drop:
                self._waiting.clear()
            self._waiting.append((block, packed.nbytes))
            self._closing = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._broken:
            with self._changed:
                if not (self._waiting or self._express):
                    if self._closing:
                        break
                    self._changed.wait(max(0.0, self._sent_at + self._beat - time.monotonic()))
            with self._wire:
                self._send_next()
        with self._wire:
            self._broken = True
            # gloo closes the connection when nothing refers to the group.
            del self._group

    def _send_next(self) -> None:
        with self._changed:
            queue = self._express or self._waiting
            block, nbytes = queue.popleft() if queue else (None, 0)
        if block is not None:
            self._transmit(block.tensor, nbytes)
            self._blocks.give(block)
        elif time.monotonic() >= self._sent_at + self._beat:
            packed = PackedFrame(Frame(""), Envelope(FrameClass.BEAT, 0, self._place))
            packed.write(self._direct.array)
            self._transmit(self._direct.tensor, packed.nbytes)

    def _transmit(self, tensor: torch.Tensor, nbytes: int) -> None:
        """Send the first `nbytes` of a buffer. The caller holds the wire."""
        if self._broken:
            return
        try:
            self._group.send([tensor[: min(nbytes, SHORT_BYTES)]], 1, _START).wait(self._timeout)
            pieces = [
                self._group.send([tensor[start : min(start + PIECE_BYTES, nbytes)]], 1, _REST)
                for start in range(SHORT_BYTES, nbytes, PIECE_BYTES)
            ]
            for piece in pieces:
                piece.wait(self._timeout)
        except RuntimeError as error:
            self._broken = True
            self._on_error(gloo_reason(error, self._timeout.total_seconds()))
            return
        self._sent_at = time.monotonic()


class Receiver:
    """Receives the frames of the machine before.

    Whoever waits for a frame receives it, because handing frames from one thread to another takes
    longer than the frame itself. While nobody waits in `next`, a thread of its own receives: it
    looks every `_LOOK_S` whether the waiting thread has been away since the last look.

    Args:
        group: gloo's, in which this side is rank 1.
        blocks: the machine's buffers.
        timeout: seconds without anything after which the link is lost.
        on_frame: called with (envelope, buffer, bytes) for each frame that is ORDERED or EXPRESS,
            by the thread that received it. It owns the buffer from then on.
        on_end: called once, at the end: with None after a BYE, otherwise with the reason why the
            link is lost.
    """

    def __init__(
        self, group: Group, blocks: Blocks, timeout: float,
        on_frame: Callable[[Envelope, Block, int], None], on_end: Callable[[str | None], None],
    ) -> None:
        self._group = group
        self._blocks = blocks
        self._timeout = timedelta(seconds=timeout)
        self._on_frame = on_frame
        self._on_end = on_end
        self._posted: deque[tuple[Work, Block]] = deque()
        # Held by the thread that receives.
        self._turn = threading.Lock()
        # Counts how often a thread began and ceased to receive in `next`: odd while one does.
        self._visits = 0
        # True while a thread waits in `next` for the next frame that the receiver's thread gets.
        self._awaited = False
        self._ended = False
        self._thread = daemon(self._run, "receive")

    def start(self) -> None:
        """Start to receive."""
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait until the link is closed; return whether it is."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def next(self, inbox: SimpleQueue[T]) -> T:
        """Return the next item of a queue that `on_frame` and `on_end` fill. For one thread."""
        self._visits += 1
        try:
            while not self._ended and self._turn.acquire(blocking=False):
                try:
                    # With the turn, because the other thread may have filled the queue until now.
                    return inbox.get_nowait()
                except Empty:
                    self._step()
                finally:
                    self._turn.release()
            return self._wait_in_queue(inbox)
        finally:
            self._visits += 1

    def _wait_in_queue(self, inbox: SimpleQueue[T]) -> T:
        """Wait for what the receiver's thread puts into a queue: it has the turn."""
        self._visits += 1
        self._awaited = True
        try:
            return inbox.get()
        finally:
            self._awaited = False
            self._visits += 1

    def _run(self) -> None:
        seen = 1
        while not self._ended:
            visits = self._visits
            if self._awaited or visits % 2 == 0 and visits == seen:
                with self._turn:
                    self._step()
            else:
                seen = visits
                time.sleep(_LOOK_S)

    def _step(self) -> None:
        """Receive one frame, or end. The caller has the turn."""
        if self._ended:
            return
        reason: str | None = None
        try:
            # Not as soon as a frame has come, because whoever waits for it would wait longer.
            while len(self._posted) < POSTED:
                self._post()
            if self._receive():
                return
        except InvalidFrame as error:
            reason = f"it sent something else than a frame ({error})"
        except RuntimeError as error:
            reason = gloo_reason(error, self._timeout.total_seconds())
        self._ended = True
        # gloo closes the connection when nothing refers to the group.
        self._posted.clear()
        del self._group
        self._on_end(reason)

    def _post(self) -> None:
        block = self._blocks.take(SHORT_BYTES)
        self._posted.append((self._group.recv([block.tensor[:SHORT_BYTES]], 0, _START), block))

    def _receive(self) -> bool:
        """Receive one frame; return False after a BYE."""
        work, block = self._posted.popleft()
        work.wait(self._timeout)
        envelope, nbytes = read_header(block.array, self._blocks.limit)
        if nbytes > SHORT_BYTES:
            block = self._receive_rest(block, nbytes)
        if envelope.frame_class == FrameClass.BYE:
            return False
        if envelope.frame_class == FrameClass.BEAT:
            self._blocks.give(block)
            return True
        if envelope.frame_class == FrameClass.PING:
            self._blocks.give(block)
            self._group.send([torch.zeros(1, dtype=torch.uint8)], 0, _PONG).wait(self._timeout)
            return True
        # Before the frame is known: the thread that gets it receives the next one itself.
        self._awaited = False
        self._on_frame(envelope, block, nbytes)
        return True

    def _receive_rest(self, start: Block, nbytes: int) -> Block:
        block = self._blocks.take(nbytes)
        pieces = [
            self._group.recv([block.tensor[offset : min(offset + PIECE_BYTES, nbytes)]], 0, _REST)
            for offset in range(SHORT_BYTES, nbytes, PIECE_BYTES)
        ]
        block.array[:SHORT_BYTES] = start.array[:SHORT_BYTES]
        self._blocks.give(start)
        for piece in pieces:
            piece.wait(self._timeout)
        return block


def unpack(block: Block, nbytes: int, blocks: Blocks) -> Frame:
    """Read a received frame. `release` gives its buffer back.

    Raises:
        InvalidFrame: the bytes are no frame.
    """
    return read_frame(block.array[:nbytes], lambda: blocks.give(block))


def gloo_reason(error: RuntimeError, timeout: float) -> str:
    """Say in words what a failed operation of gloo means."""
    text = str(error)
    if "Timed out" in text or "timed out" in text:
        return f"nothing was heard for {timeout:g} s"
    if "closed" in text or "reset" in text or "Broken pipe" in text:
        return "its connection was closed, as by a process that ended"
    return " ".join(text.split())[:300]
