"""The devices that a plan may use, and what each one lends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...backends import auto_devices, backend_of, full_name
from ...backends.base import Capacity
from ...utils.byte_counts import GIB, parse_bytes
from ...utils.errors import InvalidSettings, shown
from ...utils.table import MAIN_MEMORY
from ..buffers import environment_limit, live_bytes
from .options import LoadOptions

if TYPE_CHECKING:
    from .remote import Connection

MAX_DEVICES = 64


@dataclass(frozen=True)
class Budget:
    """What one device lends.

    Args:
        device: its name.
        capacity: its memory now, as the system reports it.
        limit_bytes: the most that this model's buffers may take of it; None without a limit.
        overhead_bytes: memory outside our buffers that running on the device takes.
        overhead_measured: False where that is assumed.
    """

    device: str
    capacity: Capacity
    limit_bytes: int | None
    overhead_bytes: int
    overhead_measured: bool

    @property
    def lent_bytes(self) -> int:
        """The free memory, at most the limit."""
        return self.limited().free_bytes

    def headroom_bytes(self, total_bytes: int, overhead_bytes: int) -> int:
        """Return the bytes that stay free; negative where buffers and overhead do not fit.

        A limit holds for the buffers alone, the free memory for buffers and overhead.
        """
        headroom = self.capacity.free_bytes - total_bytes - overhead_bytes
        if self.limit_bytes is None:
            return headroom
        return min(headroom, self.limit_bytes - total_bytes)

    def limited(self) -> Capacity:
        """Return the memory of the device as the limit leaves it."""
        if self.limit_bytes is None or self.limit_bytes >= self.capacity.capacity_bytes:
            return self.capacity
        return Capacity(self.limit_bytes, min(self.limit_bytes, self.capacity.free_bytes))


def budgets(options: LoadOptions) -> list[Budget]:
    """Return the devices that a plan may use, in order, with what each one lends.

    Raises:
        InvalidSettings: there is no such device, or `device`, `gpu_split`, `vram` and
            `memory_limit` contradict each other or make no sense.
    """
    split = _gpu_split_bytes(options)
    sizes = [parse_bytes(part, "vram") for part in _listed("vram", options.vram)]
    names = _device_names(options, max(len(split), len(sizes)))
    for setting, values in (("gpu_split", split), ("vram", sizes)):
        if values and len(values) != len(names):
            raise InvalidSettings(
                setting,
                expected=f"{len(names)} values, one for each of {', '.join(names)}",
                actual=len(values),
            )
    overall = None
    if options.memory_limit is not None:
        overall = parse_bytes(options.memory_limit, "memory_limit")
    found = []
    for i, name in enumerate(names):
        limits = [overall, split[i] if split else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if sizes:
            found.append(_absent(name, sizes[i], limit))
        else:
            found.append(_present(name, limit, live_bytes(name) if options.replacing else 0))
    return found


def main_memory_budget(options: LoadOptions) -> Budget:
    """Return what main memory lends to a model whose layers are all on cards."""
    limit = None
    if options.memory_limit is not None:
        limit = parse_bytes(options.memory_limit, "memory_limit")
    given_back = live_bytes(MAIN_MEMORY) if options.replacing else 0
    return _present(MAIN_MEMORY, limit, given_back)


def gpu_split_by_machine(options: LoadOptions, connection: Connection | None) -> list[Any]:
    """Return the `gpu_split` of each machine, in order of place: all of it without a connection.

    Raises:
        InvalidSettings: it does not have one part for each machine.
    """
    split = options.gpu_split
    if connection is None:
        if isinstance(split, str) and ";" in split:
            raise InvalidSettings(
                "gpu_split", expected="values of one machine's devices, such as 20,24",
                actual=shown(split),
                remedy="`;` divides those of several machines, which the option machines brings",
            )
        return [split]
    names = [machine.name for machine in (connection.first, *connection.others)]
    if split is None or split == "":
        return [""] * len(names)
    parts = split.split(";") if isinstance(split, str) else []
    if len(parts) != len(names):
        raise InvalidSettings(
            "gpu_split",
            expected=f"{len(names)} parts divided by `;`, such as {';'.join(['20'] * len(names))}, "
            f"one for each of {', '.join(names)}",
            actual=shown(split),
            remedy="A part may be empty, for no limit",
        )
    return [part.strip() for part in parts]


def of_machine(options: LoadOptions, gpu_split: Any, *, is_alone: bool) -> LoadOptions:
    """Return the options of one machine.

    Args:
        gpu_split: its part of the option.
        is_alone: False for one of several machines. A part for each does not say that each has
            cards, so that on a machine without any it limits main memory.
    """
    device = options.device
    if not is_alone and device == "auto" and all(
        backend_of(name).is_main_memory for name in auto_devices()
    ):
        device = MAIN_MEMORY
    return replace(options, device=device, gpu_split=gpu_split)


def chosen_devices(options: LoadOptions) -> list[str]:
    """Return the names of the devices of `budgets`.

    Raises:
        InvalidSettings: there is no such device.
    """
    return _device_names(options, len(_gpu_split_bytes(options)))


def _absent(name: str, size: int, limit: int | None) -> Budget:
    """Return the budget of a device that need not be here, with all its memory free."""
    backend = backend_of(name)
    overhead_bytes, measured = backend.overhead(name)
    # The overhead of main memory is this process's own. The overhead that was measured on one
    # card is no measure of another card.
    measured = measured and backend.is_main_memory
    return Budget(name, Capacity(size, size), limit, overhead_bytes, measured)


def _present(name: str, limit: int | None, given_back: int) -> Budget:
    """Return the budget of a device, with so many bytes of this process's buffers released."""
    environment = environment_limit(name, given_back)
    if environment is not None:
        limit = environment if limit is None else min(limit, environment)
    backend = backend_of(name)
    overhead_bytes, measured = backend.overhead(name)
    try:
        now = backend.capacity(name)
    except InvalidSettings as error:
        raise InvalidSettings(
            error.thing, expected=error.expected, actual=error.actual,
            remedy=f"{error.remedy}, or vram='24GiB' to plan for a card that is not here",
        ) from None
    return Budget(name, _without(now, given_back), limit, overhead_bytes, measured)


def _without(now: Capacity, held_bytes: int) -> Capacity:
    """Return a device's memory as it will be after our buffers have been released."""
    free_bytes = min(now.capacity_bytes, now.free_bytes + held_bytes)
    return Capacity(now.capacity_bytes, free_bytes, max(0, now.own_bytes - held_bytes))


def _device_names(options: LoadOptions, num_cards: int) -> list[str]:
    device = options.device
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


def _gpu_split_bytes(options: LoadOptions) -> list[int]:
    found = []
    for part in _listed("gpu_split", options.gpu_split):
        try:
            gib = float(part)
        except (TypeError, ValueError, OverflowError):
            gib = math.nan
        if isinstance(part, bool) or not 0 < gib < 1 << 20:
            raise InvalidSettings(
                "gpu_split", expected="GiB for each device, such as 20,24",
                actual=shown(options.gpu_split),
            )
        found.append(int(gib * GIB))
    return found


def _listed(name: str, value: Any) -> list[Any]:
    """Return the values of an option that has one value for each device, at most MAX_DEVICES."""
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
