"""A card's context for calls of the driver, and what is given back to it later.

A driver keeps a current context for each thread. A new thread has none, and a thread in which
PyTorch works on another card has that card's. So each call that needs a context runs in
`with context:`, whichever thread makes it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver import Driver


class Context:
    """A card's primary context, the one that PyTorch uses as well.

    It exists until `release`: the driver destroys a primary context, with all that was made in
    it, when nobody retains it any more.

    Args:
        driver: the CUDA driver.
        device_index: of the card, as PyTorch counts.

    Raises:
        DeviceError: no such card.
        InsufficientMemory: the card has no room for a context.
    """

    def __init__(self, driver: Driver, device_index: int) -> None:
        self.driver = driver
        self.device = driver.device(device_index)
        self._handle = ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._handle), self.device)
        self.releases = _releases_of(driver, self.device)

    def __enter__(self) -> Context:
        self.driver.call("cuCtxPushCurrent_v2", self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        # What was current before, PyTorch's own context of this thread, is current again.
        self.driver.functions.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def is_current(self) -> bool:
        """Whether this thread's calls run in the context as it is."""
        current = ctypes.c_void_p()
        self.driver.functions.cuCtxGetCurrent(ctypes.byref(current))
        return current.value == self._handle.value

    def release(self) -> None:
        """Stop using the context. An error is that of a kernel, which has been raised before."""
        self.driver.functions.cuDevicePrimaryCtxRelease_v2(self.device)


class Releases:
    """What finalizers give back to a card, one after the other and never during a capture.

    Garbage collection runs finalizers in any thread at any time. To free memory or to unload a
    module one has to wait for the card, and a wait spoils the capture of a step that another
    thread has begun (CUDA programming guide, "Prohibited and Unhandled Operations"). So a
    release waits for the end of the capture, and the finalizer does not.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        # A finalizer may interrupt a thread that holds the lock.
        self._lock = threading.RLock()
        self._capturing = False

    def add(self, release: Callable[[], None]) -> None:
        """Run `release` now, or after the capture that is under way; in the order of calls."""
        self._waiting.append(release)
        self._run()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let releases wait. One thread at a time."""
        with self._lock:
            self._capturing = True
            try:
                yield
            finally:
                self._capturing = False
        self._run()

    def _run(self) -> None:
        # Whoever holds the lock looks at the queue again after giving it up, so nothing stays.
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                if self._capturing or not self._waiting:
                    return
                self._waiting.popleft()()
            finally:
                self._lock.release()


_releases: dict[tuple[int, int], Releases] = {}


def _releases_of(driver: Driver, device: int) -> Releases:
    """Return the one object of a card; a driver's library is opened once a process."""
    return _releases.setdefault((driver.library_handle, device), Releases())


def release_in(context: Context, *steps: Callable[[], object]) -> None:
    """Run the steps of a release in its context, and give the context up.

    Args:
        context: retained for what is released.
        steps: calls of the driver; each returns an error code, which nobody can use.
    """

    def release() -> None:
        functions = context.driver.functions
        if functions.cuCtxPushCurrent_v2(context._handle) != 0:
            return  # the context went with the driver
        try:
            # Kernels that use what is released may still be under way.
            functions.cuCtxSynchronize()
            for step in steps:
                step()
        finally:
            functions.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
            context.release()

    # The end of the process gives everything back.
    if not sys.is_finalizing():
        context.releases.add(release)
