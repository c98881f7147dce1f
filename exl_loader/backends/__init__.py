"""Kinds of devices, with one protocol for their memory and their operations (`base.py`).

Only this package compares the name of a device with that of a kind.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings, shown
from ..utils.table import MAIN_MEMORY
from .cpu.backend import CpuBackend
from .cuda.backend import CudaBackend

if TYPE_CHECKING:
    from ..utils.progress import Progress
    from .base import Backend, DeviceOps

# Kind -> backend. `device="auto"` uses the first one that has a device. Tests add doubles here.
BACKENDS: dict[str, Backend] = {"cuda": CudaBackend(), "cpu": CpuBackend()}


def is_device(device: str) -> bool:
    """Return whether this is the name of a device, here or on another machine."""
    return _kind(device) in BACKENDS


# A plan asks for the same few names thousands of times.
@lru_cache(maxsize=256)
def _kind(device: str) -> str:
    """Return the kind in a device's name; empty where it is no such name."""
    kind, colon, index = device.partition(":")
    return kind if not colon or re.fullmatch("[0-9]{1,4}", index) else ""


def backend_of(device: str) -> Backend:
    """Return the backend of a device such as `cpu`, `cpu:1` or `cuda:0`.

    Raises:
        InvalidSettings: there is no kind of device with this name.
    """
    backend = BACKENDS.get(_kind(device))
    if backend is None:
        raise InvalidSettings(
            "device", expected="auto, cpu or cuda:0, cuda:1, ...", actual=shown(device)
        )
    return backend


def auto_devices(count: int = 0) -> list[str]:
    """Return the devices that `device="auto"` means: cards, or main memory without cards.

    Args:
        count: number of devices that the settings name, present or not; 0 means the present
            ones.
    """
    names = (backend.auto_devices(count) for backend in BACKENDS.values())
    return next(found for found in names if found)


def full_name(device: str) -> str:
    """Return the full name of a device: `cuda` is `cuda:0`. Other names are returned unchanged."""
    return BACKENDS[device].default_device if device in BACKENDS else device


def get_ops(device: str = MAIN_MEMORY, progress: Progress | None = None) -> DeviceOps:
    """Return the operations of a device; see `Backend.open`."""
    return backend_of(device).open(device, progress)
