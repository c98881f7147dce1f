"""Load cubins and launch their kernels through the CUDA driver's C API.

The driver's own library is called directly: it is there wherever a card works, its ABI does
not change, and neither PyTorch's release nor any package has a say in it. Contexts are those
of PyTorch (a device's primary context, `context.py`), streams are given by the caller. Functions
and constants: CUDA Driver API reference manual.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from ...utils.errors import DeviceError, InsufficientMemory
from ..build.store import Entry
from .arch import Capability, Version
from .context import Context, release_in
from .graph import Graph, record_graph
from .taken import measured, taken_of

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUresult
_OUT_OF_MEMORY = 2
_NOT_FOUND = 500
# CUdevice_attribute
_MAX_BLOCK_THREADS = 1
_MAX_GRID = (5, 6, 7)
_MULTIPROCESSOR_COUNT = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_SHARED_LIMIT = 97
# CUfunction_attribute
_DYNAMIC_SHARED_LIMIT = 8

# Dynamic shared memory that a kernel may have without asking for more.
_SHARED_DEFAULT_BYTES = 48 << 10


class Driver:
    """The functions of the CUDA driver that are needed.

    Args:
        library: file name or path.

    Raises:
        DeviceError: there is no driver, or it finds no card.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self.functions = ctypes.CDLL(library)
            self.library_handle = self.functions._handle
        except OSError as error:
            raise DeviceError(
                "NVIDIA driver", expected=library, actual="none",
                remedy="Install NVIDIA's driver, or run on the CPU: device='cpu'",
            ) from error
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            InsufficientMemory, DeviceError: it returned an error, or the driver is too old to
                have it.
        """
        try:
            called = getattr(self.functions, function)
        except AttributeError as error:
            raise DeviceError(
                "NVIDIA driver", expected=f"one with {function}", actual="an older one",
                remedy="Install a newer driver, or run on the CPU: device='cpu'",
            ) from error
        code = called(*arguments)
        if code != 0:
            raise self.error(function, code)

    def error(self, what: str, code: int) -> DeviceError | InsufficientMemory:
        """Make an exception of an error code, with the driver's own words."""
        text = ctypes.c_char_p()
        self.functions.cuGetErrorString(code, ctypes.byref(text))
        words = f"{(text.value or b'unknown error').decode()} ({code})"
        if code == _OUT_OF_MEMORY:
            return InsufficientMemory(
                f"graphics card, {what}", actual=words,
                remedy="Close what else uses the card, or load with a smaller ctx_size",
            )
        return DeviceError(
            f"graphics card, {what}", actual=words,
            remedy="After an error inside a kernel the card is lost to this process: start "
            "it again. `exl_loader doctor` shows driver and kernels",
        )

    def attribute(self, device: int, which: int) -> int:
        """Ask for one of a device's attributes."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def capability(self, device_index: int) -> Capability:
        """Compute capability of a card."""
        device = self.device(device_index)
        return (
            self.attribute(device, _CAPABILITY_MAJOR), self.attribute(device, _CAPABILITY_MINOR)
        )

    def device(self, device_index: int) -> int:
        """Handle of a card, by its number among those that this process may see."""
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), device_index)
        return device.value


def driver_release(library: str = LIBRARY) -> Version | None:
    """Return the CUDA release that the installed driver serves; None without a driver."""
    try:
        read_version = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    if read_version(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


class DriverLauncher:
    """Launches the kernels of a build on one card; a `launcher.Launcher`.

    Any thread may call it: every call of the driver runs in the card's context. The kernels
    are unloaded when it and all that it has prepared are dropped, or by `close`.

    Args:
        entry: the cubins, from `build.build_entry`.
        device_index: of the card, as PyTorch counts.
        stream: returns the handle of the stream to launch on, of the moment.
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
        self._card = f"cuda:{device_index}"
        device = self._driver.device(device_index)
        self.multiprocessors = self._driver.attribute(device, _MULTIPROCESSOR_COUNT)
        self.shared_limit_bytes = self._driver.attribute(device, _SHARED_LIMIT)
        self._max_threads = self._driver.attribute(device, _MAX_BLOCK_THREADS)
        self._max_grid = tuple(self._driver.attribute(device, which) for which in _MAX_GRID)
        # Once more retained than PyTorch does: the modules live in it.
        self._context = Context(self._driver, device_index)
        self._modules: list[ctypes.c_void_p] = []
        # What modules and, where the driver loads late, single kernels took of the card.
        self._taken_bytes: list[int] = []
        self._unload = weakref.finalize(
            self, _unload, self._context, self._card, self._modules, self._taken_bytes
        )
        self._unload.atexit = False
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}
        # The thread that captures a step, and the stream that its launches go to.
        self._capture: tuple[int, int] | None = None
        try:
            with self._context, measured(self._context, self._card) as taken:
                self._load(entry)
            self._taken_bytes.append(taken.nbytes)
        except BaseException:
            self.close()
            raise

    def prepare(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int, *args: Any
    ) -> Callable[[], None]:
        """See `launcher.Launcher.prepare`.

        Raises:
            DeviceError: no such kernel, or a launch beyond the card's limits; from the launch:
                the driver refused it, or a kernel before it failed.
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
            # The values behind the pointers have to live as long as this function.
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
        """Return the stream of a launch of this thread."""
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
        """Look a kernel up in the modules."""
        function = ctypes.c_void_p()
        for module in self._modules:
            code = self._driver.functions.cuModuleGetFunction(
                ctypes.byref(function), module, name.encode()
            )
            if code == 0:
                return function
            if code != _NOT_FOUND:
                raise self._driver.error(f"kernel {name}", code)
        raise self._driver.error(f"kernel {name}", _NOT_FOUND)

    def _allow_shared(self, name: str, function: ctypes.c_void_p, shared_bytes: int) -> None:
        """Ask for more dynamic shared memory than a kernel has without asking."""
        if shared_bytes <= max(_SHARED_DEFAULT_BYTES, self._shared_bytes.get(name, 0)):
            return
        self._driver.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED_LIMIT, shared_bytes)
        self._shared_bytes[name] = shared_bytes

    def _check_shape(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int
    ) -> None:
        """Refuse what the driver would refuse at the launch with `invalid argument` alone."""
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
    """Give back what a launcher took."""
    unload = context.driver.functions.cuModuleUnload

    def count() -> None:
        taken_of(card).add(-sum(taken_bytes))

    release_in(context, *(partial(unload, module) for module in modules), count)
