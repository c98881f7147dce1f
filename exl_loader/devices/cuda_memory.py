"""Memory of a card, straight from the driver: as many bytes as asked, and gone with its owner."""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InsufficientMemory
from ..kernels.cuda.driver import Driver

# Card -> bytes that exist.
_held: dict[int, int] = {}


class CardMemory:
    """A run of device memory that PyTorch can wrap (`torch.as_tensor`) without a copy.

    It goes back to the driver when the last reference is dropped, that of the tensors
    included.

    Args:
        index: the card, as PyTorch counts.
        nbytes: its size.
        driver: the CUDA driver; the installed one where None.

    Raises:
        MemoryError: the driver refused.
        DeviceError: there is no driver or no such card.
    """

    def __init__(self, index: int, nbytes: int, driver: Driver | None = None) -> None:
        driver = _installed() if driver is None else driver
        address = ctypes.c_uint64()
        try:
            with _context(driver, index):
                driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        except InsufficientMemory as error:
            raise MemoryError(f"the driver refused {nbytes} bytes") from error
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3.
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "strides": None,
            "version": 3,
        }
        _held[index] = held_bytes(index) + nbytes
        weakref.finalize(self, _free, driver, index, address.value, nbytes)


def held_bytes(index: int) -> int:
    """Bytes of a card that this process holds through `CardMemory`."""
    return _held.get(index, 0)


def _free(driver: Driver, index: int, address: int, nbytes: int) -> None:
    _held[index] -= nbytes
    if sys.is_finalizing():
        return  # the process's end gives everything back
    with _context(driver, index):
        # Operations that use the memory may still be under way.
        driver.call("cuCtxSynchronize")
        driver.call("cuMemFree_v2", ctypes.c_uint64(address))


@contextmanager
def _context(driver: Driver, index: int) -> Iterator[None]:
    """Make a card's primary context, which PyTorch uses as well, this thread's for a while.

    Whichever thread drops the last reference may never have used a card.
    """
    device, context = driver.device(index), ctypes.c_void_p()
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        driver.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.call("cuDevicePrimaryCtxRelease_v2", device)


@functools.cache
def _installed() -> Driver:
    return Driver()
