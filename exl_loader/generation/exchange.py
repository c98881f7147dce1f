"""The state of one request that its caller and the model's thread share.

The caller's thread may be interrupted (Ctrl-C) between any two instructions; the model's thread
is never interrupted. Therefore the caller changes the state only by single operations that are
implemented in C, which an interrupt cannot split: it sets a flag, appends to a deque, or puts a
message into a queue. The model's thread does everything else. If an interrupted caller loses
its request, the request's owner is destroyed, and a weak reference reports that without running
Python code.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections import deque
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from ..utils.system.processes import INTERRUPT_POLL_S

T = TypeVar("T")


class Waiter(Protocol):
    """What wakes one waiting caller."""

    def put(self, item: None) -> None:
        """Wake it; called in the model's thread. Must not raise."""


class Exchange(Generic[T]):
    """One request, as its caller and the model's thread see it.

    Attributes:
        output: results that the caller has not taken yet.
        error: the error that ended the request; the caller raises it.
        cancelled: set by any thread; the model's thread ends the request before its next step.
        accepted: set by the model's thread when it accepts the request.
    """

    def __init__(self) -> None:
        self.output: deque[T] = deque()
        self.error: BaseException | None = None
        self.cancelled = False
        self.accepted = False
        self._waiters: deque[Waiter] = deque()
        self._owner: weakref.ref[object] | None = None

    @property
    @abstractmethod
    def finished(self) -> bool:
        """True once no further output will come."""

    @property
    def is_ready(self) -> bool:
        """True if a caller need not wait."""
        return bool(self.output) or self.finished

    @property
    def is_awaited(self) -> bool:
        """True if a caller waits for a result that has not been computed yet."""
        return bool(self._waiters) and not self.is_ready

    @property
    def is_abandoned(self) -> bool:
        """True if the request was cancelled or its owner was destroyed."""
        return self.cancelled or (self._owner is not None and self._owner() is None)

    def set_owner(self, owner: object, inbox: SimpleQueue[object]) -> None:
        """Set the object that is needed to take the results.

        Args:
            owner: when it is destroyed, the model's thread is woken.
            inbox: the queue on which the model's thread waits. The weak reference calls its
                `put`, which is implemented in C, so no interrupt can suppress the message.
        """
        self._owner = weakref.ref(owner, inbox.put)

    def add_waiter(self) -> SimpleQueue[None]:
        """Register a waiting caller; return the queue to pass to `sleep`."""
        waiter: SimpleQueue[None] = SimpleQueue()
        self.wake_also(waiter)
        return waiter

    def wake_also(self, waiter: Waiter) -> None:
        """Register what wakes a waiting caller."""
        self._waiters.append(waiter)

    def wake_waiters(self) -> None:
        """Wake every waiting caller; each one checks `is_ready` itself."""
        wake_all(self._waiters)


def wake_all(waiters: deque[Waiter]) -> None:
    """Wake all waiting callers and remove them."""
    while waiters:
        waiters.popleft().put(None)


def sleep(waiter: SimpleQueue[None]) -> None:
    """Block until `waiter` is woken; Ctrl-C ends the wait.

    Raises:
        KeyboardInterrupt: or any other interrupt of the calling thread.
    """
    while True:
        try:
            waiter.get(timeout=INTERRUPT_POLL_S)
            return
        except Empty:
            continue
