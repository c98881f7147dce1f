"""The kinds of devices, with their memory and operations, in one protocol (`base.py`).

Nothing outside this package compares a device's name with that of a kind.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings, shown
from ..utils.table import MAIN_MEMORY
from .cpu.backend import CpuBackend
from .cuda.backend import CudaBackend

if TYPE_CHECKING:
    from ..utils.progress import Progress
    from .base import Backend, DeviceOps

# By kind; `device="auto"` prefers the first that has a device. Tests register doubles here.
BACKENDS: dict[str, Backend] = {"cuda": CudaBackend(), "cpu": CpuBackend()}


def backend_of(device: str) -> Backend:
    """Find the backend of a device such as `cpu`, `cpu:1` or `cuda:0`.

    Raises:
        InvalidSettings: no kind of device has this name.
    """
    kind, colon, index = device.partition(":")
    if kind not in BACKENDS or (colon and not re.fullmatch("[0-9]{1,4}", index)):
        raise InvalidSettings(
            "device", expected="auto, cpu or cuda:0, cuda:1, ...", actual=shown(device)
        )
    return BACKENDS[kind]


def auto_devices(count: int = 0) -> list[str]:
    """Name the devices that `device="auto"` means: cards, else main memory.

    Args:
        count: how many devices the settings speak of, here or not; 0 for those that are here.
    """
    names = (backend.auto_devices(count) for backend in BACKENDS.values())
    return next(found for found in names if found)


def full_name(device: str) -> str:
    """Name a device in full: `cuda` alone is `cuda:0`. Other names stay as they are."""
    return BACKENDS[device].default_device if device in BACKENDS else device


def get_ops(device: str = MAIN_MEMORY, progress: Progress | None = None) -> DeviceOps:
    """Return the operations of a device; see `Backend.open`."""
    return backend_of(device).open(device, progress)
