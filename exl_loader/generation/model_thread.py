"""The thread of one loaded model. It alone runs steps and changes scheduler, cache and model.

Callers' threads send messages and sleep. An interrupt (Ctrl-C) arrives in a caller's thread and
never in this one, so no interrupt can end a step or a clean-up halfway.

The thread starts with the first message. It ends with `close`, or when the last reference to
the model is dropped. While it has nothing to do, it blocks and holds no reference to the model.
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

from ..utils.errors import InsufficientMemory, InvalidCall, ModelForked, ModelUnloaded, drop_locals
from .exchange import Exchange, Waiter, sleep, wake_all
from .loop_waiter import LoopWaiter, wait_for_ever
from .scheduler import Scheduler

# At exit, the process waits at most this long for a running step.
EXIT_WAIT_S = 10.0

# The message that cancels all jobs that were sent before it.
STOP = object()

_model_threads: weakref.WeakSet[ModelThread] = weakref.WeakSet()


class ModelThread:
    """A thread that runs the steps of one scheduler. Every method may be called from any thread.

    Args:
        scheduler: runs the steps; only this thread calls it.
        release: called after all requests have ended and the model was dropped.
    """

    def __init__(self, scheduler: Scheduler, release: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._release = release
        self._process = os.getpid()
        self._inbox: SimpleQueue[object] = SimpleQueue()
        # The callback is implemented in C, so dropping the model wakes the thread without
        # running Python code.
        self._reference = weakref.ref(self, self._inbox.put)
        # The thread acquires this and never releases it. If two threads were started at once,
        # the one that does not get it ends.
        self._claim = _thread.allocate_lock()
        self._ident: int | None = None
        self._closers: deque[Waiter] = deque()
        self._closing = False
        self._exiting = False
        # Set before the thread empties its inbox for the last time, and when it has ended.
        self._ended = False
        self._gone = False
        self._failure: BaseException | None = None
        _model_threads.add(self)

    def check(self) -> None:
        """Refuse a call that cannot be answered.

        Raises:
            ModelForked: this process was forked from the one that loaded the model.
            ModelUnloaded: `close` was called, or the thread was ended by an error.
            InvalidCall: the call comes from the model's thread, which would wait for itself.
        """
        self._check_process()
        if self._closing or self._ended:
            raise self._unloaded_error("unloaded")
        if _thread.get_ident() == self._ident:
            raise InvalidCall(
                "the model", expected="a call from another thread",
                actual="a call from its own thread, in which progress callbacks run",
                remedy="Start the request after the callback has returned",
            )

    def own(self, request: Exchange[Any], owner: object) -> None:
        """End `request` when `owner` is destroyed; called before the request is sent."""
        request.set_owner(owner, self._inbox)

    def wait(self, request: Exchange[Any]) -> None:
        """Send the request if necessary, and return when it has output or has finished.

        Steps run only while a caller waits here.

        Raises:
            As `check`; or whatever interrupts the calling thread, such as KeyboardInterrupt,
            which cancels the request.
        """
        self._check_process()
        try:
            while not request.is_ready:
                if self._exiting:
                    _sleep_until_exit()
                self.check()
                # The request may be sent twice; the thread accepts it once.
                waiter = request.add_waiter()
                self._send(request)
                if not self._ended:
                    sleep(waiter)
                elif not request.is_ready:
                    raise self._unloaded_error("unloaded")
        except BaseException:
            self.cancel(request)
            raise

    async def wait_async(self, request: Exchange[Any]) -> None:
        """Do what `wait` does, in an event loop; a cancelled task cancels the request."""
        self._check_process()
        try:
            while not request.is_ready:
                if self._exiting:
                    await wait_for_ever()
                self.check()
                waiter = LoopWaiter()
                request.wake_also(waiter)
                self._send(request)
                if not self._ended:
                    await waiter.wait()
                elif not request.is_ready:
                    raise self._unloaded_error("unloaded")
        except BaseException:
            self.cancel(request)
            raise

    def cancel(self, request: Exchange[Any]) -> None:
        """Cancel a request, which ends before the next step. Does not wait."""
        request.cancelled = True
        self._inbox.put(None)

    def finish(self, request: Exchange[Any]) -> None:
        """Cancel a request that was sent, and wait until it has released its pages."""
        request.cancelled = True
        if self._is_forked or _thread.get_ident() == self._ident:
            return
        while not (request.finished or self._ended):
            waiter = request.add_waiter()
            self._send(request)
            if not self._ended:
                sleep(waiter)

    async def finish_async(self, request: Exchange[Any]) -> None:
        """Do what `finish` does, in an event loop; a cancelled task ends only the wait."""
        request.cancelled = True
        if self._is_forked:
            return
        while not (request.finished or self._ended):
            waiter = LoopWaiter()
            request.wake_also(waiter)
            self._send(request)
            if not self._ended:
                await waiter.wait()

    def cancel_all(self) -> None:
        """Cancel every job that was sent. Does not wait.

        Raises:
            ModelForked: as `check`.
        """
        self._check_process()
        if self._claim.locked():
            self._inbox.put(STOP)

    def close(self) -> None:
        """End all requests, drop the model and wait for that. A second call does nothing.

        An interrupt ends only the wait; the thread still closes. A forked process has no such
        thread; there only `release` is called.
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
        """Wait for the running step and start no other, because the interpreter shuts down."""
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
        """True in a process that was forked from the one with the thread."""
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
        """Put a message into the inbox; start the thread if there is none.

        Raises:
            InsufficientMemory: the system refuses another thread.
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
                remedy="Close programs that use much memory, and try again",
            ) from error

    def _unloaded_error(self, actual: str) -> ModelUnloaded:
        if self._failure is not None:
            actual = f"ended by {type(self._failure).__name__}: {self._failure}"
        return ModelUnloaded("the model", actual=actual, remedy="Load it again")

    # The methods from here on run in the thread itself.

    def _take_claim(self) -> bool:
        """Become the thread; return False if there is another one."""
        if not self._claim.acquire(blocking=False):
            return False
        self._ident = _thread.get_ident()
        return True

    def _work(self) -> bool:
        """Run steps until there is nothing to do.

        Returns:
            False if the thread has to end.
        """
        try:
            while not (self._closing or self._exiting):
                self._receive_all()
                if not self._scheduler.step():
                    return True
                if self._is_forked:
                    # A callback has forked, and this is the child process. Its only thread is
                    # this one, which cannot return to the program.
                    os._exit(0)
        except BaseException as error:
            # The scheduler handles the errors of steps, so after this one its state is unknown.
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
        """Handle a message; one that is neither a request nor `STOP` only wakes the thread."""
        if message is STOP:
            self._scheduler.cancel_all()
        elif isinstance(message, Exchange):
            self._scheduler.accept(message)

    def _end(self) -> None:
        """End the requests with an error, drop the model and wake the callers of `close`."""
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
    """Run a model's thread until the model is closed or the last reference to it is dropped."""
    model_thread = reference()
    if model_thread is None or not model_thread._take_claim():
        return
    while model_thread is not None and model_thread._work():
        # The thread holds no reference to the model or a request while it sleeps.
        model_thread = None
        message = inbox.get()
        model_thread = reference()
        if model_thread is not None:
            model_thread._receive(message)
        del message


def _sleep_until_exit() -> None:
    """Block a daemon thread, because the process is about to end."""
    if threading.current_thread() is not threading.main_thread():
        sleep(SimpleQueue())


def _end_all_at_exit() -> None:
    for model_thread in list(_model_threads):
        model_thread.end_at_exit()


# Python runs this after it has joined all threads that are not daemons. A daemon thread that
# still runs while the interpreter shuts down would be killed in the middle of C++ code.
atexit.register(_end_all_at_exit)
