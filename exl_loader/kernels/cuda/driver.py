"""Load cubins and launch their kernels through the CUDA driver's C API.

The driver's own library is called directly: it is there wherever a card works, its ABI does
not change, and neither PyTorch's release nor any package has a say in it. Contexts are those
of PyTorch (a device's primary context), streams are given by the caller. Functions and
constants: CUDA Driver API reference manual.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from typing import Any

from ...errors import DeviceError, InsufficientMemory
from ..store import Entry
from .arch import Capability, Version

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUresult
_OUT_OF_MEMORY = 2
_NOT_FOUND = 500
# CUdevice_attribute
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
        except OSError as error:
            raise DeviceError(
                "NVIDIA driver", expected=library, actual="none",
                remedy="Install NVIDIA's driver, or run on the CPU: device='cpu'",
            ) from error
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            InsufficientMemory, DeviceError: it returned an error.
        """
        code = getattr(self.functions, function)(*arguments)
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
        functions = ctypes.CDLL(library)
    except OSError:
        return None
    number = ctypes.c_int()
    if functions.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


class DriverLauncher:
    """Launches the kernels of a build on one card; a `launcher.Launcher`.

    The kernels are unloaded when it and all that it has prepared are dropped, or by `close`.

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
        self._device = self._driver.device(device_index)
        self.multiprocessors = self._driver.attribute(self._device, _MULTIPROCESSOR_COUNT)
        self.shared_limit_bytes = self._driver.attribute(self._device, _SHARED_LIMIT)
        # Once more retained than PyTorch does: the modules live in it.
        self._context = ctypes.c_void_p()
        self._driver.call(
            "cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device
        )
        self._modules: list[ctypes.c_void_p] = []
        self._unload = weakref.finalize(
            self, _unload, self._driver, self._device, self._context, self._modules
        )
        self._unload.atexit = False
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}
        try:
            self._in_context(lambda: self._load(entry))
        except BaseException:
            self.close()
            raise

    def prepare(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int, *args: Any
    ) -> Callable[[], None]:
        """See `launcher.Launcher.prepare`.

        Raises:
            DeviceError: no such kernel; from the launch: the driver refused it, or a kernel
                before it failed.
        """
        function = self._kernel(name)
        if shared_bytes > max(_SHARED_DEFAULT_BYTES, self._shared_bytes.get(name, 0)):
            self._driver.call(
                "cuFuncSetAttribute", function, _DYNAMIC_SHARED_LIMIT, shared_bytes
            )
            self._shared_bytes[name] = shared_bytes
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        shape = tuple(map(ctypes.c_uint, (*grid, block, 1, 1, shared_bytes)))
        context, stream = self._context.value, self._stream
        launch_kernel = self._driver.functions.cuLaunchKernel
        get_current = self._driver.functions.cuCtxGetCurrent

        def run() -> int:
            return launch_kernel(
                function, *shape, ctypes.c_void_p(stream()), pointers, None
            )

        def launch() -> None:
            # The values behind the pointers have to live as long as this function.
            _ = args
            current = ctypes.c_void_p()
            get_current(ctypes.byref(current))
            code = run() if current.value == context else self._in_context(run)
            if code != 0:
                raise self._driver.error(f"launch of {name} on {self._card}", code)

        return launch

    def close(self) -> None:
        """Unload the kernels. Nothing prepared may be launched afterwards."""
        self._unload()
        self._kernels.clear()

    def _load(self, entry: Entry) -> None:
        for path in entry.files:
            module = ctypes.c_void_p()
            self._driver.call("cuModuleLoadData", ctypes.byref(module), path.read_bytes())
            self._modules.append(module)

    def _kernel(self, name: str) -> ctypes.c_void_p:
        if name not in self._kernels:
            function = ctypes.c_void_p()
            for module in self._modules:
                code = self._driver.functions.cuModuleGetFunction(
                    ctypes.byref(function), module, name.encode()
                )
                if code == 0:
                    break
                if code != _NOT_FOUND:
                    raise self._driver.error(f"kernel {name}", code)
            else:
                raise self._driver.error(f"kernel {name}", _NOT_FOUND)
            self._kernels[name] = function
        return self._kernels[name]

    def _in_context(self, function: Callable[[], Any]) -> Any:
        """Run a function with the card's context current, and put back what was.

        PyTorch keeps a current device a thread, which another card's work must not change;
        and a thread in which PyTorch did nothing yet has none.
        """
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            return function()
        finally:
            self._driver.functions.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _unload(
    driver: Driver, device: int, context: ctypes.c_void_p, modules: list[ctypes.c_void_p]
) -> None:
    """Give back what a launcher took. Errors are those of kernels, which have been told."""
    if sys.is_finalizing():
        return  # the process's end gives everything back
    functions = driver.functions
    functions.cuCtxPushCurrent_v2(context)
    # Kernels may still be under way.
    functions.cuCtxSynchronize()
    for module in modules:
        functions.cuModuleUnload(module)
    functions.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    functions.cuDevicePrimaryCtxRelease_v2(device)
