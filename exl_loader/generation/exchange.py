"""What a caller and the model's thread share of one request.

The caller's thread may be interrupted (Ctrl-C) between any two instructions, the model's
thread never is. So the caller changes the state here by single operations of C alone, which
an interrupt cannot split: it sets a flag, appends to a deque, puts a message into a queue.
Everything else is done by the model's thread. A caller that was interrupted leaves at worst a
request whose owner is gone, and a weak reference reports that without running Python code.
"""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections import deque
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

# Windows does not interrupt a thread that waits for a lock, so Ctrl-C is noticed this often.
POLL_S = 0.1 if os.name == "nt" else None


class Exchange(Generic[T]):
    """One request, as its caller and the model's thread see it.

    Attributes:
        output: results that the caller has not taken yet.
        error: why the request failed, for the caller to raise.
        cancelled: set by any thread; the model's thread ends the request before its next step.
        accepted: set by the model's thread when it takes the request on.
    """

    def __init__(self) -> None:
        self.output: deque[T] = deque()
        self.error: BaseException | None = None
        self.cancelled = False
        self.accepted = False
        self._waiters: deque[SimpleQueue[None]] = deque()
        self._owner: weakref.ref[object] | None = None

    @property
    @abstractmethod
    def finished(self) -> bool:
        """True once nothing more will come."""

    @property
    def is_ready(self) -> bool:
        """True where a caller need not wait."""
        return bool(self.output) or self.finished

    @property
    def is_awaited(self) -> bool:
        """True where a caller waits for a result that is still to be computed."""
        return bool(self._waiters) and not self.is_ready

    @property
    def is_given_up(self) -> bool:
        """True where the request was cancelled or its owner no longer exists."""
        return self.cancelled or (self._owner is not None and self._owner() is None)

    def set_owner(self, owner: object, inbox: SimpleQueue[object]) -> None:
        """Name the object without which nobody can take the results.

        Args:
            owner: when it is destroyed, the model's thread is woken.
            inbox: where the model's thread waits. The weak reference calls `put` itself, in
                C, so no interrupt can keep the message from being sent.
        """
        self._owner = weakref.ref(owner, inbox.put)

    def add_waiter(self) -> SimpleQueue[None]:
        """Register a caller that waits; return the queue on which it is woken, for `sleep`."""
        waiter: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(waiter)
        return waiter

    def wake_waiters(self) -> None:
        """Wake every caller that waits; each looks itself whether there is something for it."""
        wake_all(self._waiters)


def wake_all(waiters: deque[SimpleQueue[None]]) -> None:
    """Wake those that wait, and forget them."""
    while waiters:
        waiters.popleft().put(None)


def sleep(waiter: SimpleQueue[None]) -> None:
    """Block until `waiter` is woken; Ctrl-C ends the wait.

    Raises:
        KeyboardInterrupt: or whatever else interrupts this very thread.
    """
    while True:
        try:
            waiter.get(timeout=POLL_S)
            return
        except Empty:
            continue
