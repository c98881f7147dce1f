"""The thread of one loaded model. It alone runs steps and changes scheduler, cache and model.

Callers' threads send messages and sleep. An interrupt (Ctrl-C) arrives in a caller's thread,
never here, so no interrupt can end a step halfway or split a clean-up.

The thread starts with the first message and ends with `close`, or when the last reference to
the model is dropped. While it has nothing to do it blocks, and then it holds no reference to
the model.
"""

from __future__ import annotations

import _thread
import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from ..utils.errors import InsufficientMemory, InvalidCall, ModelForked, ModelUnloaded
from ..utils.tracebacks import drop_locals
from .exchange import Exchange, sleep, wake_all
from .scheduler import Scheduler

# The process does not wait longer than this for a step that runs when it exits.
EXIT_WAIT_S = 10.0

# The message that cancels all requests that were sent before it.
STOP = object()

_model_threads: weakref.WeakSet[ModelThread] = weakref.WeakSet()


class ModelThread:
    """A thread that runs the steps of one scheduler. Every method may be called from any thread.

    Args:
        scheduler: what the thread runs; nobody else calls it.
        release: called once the requests have ended and the model was dropped.
    """

    def __init__(self, scheduler: Scheduler, release: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._release = release
        self._process = os.getpid()
        self._inbox: SimpleQueue[object] = SimpleQueue()
        # The callback is a function of C: when the model is dropped, no Python code need run
        # in order to wake the thread.
        self._reference = weakref.ref(self, self._inbox.put)
        # Taken by the thread, for ever: of two threads that were started at once one ends.
        self._claim = _thread.allocate_lock()
        self._ident: int | None = None
        self._closers: deque[SimpleQueue[None]] = deque()
        self._closing = False
        self._exiting = False
        # Set before the thread empties its inbox for the last time, and when it is through.
        self._ended = False
        self._gone = False
        self._failure: BaseException | None = None
        _model_threads.add(self)

    def check(self) -> None:
        """Refuse a call that could not be answered.

        Raises:
            ModelForked: this process was forked from the one that loaded the model.
            ModelUnloaded: `close` was called, or the thread was ended by an error.
            InvalidCall: the call comes from the thread itself, which would wait for itself.
        """
        self._check_process()
        if self._closing or self._ended:
            raise self._unloaded_error("unloaded")
        if _thread.get_ident() == self._ident:
            raise InvalidCall(
                "the model", expected="a call from another thread",
                actual="a call from its own thread, as a progress callback runs in",
                remedy="Start the request after the callback has returned",
            )

    def own(self, request: Exchange[Any], owner: object) -> None:
        """End `request` when `owner` is destroyed. To be called before the request is sent."""
        request.set_owner(owner, self._inbox)

    def wait(self, request: Exchange[Any]) -> None:
        """Return when the request has output or has finished. Sends it where that is missing.

        Steps run only while somebody is in here.

        Raises:
            As `check`; or whatever interrupts this very thread, e.g. KeyboardInterrupt, which
            cancels the request.
        """
        self._check_process()
        try:
            while not request.is_ready:
                if self._exiting:
                    _sleep_until_exit()
                self.check()
                # A message may come twice: the thread accepts a request once.
                waiter = request.add_waiter()
                self._send(request)
                if not self._ended:
                    sleep(waiter)
                elif not request.is_ready:
                    raise self._unloaded_error("unloaded")
        except BaseException:
            self.cancel(request)
            raise

    def cancel(self, request: Exchange[Any]) -> None:
        """End a request before the next step. Does not wait."""
        request.cancelled = True
        self._inbox.put(None)

    def finish(self, request: Exchange[Any]) -> None:
        """Cancel a request that was sent, and wait until it has given its pages back."""
        request.cancelled = True
        if self._is_forked or _thread.get_ident() == self._ident:
            return
        while not (request.finished or self._ended):
            waiter = request.add_waiter()
            self._send(request)
            if not self._ended:
                sleep(waiter)

    def cancel_all(self) -> None:
        """Cancel every request that was sent. Does not wait.

        Raises:
            ModelForked: as `check`.
        """
        self._check_process()
        if self._claim.locked():
            self._inbox.put(STOP)

    def close(self) -> None:
        """End all requests, drop the model and wait until that is done. Twice does no harm.

        An interrupt ends the wait alone; the thread goes on to close. In a forked process,
        which has no such thread, only `release` is called.
        """
        if self._is_forked:
            self._closing = self._gone = True
            self._release()
            return
        self._closing = True
        if _thread.get_ident() == self._ident:
            return
        while not self._gone:
            waiter: SimpleQueue[None] = SimpleQueue()
            self._closers.append(waiter)
            try:
                self._send(None)
            except InsufficientMemory:
                if self._take_claim():
                    self._end()
            if not self._gone:
                sleep(waiter)

    def end_at_exit(self) -> None:
        """Let the running step end and no other begin, because the interpreter shuts down."""
        if self._is_forked or not self._claim.locked():
            return
        waiter: SimpleQueue[None] = SimpleQueue()
        self._closers.append(waiter)
        self._exiting = True
        self._inbox.put(None)
        if not self._gone:
            try:
                waiter.get(timeout=EXIT_WAIT_S)
            except Empty:
                pass

    @property
    def _is_forked(self) -> bool:
        """True in a process forked from the one with the thread, where it does not exist."""
        return os.getpid() != self._process

    def _check_process(self) -> None:
        if self._is_forked:
            raise ModelForked(
                "the model", expected="the process that loaded it",
                actual="a process that was forked from it",
                remedy="Load the model in this process, or start processes by "
                "multiprocessing's spawn method",
            )

    def _send(self, message: object) -> None:
        """Put a message into the inbox; start the thread where there is none.

        Raises:
            InsufficientMemory: the system gives no further thread.
        """
        self._inbox.put(message)
        if self._claim.locked():
            return
        try:
            _thread.start_new_thread(_run, (self._inbox, self._reference))
        except RuntimeError as error:
            raise InsufficientMemory(
                "a thread for the model", expected="memory for one more thread",
                actual=f"the system refused it ({error})",
                remedy="Close what took the memory, and ask again",
            ) from error

    def _unloaded_error(self, actual: str) -> ModelUnloaded:
        if self._failure is not None:
            actual = f"ended by {type(self._failure).__name__}: {self._failure}"
        return ModelUnloaded("the model", actual=actual, remedy="Load it again")

    # From here on: the thread itself.

    def _take_claim(self) -> bool:
        """Become the thread; False where another one is."""
        if not self._claim.acquire(blocking=False):
            return False
        self._ident = _thread.get_ident()
        return True

    def _work(self) -> bool:
        """Run steps while there is something to do.

        Returns:
            False where the thread is to end.
        """
        try:
            while not (self._closing or self._exiting):
                self._receive_all()
                if not self._scheduler.step():
                    return True
                if self._is_forked:
                    # A callback has forked, and this is the child. Its only thread is this
                    # one, from which nothing leads back to the program.
                    os._exit(0)
        except BaseException as error:
            # The scheduler ends what fails by itself, so its state cannot be relied on here.
            drop_locals(error)
            self._failure = error
        self._end()
        return False

    def _receive_all(self) -> None:
        try:
            while True:
                self._receive(self._inbox.get_nowait())
        except Empty:
            pass

    def _receive(self, message: object) -> None:
        """Take a message; one that is neither a request nor `STOP` is there to wake alone."""
        if message is STOP:
            self._scheduler.cancel_all()
        elif isinstance(message, Exchange):
            self._scheduler.accept(message)

    def _end(self) -> None:
        """Fail the requests, drop the model and tell those who wait for that."""
        self._ended = True
        try:
            if not self._exiting:
                self._receive_all()
                self._scheduler.fail_all(
                    lambda: self._unloaded_error("unloaded while it generated"))
                self._scheduler.close()
                self._release()
        finally:
            self._gone = True
            wake_all(self._closers)


def _run(inbox: SimpleQueue[object], reference: weakref.ref[ModelThread]) -> None:
    """Run a model's thread until the model is closed or nobody refers to it any more."""
    model_thread = reference()
    if model_thread is None or not model_thread._take_claim():
        return
    while model_thread is not None and model_thread._work():
        # Neither the model nor a request may be kept while the thread sleeps.
        model_thread = None
        message = inbox.get()
        model_thread = reference()
        if model_thread is not None:
            model_thread._receive(message)
        del message


def _sleep_until_exit() -> None:
    """Keep a daemon thread from failing in the moment before the process ends."""
    if threading.current_thread() is not threading.main_thread():
        sleep(SimpleQueue())


def _end_all_at_exit() -> None:
    for model_thread in list(_model_threads):
        model_thread.end_at_exit()


# Python runs this after it has joined the threads that are no daemons. A daemon thread that
# runs on while the interpreter shuts down is ended in the middle of C++ code.
atexit.register(_end_all_at_exit)
