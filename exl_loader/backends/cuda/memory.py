"""Memory of a card, straight from the driver: as many bytes as asked, and gone with its owner."""

from __future__ import annotations

import ctypes
import functools
import weakref

from ...utils.errors import InsufficientMemory
from .context import Context, release_in
from .driver import Driver

# Card -> address -> bytes, of what exists.
_held: dict[int, dict[int, int]] = {}


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
            # Retained as long as the memory lives, which is that of the context.
            context = Context(driver, index)
            # Registered before the driver writes the address: an interrupt after that call
            # would otherwise lose the memory.
            free = weakref.finalize(self, _free, context, index, address)
            try:
                with context:
                    driver.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
                _held.setdefault(index, {})[address.value] = nbytes
            except BaseException:
                free()
                raise
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


def held_bytes(index: int) -> int:
    """Bytes of a card that this process holds through `CardMemory`."""
    return sum(_held.get(index, {}).values())


def _free(context: Context, index: int, address: ctypes.c_uint64) -> None:
    def free() -> None:
        # The address is 0 where the driver has refused.
        if address.value:
            context.driver.functions.cuMemFree_v2(address)
            _held.get(index, {}).pop(address.value, None)

    release_in(context, free)


@functools.cache
def _installed() -> Driver:
    return Driver()
