"""Which devices a plan may use and what each lends: from settings to budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...backends import auto_devices, backend_of, full_name
from ...backends.base import Capacity
from ...utils.byte_counts import GIB, parse_bytes
from ...utils.errors import InvalidSettings, shown
from ..buffers import environment_limit, live_bytes

MAX_DEVICES = 64


@dataclass(frozen=True)
class Budget:
    """What one device lends.

    Args:
        device: its name. capacity: its memory now, by the system.
        limit_bytes: most that this model's buffers may take of it; None without a limit.
        overhead_bytes: taken outside our buffers by running there at all.
        overhead_measured: False where that is assumed.
    """

    device: str
    capacity: Capacity
    limit_bytes: int | None
    overhead_bytes: int
    overhead_measured: bool

    def spare_bytes(self, total_bytes: int, overhead_bytes: int) -> int:
        """Return what stays free beside so many bytes; negative where they do not fit.

        A limit is set on what we reserve, not on what the system adds.
        """
        spare = self.capacity.free_bytes - total_bytes - overhead_bytes
        return spare if self.limit_bytes is None else min(spare, self.limit_bytes - total_bytes)

    def limited(self) -> Capacity:
        """Return the device as the limit leaves it: its capacity is then the limit."""
        if self.limit_bytes is None or self.limit_bytes >= self.capacity.capacity_bytes:
            return self.capacity
        return Capacity(self.limit_bytes, min(self.limit_bytes, self.capacity.free_bytes))


def budgets(
    device: str | Sequence[str],
    gpu_split: str | Sequence[float] | None,
    vram: int | str | Sequence[int | str] | None,
    memory_limit: int | str | None,
    *,
    replacing: bool = False,
) -> list[Budget]:
    """Say which devices a plan may use, in order, and what each lends.

    Args:
        device: `auto` (the cards that `gpu_split` or `vram` speak of, else those that can run
            the model's kernels, as many as it needs, else the CPU), a name, or several names,
            over which the layers are split in this order.
        gpu_split: GiB that our buffers may take of each device, as `20,24` or numbers.
        vram: plan for cards of this size that are not here, as `24GiB`, `24GiB,12GiB` or a list.
        memory_limit: most that our buffers may take of each device, as the environment's
            limit is.
        replacing: as if the buffers that this process holds had been given back.

    Raises:
        InvalidSettings: no such device, or settings that contradict each other.
    """
    split = _gib_list(gpu_split)
    sizes = _size_list(vram)
    names = _device_names(device, max(len(split), len(sizes)))
    for setting, values in (("gpu_split", split), ("vram", sizes)):
        if values and len(values) != len(names):
            raise InvalidSettings(
                setting,
                expected=f"{len(names)} values, one for each of {', '.join(names)}",
                actual=len(values),
            )
    overall = None if memory_limit is None else parse_bytes(memory_limit, "memory_limit")
    found = []
    for i, name in enumerate(names):
        limits = [overall, split[i] if split else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if sizes:
            found.append(_absent(name, sizes[i], limit))
        else:
            found.append(_present(name, limit, live_bytes(name) if replacing else 0))
    return found


def _absent(name: str, size: int, limit: int | None) -> Budget:
    """Budget of a device that is not here, all of it free."""
    backend = backend_of(name)
    overhead_bytes, measured = backend.overhead(name)
    # Main memory's overhead is this process's own. That of a card says nothing of another card.
    measured = measured and backend.is_main_memory
    return Budget(name, Capacity(size, size), limit, overhead_bytes, measured)


def _present(name: str, limit: int | None, given_back: int) -> Budget:
    """Budget of a device that is here, with so many of our bytes given back."""
    environment = environment_limit(name, given_back)
    if environment is not None:
        limit = environment if limit is None else min(limit, environment)
    backend = backend_of(name)
    overhead_bytes, measured = backend.overhead(name)
    capacity = _without(backend.capacity(name), given_back)
    return Budget(name, capacity, limit, overhead_bytes, measured)


def _without(now: Capacity, held_bytes: int) -> Capacity:
    """Return a device's capacity as it will be when our buffers have been given back."""
    free_bytes = min(now.capacity_bytes, now.free_bytes + held_bytes)
    return Capacity(now.capacity_bytes, free_bytes, max(0, now.own_bytes - held_bytes))


def chosen_devices(
    device: str | Sequence[str], gpu_split: str | Sequence[float] | None
) -> list[str]:
    """Name the devices that `budgets` answers for, for what is here.

    Raises:
        InvalidSettings: no such device.
    """
    return _device_names(device, len(_gib_list(gpu_split)))


def _device_names(device: str | Sequence[str], num_cards: int) -> list[str]:
    if isinstance(device, str):
        names = [name.strip() for name in device.split(",")]
    elif isinstance(device, Sequence) and all(isinstance(name, str) for name in device):
        names = list(device)
    else:
        raise InvalidSettings("device", expected="a device's name, or several",
                              actual=shown(device))
    if names == ["auto"]:
        names = auto_devices(num_cards)
    names = [full_name(name) for name in names]
    if not names or len(names) > MAX_DEVICES or len(set(names)) != len(names):
        raise InvalidSettings(
            "device",
            expected=f"one to {MAX_DEVICES} devices, each once",
            actual=", ".join(map(str, names[:8])) or "none",
        )
    for name in names:
        backend_of(name)
    return names


def _gib_list(value: str | Sequence[float] | None) -> list[int]:
    found = []
    for part in _listed("gpu_split", value):
        try:
            gib = float(part)
        except (TypeError, ValueError, OverflowError):
            gib = math.nan
        if isinstance(part, bool) or not 0 < gib < 1 << 20:
            raise InvalidSettings(
                "gpu_split", expected="GiB for each device, such as 20,24", actual=shown(value)
            )
        found.append(int(gib * GIB))
    return found


def _size_list(value: int | str | Sequence[int | str] | None) -> list[int]:
    return [parse_bytes(part, "vram") for part in _listed("vram", value)]


def _listed(name: str, value: Any) -> list[Any]:
    """Return the values of a setting that is one value for each device, at most MAX_DEVICES."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        parts: list[Any] = value.split(",")
    elif isinstance(value, (int, float)):
        parts = [value]
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        parts = list(value)
    else:
        raise InvalidSettings(
            name, expected="one value for each device, as text with commas or a list",
            actual=shown(value),
        )
    if len(parts) > MAX_DEVICES:
        raise InvalidSettings(name, expected=f"at most {MAX_DEVICES} values", actual=len(parts))
    return parts
