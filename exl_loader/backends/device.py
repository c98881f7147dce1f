"""What every kind of device offers: its memory, and buffers of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Capacity:
    """A device's memory at this moment, in bytes.

    Args:
        capacity_bytes: what the device has, or what it may be used up to.
        free_bytes: what can be taken now without pushing anything else out.
        own_bytes: what this process holds already.
        touchable_bytes: of what `Device.empty` has promised, so much can be touched now; as much
            as is free where None. More where addresses are what is short: a promise has them.
    """

    capacity_bytes: int
    free_bytes: int
    own_bytes: int = 0
    touchable_bytes: int | None = None

    @property
    def other_bytes(self) -> int:
        """Held by other processes, the desktop and the system."""
        return max(0, self.capacity_bytes - self.free_bytes - self.own_bytes)


@dataclass(frozen=True)
class Process:
    """Another process that holds memory of a device."""

    pid: int
    name: str
    held_bytes: int


class Device(Protocol):
    """A kind of device. `name` is `cpu`, `cuda:0`, ...; one object serves all of its kind."""

    granularity_bytes: int
    """A buffer takes a multiple of this many bytes."""

    taken_by_touch: bool
    """Whether `empty` only promises memory, which `touch` takes."""

    def open(self, name: str) -> None:
        """Take now what running on the device takes outside our buffers; twice is once."""

    def is_open(self, name: str) -> bool:
        """Whether that has been taken, so that `capacity` and `overhead` are measured."""

    def capacity(self, name: str) -> Capacity:
        """Ask the system; raises InvalidSettings where there is no such device."""

    def overhead(self, name: str) -> tuple[int, bool]:
        """Bytes that running on the device takes outside our buffers; True if measured."""

    def processes(self, name: str, limit: int) -> list[Process]:
        """The other processes that hold most of it, largest first; [] where unknown."""

    def empty(self, name: str, nbytes: int) -> tuple[Any, Any]:
        """Take one buffer.

        Returns:
            A uint8 tensor [nbytes], and the object whose life is that of the memory.

        Raises:
            MemoryError: the system refused.
        """

    def touch(self, buffer: Any) -> None:
        """Make a (piece of a) buffer's memory really taken, so that no later use can fail."""
