"""Steps captured as CUDA graphs, and the memory that they take of a card.

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

# CUstream_flags: work on the default stream does not wait for this stream, nor the reverse.
_NON_BLOCKING = 1
# CUstreamCaptureMode: calls that other libraries make meanwhile, cudaFree for example, do not
# spoil the capture, whichever thread makes them.
_RELAXED = 2

# Card as PyTorch counts -> (bytes that live graphs take, the most they ever took).
_taken: dict[str, tuple[int, int]] = {}


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
        _count(card, nbytes)
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


def graph_bytes(card: str) -> tuple[int, int]:
    """Return what the live graphs of this process take of a card, and the most they ever took."""
    return _taken.get(card, (0, 0))


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
    # Retained for the graph; this also makes sure that the graph outlives no context.
    own = Context(driver, int(card.partition(":")[2]))
    try:
        with own.releases.held_back(), _no_garbage_collection(), own, _own_stream(own) as side:
            graph = _capture(own, side, run_on)
            try:
                before = _free_bytes(own)
                handle = ctypes.c_void_p()
                driver.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph,
                            ctypes.c_uint64(0))
                try:
                    # What the graph takes of the card is taken now, not at its first launch.
                    driver.call("cuGraphUpload", handle, side)
                    driver.call("cuStreamSynchronize", side)
                except BaseException:
                    driver.functions.cuGraphExecDestroy(handle)
                    raise
                taken = max(0, before - _free_bytes(own))
            finally:
                driver.functions.cuGraphDestroy(graph)
        return Graph(own, card, handle, stream, taken, run_on)
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


def _free_bytes(context: Context) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    context.driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return free.value


def _count(card: str, nbytes: int) -> None:
    held, most = graph_bytes(card)
    _taken[card] = held + nbytes, max(most, held + nbytes)


def _destroy(
    context: Context, card: str, handle: ctypes.c_void_p, nbytes: int,
    run: Callable[[int], None],
) -> None:
    def destroy() -> None:
        # `run` holds the kernels, which must not be unloaded before the graph is gone.
        _ = run
        context.driver.functions.cuGraphExecDestroy(handle)
        _count(card, -nbytes)

    release_in(context, destroy)
