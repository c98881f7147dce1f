"""Steps captured as CUDA graphs.

A step is captured on a stream of its own, so that nothing else of the process can get into the
graph, and replayed on the stream of the moment. Functions: CUDA Driver API, "Graph Management".
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .context import Context, release_in
from .taken import measured, taken_of

# CUstream_flags: work on the default stream does not wait for this stream, nor the reverse.
_NON_BLOCKING = 1
# CUstreamCaptureMode: calls that other libraries make meanwhile, cudaFree for example, do not
# spoil the capture, whichever thread makes them.
_RELAXED = 2


class Graph:
    """A captured step; calling it launches the step on the current stream.

    Args:
        context: of the card, retained for the graph.
        card: its name, such as `cuda:0`.
        handle: the executable graph.
        stream: returns the handle of the stream of the moment.
        nbytes: what the card's free memory went down by.
        run: what was captured. It keeps the kernels loaded as long as the graph exists.
    """

    def __init__(
        self, context: Context, card: str, handle: ctypes.c_void_p, stream: Callable[[], int],
        nbytes: int, run: Callable[[int], None],
    ) -> None:
        self.nbytes = nbytes
        self._context, self._card, self._handle = context, card, handle
        self._stream = stream
        self._destroy = weakref.finalize(self, _destroy, context, card, handle, nbytes, run)
        self._destroy.atexit = False

    def __call__(self) -> None:
        launch = self._context.driver.functions.cuGraphLaunch
        stream = ctypes.c_void_p(self._stream())
        if self._context.is_current():
            code = launch(self._handle, stream)
        else:
            with self._context:
                code = launch(self._handle, stream)
        if code != 0:
            raise self._context.driver.error(f"launch of a graph on {self._card}", code)


def record_graph(
    context: Context, card: str, run_on: Callable[[int], None], stream: Callable[[], int]
) -> Graph:
    """Capture what a function launches.

    Nothing is given back to the card meanwhile, and no garbage is collected, because both may
    spoil a capture.

    Args:
        context: of the card.
        card: its name, such as `cuda:0`.
        run_on: launches on the stream whose handle it is given.
        stream: returns the handle of the stream of the moment.

    Raises:
        DeviceError: the driver did not capture it, or something spoilt the capture.
        InsufficientMemory: the card has no room for the graph.
    """
    driver = context.driver
    # Retained once more, so that the context exists as long as the graph.
    own = Context(driver, int(card.partition(":")[2]))
    try:
        with own.releases.held_back(), _no_garbage_collection(), own, _own_stream(own) as side:
            graph = _capture(own, side, run_on)
            try:
                with measured(own, card) as taken:
                    handle = _instantiate(own, graph, side)
            finally:
                driver.functions.cuGraphDestroy(graph)
            taken_of(card).graphs += 1
            return Graph(own, card, handle, stream, taken.nbytes, run_on)
    except BaseException:
        own.release()
        raise


def _capture(
    context: Context, stream: ctypes.c_void_p, run_on: Callable[[int], None]
) -> ctypes.c_void_p:
    """Return the graph of what `run_on` launches. The stream is out of capture mode again."""
    driver, graph = context.driver, ctypes.c_void_p()
    driver.call("cuStreamBeginCapture_v2", stream, _RELAXED)
    try:
        run_on(stream.value or 0)
    except BaseException:
        # The capture has to end, and what it gives is not wanted.
        if driver.functions.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0:
            driver.functions.cuGraphDestroy(graph)
        raise
    driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
    return graph


def _instantiate(
    context: Context, graph: ctypes.c_void_p, stream: ctypes.c_void_p
) -> ctypes.c_void_p:
    """Make a graph executable. What it takes of the card is taken here, not at its first launch."""
    driver, handle = context.driver, ctypes.c_void_p()
    driver.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph, ctypes.c_uint64(0))
    try:
        driver.call("cuGraphUpload", handle, stream)
        driver.call("cuStreamSynchronize", stream)
    except BaseException:
        driver.functions.cuGraphExecDestroy(handle)
        raise
    return handle


@contextmanager
def _own_stream(context: Context) -> Iterator[ctypes.c_void_p]:
    stream = ctypes.c_void_p()
    context.driver.call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
    try:
        yield stream
    finally:
        context.driver.functions.cuStreamDestroy_v2(stream)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _destroy(
    context: Context, card: str, handle: ctypes.c_void_p, nbytes: int,
    run: Callable[[int], None],
) -> None:
    def destroy() -> None:
        # `run` holds the kernels, which must not be unloaded before the graph is gone.
        _ = run
        context.driver.functions.cuGraphExecDestroy(handle)
        taken_of(card).add(-nbytes)

    release_in(context, destroy)
