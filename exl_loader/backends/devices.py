"""The kinds of devices, and what serves a device name.

One class per kind of device behind one small interface, so that planning and allocating
never ask which kind it is, and tests bring devices of their own.
"""

from __future__ import annotations

import re

from ..utils.errors import InvalidSettings, shown
from .device import Device


def device_kind(name: str) -> Device:
    """Find what serves a device name such as `cpu`, `cpu:1` or `cuda:0`."""
    kind, colon, index = name.partition(":")
    if kind not in KINDS or (colon and not re.fullmatch("[0-9]{1,3}", index)):
        raise InvalidSettings(
            "device", expected="auto, cpu or cuda:0, cuda:1, ...", actual=shown(name)
        )
    return KINDS[kind]


def _kinds() -> dict[str, Device]:
    from .cpu.device import CpuDevice
    from .cuda.device import CudaDevice

    return {"cpu": CpuDevice(), "cuda": CudaDevice()}


KINDS: dict[str, Device] = _kinds()
