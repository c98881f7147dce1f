"""Compiled kernels on a card: loading and launching them, and capturing steps as graphs.

Contexts are PyTorch's (a device's primary context), and the caller gives the stream. A step is
captured on a stream of its own, so that no other work of the process enters the graph, and
replayed on the current stream. Functions: CUDA Driver API, "Module Management", "Execution
Control", "Graph Management".
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ...utils.errors import DeviceError
from ...utils.progress import Progress
from ..build.build import build_entry
from ..build.store import Entry
from .arch import check_capability
from .cards import card_index, card_name
from .compilers import cuda_spec
from .driver import (
    LIBRARY,
    NOT_FOUND,
    Context,
    Driver,
    driver_release,
    release_in,
)
from .launcher import Grid, Launch
from .taken import measured, taken_of

# CUdevice_attribute
_MAX_BLOCK_THREADS = 1
_MAX_GRID = (5, 6, 7)
_MULTIPROCESSOR_COUNT = 16
_SHARED_LIMIT = 97
# CUfunction_attribute
_DYNAMIC_SHARED_LIMIT = 8
# CUstream_flags: work on the default stream does not wait for this stream, nor the reverse.
_NON_BLOCKING = 1
# CUstreamCaptureMode: calls that other libraries make meanwhile, cudaFree for example, do not
# spoil the capture, whichever thread makes them.
_RELAXED = 2

# Dynamic shared memory that a kernel may have without asking for more.
_SHARED_DEFAULT_BYTES = 48 << 10


def open_launcher(
    device_index: int,
    stream: Callable[[], int],
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
    library: str = LIBRARY,
) -> DriverLauncher:
    """Compile the CUDA kernels for a card if that was not done yet, and load them.

    Args:
        device_index: of the card, as PyTorch counts.
        stream: returns the handle of the current stream, to launch on.
        progress: shows compiling.
        environ: see `compilers.find_cuda_compilers` and `build.build_entry`.
        library: of the driver.

    Raises:
        DeviceError: no driver or no such card.
        KernelBuildError: the card is too old, or the kernels cannot be compiled for it.
        InsufficientMemory: the card has no room for the kernels.
    """
    driver = Driver(library)
    capability = driver.capability(device_index)
    check_capability(capability, card_name(device_index))
    spec = cuda_spec(capability, environ=environ, driver=driver_release(library))
    entry = build_entry(spec, progress, environ)
    return DriverLauncher(entry, device_index, stream, driver)


class DriverLauncher:
    """Launches the kernels of a build on one card; a `launcher.Launcher`.

    Any thread may call it, because every call of the driver runs in the card's context. The
    kernels are unloaded by `close`, or when the launcher and all launches that it has prepared
    are dropped.

    Args:
        entry: the cubins, from `build.build_entry`.
        device_index: of the card, as PyTorch counts.
        stream: returns the handle of the current stream, to launch on.
        driver: the driver; the installed one where None.

    Raises:
        DeviceError: no driver, no such card, or the cubins are not for it.
        InsufficientMemory: the card has no room for the kernels.
    """

    def __init__(
        self,
        entry: Entry,
        device_index: int,
        stream: Callable[[], int],
        driver: Driver | None = None,
    ) -> None:
        self._driver = Driver() if driver is None else driver
        self._stream = stream
        self._card = card_name(device_index)
        device = self._driver.device(device_index)
        self.multiprocessors = self._driver.attribute(device, _MULTIPROCESSOR_COUNT)
        self.shared_limit_bytes = self._driver.attribute(device, _SHARED_LIMIT)
        self._max_threads = self._driver.attribute(device, _MAX_BLOCK_THREADS)
        self._max_grid = tuple(self._driver.attribute(device, which) for which in _MAX_GRID)
        # Retained besides PyTorch, because the modules belong to it.
        self._context = Context(self._driver, device_index)
        self._modules: list[ctypes.c_void_p] = []
        # Memory of modules and, if the driver loads lazily, of single kernels.
        self._taken_bytes: list[int] = []
        self._unload = weakref.finalize(
            self, _unload, self._context, self._card, self._modules, self._taken_bytes
        )
        self._unload.atexit = False
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}
        # The thread that captures a step, and the stream of its launches.
        self._capture: tuple[int, int] | None = None
        try:
            with self._context, measured(self._context, self._card) as taken:
                self._load(entry)
            self._taken_bytes.append(taken.nbytes)
        except BaseException:
            self.close()
            raise

    def prepare(
        self, name: str, grid: Grid, block: int, shared_bytes: int, *args: Any
    ) -> Launch:
        """See `launcher.Launcher.prepare`.

        Raises:
            DeviceError: no such kernel, or the launch exceeds the card's limits. From the
                launch: the driver refused it, or an earlier kernel failed.
        """
        self._check_shape(name, grid, block, shared_bytes)
        with self._context:
            function = self._kernel(name)
            self._allow_shared(name, function, shared_bytes)
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        shape = tuple(map(ctypes.c_uint, (*grid, block, 1, 1, shared_bytes)))
        launch_kernel = self._driver.functions.cuLaunchKernel

        def run() -> int:
            code: int = launch_kernel(
                function, *shape, ctypes.c_void_p(self._stream_now()), pointers, None
            )
            return code

        def launch() -> None:
            # The values that the pointers point to must live as long as this function.
            _ = args
            if self._context.is_current():
                code = run()
            else:
                with self._context:
                    code = run()
            if code != 0:
                raise self._driver.error(f"launch of {name} on {self._card}", code)

        return launch

    def capture(self, run: Callable[[], None]) -> Graph:
        """See `launcher.Launcher.capture`.

        Raises:
            DeviceError: the driver did not capture it.
            InsufficientMemory: the card has no room for the graph.
        """

        def run_on(stream: int) -> None:
            self._capture = threading.get_ident(), stream
            try:
                run()
            finally:
                self._capture = None

        return record_graph(self._context, self._card, run_on, self._stream)

    def close(self) -> None:
        """Unload the kernels. Nothing prepared may be launched afterwards."""
        self._unload()
        self._kernels.clear()

    def _stream_now(self) -> int:
        """Return the stream for a launch of this thread."""
        capture = self._capture
        if capture is not None and capture[0] == threading.get_ident():
            return capture[1]
        return self._stream()

    def _load(self, entry: Entry) -> None:
        for path in entry.files:
            module = ctypes.c_void_p()
            self._driver.call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
            self._modules.append(module)

    def _kernel(self, name: str) -> ctypes.c_void_p:
        if name not in self._kernels:
            with measured(self._context, self._card) as taken:
                self._kernels[name] = self._find(name)
            self._taken_bytes.append(taken.nbytes)
        return self._kernels[name]

    def _find(self, name: str) -> ctypes.c_void_p:
        """Find a kernel in the modules."""
        function = ctypes.c_void_p()
        for module in self._modules:
            code = self._driver.functions.cuModuleGetFunction(
                ctypes.byref(function), module, name.encode()
            )
            if code == 0:
                return function
            if code != NOT_FOUND:
                raise self._driver.error(f"kernel {name}", code)
        raise self._driver.error(f"kernel {name}", NOT_FOUND)

    def _allow_shared(self, name: str, function: ctypes.c_void_p, shared_bytes: int) -> None:
        """Raise a kernel's limit of dynamic shared memory if the launch needs more."""
        if shared_bytes <= max(_SHARED_DEFAULT_BYTES, self._shared_bytes.get(name, 0)):
            return
        self._driver.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED_LIMIT, shared_bytes)
        self._shared_bytes[name] = shared_bytes

    def _check_shape(self, name: str, grid: Grid, block: int, shared_bytes: int) -> None:
        """Refuse a shape for which the driver would only report `invalid argument`."""
        limits = (*self._max_grid, self._max_threads, self.shared_limit_bytes)
        asked = (*grid, block, shared_bytes)
        if all(0 < n <= limit for n, limit in zip(asked[:4], limits[:4], strict=True)):
            if 0 <= shared_bytes <= self.shared_limit_bytes:
                return
        raise DeviceError(
            f"launch of {name} on {self._card}",
            expected="at most {} x {} x {} blocks of {} threads with {} bytes of shared memory"
            .format(*limits),
            actual="{} x {} x {} blocks of {} threads with {} bytes".format(*asked),
            remedy="Load with a smaller chunk_size or max_batch_size",
        )


def _unload(
    context: Context, card: str, modules: list[ctypes.c_void_p], taken_bytes: list[int]
) -> None:
    """Free a launcher's modules."""
    unload = context.driver.functions.cuModuleUnload

    def count() -> None:
        taken_of(card).add(-sum(taken_bytes))

    release_in(context, *(partial(unload, module) for module in modules), count)


class Graph:
    """A captured step; calling it launches the step on the current stream.

    Args:
        context: of the card, retained for the graph.
        card: such as `cuda:0`.
        handle: the executable graph.
        stream: returns the handle of the current stream.
        nbytes: memory of the card that the graph takes.
        run: the captured function. It keeps the kernels loaded as long as the graph exists.
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
    """Capture the launches of a function.

    Meanwhile nothing of the card is released and no garbage is collected, because both may spoil
    a capture.

    Args:
        context: of the card.
        card: such as `cuda:0`.
        run_on: launches on the stream whose handle it is given.
        stream: returns the handle of the current stream.

    Raises:
        DeviceError: the driver did not capture the launches, or another call spoilt it.
        InsufficientMemory: the card has no room for the graph.
    """
    driver = context.driver
    # Retained once more, so that the context exists as long as the graph.
    own = Context(driver, card_index(card))
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
    """Return the graph of the launches of `run_on`. The stream leaves capture mode."""
    driver, graph = context.driver, ctypes.c_void_p()
    driver.call("cuStreamBeginCapture_v2", stream, _RELAXED)
    try:
        run_on(stream.value or 0)
    except BaseException:
        # The capture must end; its graph is dropped.
        if driver.functions.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0:
            driver.functions.cuGraphDestroy(graph)
        raise
    driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
    return graph


def _instantiate(
    context: Context, graph: ctypes.c_void_p, stream: ctypes.c_void_p
) -> ctypes.c_void_p:
    """Make a graph executable. Its memory is taken here, not at its first launch."""
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
        # `run` holds the kernels, which must not be unloaded before the graph is destroyed.
        _ = run
        context.driver.functions.cuGraphExecDestroy(handle)
        taken_of(card).add(-nbytes)

    release_in(context, destroy)
