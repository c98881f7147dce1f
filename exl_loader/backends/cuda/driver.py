"""The CUDA driver's C API: calls, a card's context, memory, and releases that wait for captures.

The driver's own library is called directly. It is there wherever a card works, its ABI does not
change, and it depends neither on PyTorch's release nor on any package. Functions and constants:
CUDA Driver API reference manual.

A driver keeps a current context for each thread. A new thread has none, and a thread in which
PyTorch works on another card has that card's. So each call that needs a context runs in
`with context:`, whichever thread makes it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...utils.errors import DeviceError, InsufficientMemory
from ...utils.system.libraries import library_name
from .arch import Capability, Version

LIBRARY = library_name(windows="nvcuda.dll", posix="libcuda.so.1")

# CUresult
OUT_OF_MEMORY = 2
NOT_FOUND = 500
# Flags of cuMemHostAlloc: pinned for every context, and readable by kernels.
_PORTABLE, _MAPPED = 1, 2
# CUdevice_attribute
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76


class Driver:
    """The functions of the CUDA driver.

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
            InsufficientMemory, DeviceError: the function returned an error, or the driver is
                too old to have it.
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
        """Return an exception for an error code, with the driver's own message."""
        text = ctypes.c_char_p()
        self.functions.cuGetErrorString(code, ctypes.byref(text))
        message = f"{(text.value or b'unknown error').decode()} ({code})"
        if code == OUT_OF_MEMORY:
            return InsufficientMemory(
                f"graphics card, {what}", actual=message,
                remedy="Close other programs that use the card, or load with a smaller ctx_size",
            )
        return DeviceError(
            f"graphics card, {what}", actual=message,
            remedy="After an error in a kernel this process cannot use the card any more: "
            "start it again. `exl_loader doctor` shows the driver and the kernels",
        )

    def attribute(self, device: int, which: int) -> int:
        """Return one of a device's attributes."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def capability(self, device_index: int) -> Capability:
        """Return a card's compute capability."""
        device = self.device(device_index)
        return (
            self.attribute(device, _CAPABILITY_MAJOR), self.attribute(device, _CAPABILITY_MINOR)
        )

    def device(self, device_index: int) -> int:
        """Return a card's handle, by its number among those that this process may see."""
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), device_index)
        return device.value


def driver_release(library: str = LIBRARY) -> Version | None:
    """Return the CUDA release of the installed driver; None without a driver."""
    try:
        read_version = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    if read_version(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


class Context:
    """A card's primary context, which PyTorch uses as well.

    It exists until `release` at least. The driver destroys a primary context, and everything
    that was made in it, when the last user releases it.

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
        """Tell whether the context is this thread's current one."""
        current = ctypes.c_void_p()
        self.driver.functions.cuCtxGetCurrent(ctypes.byref(current))
        return current.value == self._handle.value

    def release(self) -> None:
        """Stop using the context. An error would be that of a kernel, raised before already."""
        self.driver.functions.cuDevicePrimaryCtxRelease_v2(self.device)


class Releases:
    """Releases of a card's resources by finalizers: one at a time, never during a capture.

    Garbage collection runs finalizers in any thread at any time. Freeing memory or unloading a
    module has to wait for the card, and a wait spoils the capture of a step that another thread
    has begun (CUDA programming guide, "Prohibited and Unhandled Operations"). So a release is
    postponed to the end of the capture, and the finalizer returns at once.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        # A finalizer may interrupt a thread that holds the lock.
        self._lock = threading.RLock()
        self._capturing = False

    def add(self, release: Callable[[], None]) -> None:
        """Run `release` now, or after the current capture; in the order of calls."""
        self._waiting.append(release)
        self._run()

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Postpone releases. One thread at a time."""
        with self._lock:
            self._capturing = True
            try:
                yield
            finally:
                self._capturing = False
        self._run()

    def _run(self) -> None:
        # A thread that holds the lock looks at the queue again after releasing it, so that
        # nothing is left over.
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                if self._capturing or not self._waiting:
                    return
                self._waiting.popleft()()
            finally:
                self._lock.release()


_releases: dict[tuple[int, int], Releases] = {}


def _releases_of(driver: Driver, device: int) -> Releases:
    """Return a card's only `Releases`; a process opens a driver's library once."""
    return _releases.setdefault((driver.library_handle, device), Releases())


def release_in(context: Context, *steps: Callable[[], object]) -> None:
    """Run the steps of a release in its context, then release the context.

    Args:
        context: retained for the released resource.
        steps: calls of the driver. Their error codes are ignored, because nothing can be done.
    """

    def release() -> None:
        functions = context.driver.functions
        if functions.cuCtxPushCurrent_v2(context._handle) != 0:
            return  # the driver has shut down
        try:
            # Kernels that use the resource may still run.
            functions.cuCtxSynchronize()
            for step in steps:
                step()
        finally:
            functions.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
            context.release()

    # The end of the process releases everything.
    if not sys.is_finalizing():
        context.releases.add(release)


# Card -> address -> bytes.
_held: dict[int, dict[int, int]] = {}


class CardMemory:
    """Device memory that PyTorch can wrap (`torch.as_tensor`) without a copy.

    It is exactly as large as asked. It is freed when the last reference is dropped, including
    those of tensors.

    Args:
        index: the card, as PyTorch counts.
        nbytes: size.
        driver: the CUDA driver; the installed one where None.

    Raises:
        MemoryError: the driver refused.
        DeviceError: there is no driver or no such card.
    """

    def __init__(self, index: int, nbytes: int, driver: Driver | None = None) -> None:
        address = ctypes.c_uint64()

        def allocate(driver: Driver) -> None:
            driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
            _held.setdefault(index, {})[address.value] = nbytes

        def free(driver: Driver) -> None:
            driver.functions.cuMemFree_v2(address)
            _held.get(index, {}).pop(address.value, None)

        _own(self, index, nbytes, driver, address, allocate, free)
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3.
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "strides": None,
            "version": 3,
        }


class MappedMemory:
    """Pinned main memory that a card's kernels read without a copy, and numpy can wrap.

    The CPU and the card use the same address, because every card that this engine runs on has
    unified addressing (CUDA programming guide, "Unified Virtual Address Space"). The memory is
    exactly as large as asked, where PyTorch's pinned memory is rounded up to a power of two. It
    is freed when the last reference is dropped, including those of tensors.

    Args:
        index, nbytes, driver: as those of `CardMemory`.

    Raises:
        MemoryError, DeviceError: as `CardMemory`.
    """

    def __init__(self, index: int, nbytes: int, driver: Driver | None = None) -> None:
        address = ctypes.c_uint64()

        def allocate(driver: Driver) -> None:
            driver.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes),
                        _PORTABLE | _MAPPED)

        def free(driver: Driver) -> None:
            driver.functions.cuMemFreeHost(address)

        _own(self, index, nbytes, driver, address, allocate, free)
        # https://numpy.org/doc/stable/reference/arrays.interface.html, version 3.
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "strides": None,
            "version": 3,
        }


def held_bytes(index: int) -> int:
    """Return the bytes of a card that this process holds through `CardMemory`."""
    return sum(_held.get(index, {}).values())


def _own(
    owner: object, index: int, nbytes: int, driver: Driver | None, address: ctypes.c_uint64,
    allocate: Callable[[Driver], None], free: Callable[[Driver], None],
) -> None:
    """Allocate memory in a card's context, and free it when its owner is dropped.

    Args:
        owner: holds the memory.
        index: the card.
        nbytes: size.
        driver: the CUDA driver; the installed one where None.
        address: where `allocate` writes the address. It stays 0 if the driver refuses.
        allocate, free: of the memory; called in the card's context.

    Raises:
        MemoryError: the driver refused.
        DeviceError: there is no driver or no such card.
    """
    driver = _installed() if driver is None else driver
    try:
        # Retained as long as the memory, which belongs to the context.
        context = Context(driver, index)
        # Registered before the driver writes the address: an interrupt after that call
        # would otherwise lose the memory.
        release = weakref.finalize(owner, _free, context, address, free)
        try:
            with context:
                allocate(driver)
        except BaseException:
            release()
            raise
    except InsufficientMemory as error:
        raise MemoryError(f"the driver refused {nbytes} bytes") from error


def _free(
    context: Context, address: ctypes.c_uint64, free: Callable[[Driver], None]
) -> None:
    def free_if_taken() -> None:
        if address.value:
            free(context.driver)

    release_in(context, free_if_taken)


@functools.cache
def _installed() -> Driver:
    return Driver()
