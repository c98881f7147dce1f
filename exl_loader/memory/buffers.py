"""The buffers of a model: how much a device may lend, and taking exactly the table's bytes.

Every (device, segment) is one buffer, every tensor a view into it. Memory is taken for
good when it is allocated (its pages are touched), so that a plan which was kept at load
time cannot fail later.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import weakref
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..backends import backend_of
from ..backends.base import Capacity
from ..utils.errors import InsufficientMemory, InvalidSettings, shown
from ..utils.progress import NullProgress, Progress, task
from .segments import Segment

if TYPE_CHECKING:
    import torch

LIMIT_VARIABLE = "EXL_LOADER_MEMORY_LIMIT"

# Between two looks at what is still free: small enough that another process which grows
# meanwhile is noticed before the system starts to kill, large enough to cost nothing.
TOUCH_BYTES = 256 << 20

# What a file's or a buffer's size can be at most.
MAX_BYTES = (1 << 63) - 1

# A text that is a smaller number, and no unit, counts GiB or MiB: more MiB no card has.
LEAST_BARE_BYTES = 1 << 18

_BYTES = re.compile(
    r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT])(iB|B)?|B)?\s*", re.IGNORECASE | re.ASCII
)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

# Buffers that exist in this process: the memory's owner -> (device, bytes).
_live: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()

# Held from looking at what is left until it is taken: of two loads at once one would otherwise
# count on the other's bytes.
_allocating = threading.Lock()


def parse_bytes(value: int | str, setting: str) -> int:
    """Read a byte count: an int, or text such as `24GiB`, `24G`, `1.5 GB` or `8589934592`.

    KiB, MiB, GiB (and K, M, G) are powers of 1024; KB, MB, GB are powers of 1000. Text without
    a unit that comes to less than any model takes is refused: `24` is meant to be GiB.

    Args:
        value: the count.
        setting: name of the setting, for the error.

    Raises:
        InvalidSettings: it is no positive byte count, or lacks its unit.
    """
    least = 1
    if isinstance(value, int) and not isinstance(value, bool):
        count = Fraction(value) if value <= MAX_BYTES else Fraction(0)
    else:
        match = _BYTES.fullmatch(value) if isinstance(value, str) else None
        count = _scaled(*match.groups(default="")) if match else Fraction(0)
        if match and match[0].rstrip()[-1].isdigit():
            least = LEAST_BARE_BYTES
    if not least <= count <= MAX_BYTES:
        raise InvalidSettings(
            setting, expected="a number of bytes such as 24GiB", actual=shown(value)
        )
    return int(count)


def _scaled(number: str, unit: str, suffix: str) -> Fraction:
    base = 1000 if suffix.upper() == "B" else 1024
    return Fraction(number) * base ** _UNITS[unit.upper()]


def live_bytes(device: str | None = None) -> int:
    """Count the bytes of all buffers that exist in this process, on one device or on all.

    Measured from the memory itself: a view that is still held somewhere keeps its buffer
    alive, and it is counted.
    """
    return sum(nbytes for name, nbytes in _live.values() if device in (None, name))


def environment_limit(device: str, given_back: int = 0) -> int | None:
    """Return what `EXL_LOADER_MEMORY_LIMIT` leaves for another model; None where it is not set.

    It is a device's capacity for the buffers of all models of this process together.

    Args:
        device: its name.
        given_back: bytes of this process's buffers that will be gone by then.

    Raises:
        InvalidSettings: it is no byte count.
    """
    value = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not value:
        return None
    limit = parse_bytes(value, f"environment variable {LIMIT_VARIABLE}")
    return max(0, limit - live_bytes(device) + given_back)


def capacity(device: str) -> Capacity:
    """Return what a device has and lends now, by the system's own figures.

    Raises:
        InvalidSettings: there is no such device.
    """
    return backend_of(device).capacity(device)


def trim_heap() -> None:
    """Give memory that was freed back to the system.

    glibc keeps what a load has freed on the way, tens of MiB, in case it is asked for again.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, which has no such call


class Buffers:
    """The buffers of one model; made by `allocate`."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], tuple[Segment, torch.Tensor]] = {}

    def views(self, segment: str, device: str | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of a segment by name, each a view with its own dtype and shape.

        Args:
            segment: `weights`, `cache` or `workspace`.
            device: only this device's; all devices where None.
        """
        import torch

        return {
            place.spec.name: buffer[place.offset : place.offset + place.spec.nbytes]
            .view(getattr(torch, place.spec.dtype))
            .view(place.spec.shape)
            for (on, name), (layout, buffer) in self._buffers.items()
            if name == segment and device in (None, on)
            for place in layout.placements
        }

    def whole(self, segment: str, device: str) -> torch.Tensor:
        """Return a buffer as it is, uint8."""
        return self._buffers[device, segment][1]

    def allocated_bytes(self, device: str | None = None, segment: str | None = None) -> int:
        """Sum the sizes of the buffers that exist, all or of one device or segment."""
        return sum(
            buffer.nbytes
            for (on, name), (_, buffer) in self._buffers.items()
            if device in (None, on) and segment in (None, name)
        )

    def release(self) -> None:
        """Give everything back; the memory goes when the last view into it is dropped."""
        self._buffers.clear()

    def _take(self, segment: Segment, advance) -> None:
        backend = backend_of(segment.device)
        buffer, owner = backend.empty(segment.device, segment.nbytes)
        _live[owner] = (segment.device, segment.nbytes)
        for first in range(0, segment.nbytes, TOUCH_BYTES):
            piece = buffer[first : first + TOUCH_BYTES]
            left = backend.capacity(segment.device)
            left_bytes = left.free_bytes if left.touchable_bytes is None else left.touchable_bytes
            if backend.taken_by_touch and left_bytes < piece.nbytes:
                raise MemoryError("another process took it meanwhile")
            backend.touch(piece)
            advance(piece.nbytes)
        self._buffers[segment.device, segment.name] = (segment, buffer)


def allocate(segments: Iterable[Segment], progress: Progress | None = None) -> Buffers:
    """Take one buffer for every segment, all or none; one call at a time.

    Args:
        segments: from `segments.place`; each (device, name) once.
        progress: told the bytes taken.

    Raises:
        InsufficientMemory: the system refused one of them, or what was free when the plan
            was made is free no more, or no more within `EXL_LOADER_MEMORY_LIMIT`; everything
            taken so far is given back.
    """
    segments = list(segments)
    buffers = Buffers()
    total = sum(segment.nbytes for segment in segments)
    reserving = task(progress or NullProgress(), "reserving memory", total, "bytes")
    with _allocating, reserving as advance:
        _check_environment_limit(segments)
        for segment in segments:
            refusal = _try_take(buffers, segment, advance)
            if refusal is not None:
                raise _vanished(segment, refusal)
    return buffers


def _check_environment_limit(segments: list[Segment]) -> None:
    """Refuse what another model of this process has taken since the plan was made."""
    for device in dict.fromkeys(segment.device for segment in segments):
        needed = sum(segment.nbytes for segment in segments if segment.device == device)
        left = environment_limit(device)
        if left is not None and needed > left:
            raise InsufficientMemory(
                f"{device}: no memory for another model of this process",
                expected=f"{needed} bytes, which the plan saw free",
                actual=f"{left} bytes left of {LIMIT_VARIABLE}",
                remedy="Unload the model that was loaded meanwhile, or raise the limit",
            )


def _try_take(buffers: Buffers, segment: Segment, advance) -> str | None:
    """Return why a buffer could not be taken, after giving all of them back, or None."""
    try:
        buffers._take(segment, advance)
    except MemoryError as error:
        # Text, not the exception: its traceback would keep the half-taken buffer alive.
        buffers.release()
        return str(error) or "the system refused"
    except BaseException:
        buffers.release()
        raise
    return None


def _vanished(segment: Segment, refusal: str) -> InsufficientMemory:
    free = backend_of(segment.device).capacity(segment.device).free_bytes
    return InsufficientMemory(
        f"{segment.device}: no memory for the {segment.name} buffer",
        expected=f"{segment.nbytes} bytes, which the plan saw free",
        actual=f"{free} bytes free ({refusal})",
        remedy="Everything taken was given back. Close what took the memory, or load with a "
        "smaller ctx_size or fewer cache bits.",
    )
