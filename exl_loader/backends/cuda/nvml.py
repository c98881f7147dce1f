"""The driver's monitoring library: a card's memory within microseconds, and without a context.

`nvidia-smi` asks the same library, but takes tens of milliseconds to start, which the gauge
would pay for with every movement of a slider. Functions: NVIDIA Management Library, API
reference.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"

_FUNCTIONS = (
    "nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUUID",
)
# NVML_DEVICE_UUID_V2_BUFFER_SIZE
_UUID_BYTES = 96


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def card_memory(card: str) -> tuple[int, int] | None:
    """Return a card's (total, free) bytes.

    Args:
        card: its number as `nvidia-smi` counts, or its whole UUID.

    Returns:
        None where there is no such card or no library.
    """
    handle, memory = _handle(card), _Memory()
    if handle is None or _opened().nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return memory.total, memory.free


def card_uuid(card: str) -> str | None:
    """Return a card's UUID, as `GPU-...`; arguments and None as those of `card_memory`."""
    handle, text = _handle(card), ctypes.create_string_buffer(_UUID_BYTES)
    if handle is None or _opened().nvmlDeviceGetUUID(handle, text, _UUID_BYTES) != 0:
        return None
    return text.value.decode(errors="replace")


def _handle(card: str) -> ctypes.c_void_p | None:
    """Find a card; None where there is no such card or no library."""
    library = _opened()
    if library is None:
        return None
    handle = ctypes.c_void_p()
    if card.isdigit():
        code = library.nvmlDeviceGetHandleByIndex_v2(int(card), ctypes.byref(handle))
    else:
        code = library.nvmlDeviceGetHandleByUUID(card.encode(), ctypes.byref(handle))
    return handle if code == 0 else None


def card_count() -> int:
    """Return how many cards there are, those hidden from CUDA too; 0 without the library."""
    library, count = _opened(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def _opened() -> Any:
    """The library, initialised once a process; None where there is none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    # A driver of ten years ago has the functions under older names.
    if not all(hasattr(library, name) for name in _FUNCTIONS):
        return None
    return library if library.nvmlInit_v2() == 0 else None
