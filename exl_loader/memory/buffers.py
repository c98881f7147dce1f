"""The buffers of a model: one for each device and segment, with every tensor a view into it.

The pages of a buffer are touched when it is allocated, because a system that promises more
memory than it has would otherwise fail in the middle of a response.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..backends import backend_of
from ..utils.byte_counts import parse_bytes
from ..utils.errors import InsufficientMemory
from ..utils.progress import NullProgress, Progress, task
from .segments import Segment

if TYPE_CHECKING:
    import torch

LIMIT_VARIABLE = "EXL_LOADER_MEMORY_LIMIT"

# Bytes touched between two checks of the free memory. Few enough that the growth of another
# process is noticed before the system kills processes, enough that the checks cost nothing.
TOUCH_BYTES = 256 << 20

# The buffers of this process: the owner of the memory -> (device, bytes).
_live: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()

# Held from the check of the limit until the memory is taken, because two loads at once would
# otherwise both count on the same bytes.
_allocating = threading.Lock()


def live_bytes(device: str | None = None) -> int:
    """Return the bytes of all buffers that exist in this process, on one device or on all.

    A buffer counts as long as any view into it exists, because the view keeps its memory.
    """
    return sum(nbytes for name, nbytes in _live.values() if device in (None, name))


def environment_limit(device: str, given_back: int = 0) -> int | None:
    """Return the bytes that `EXL_LOADER_MEMORY_LIMIT` leaves for another model.

    The variable limits the buffers of all models of this process together, on each device.

    Args:
        device: its name.
        given_back: bytes of this process's buffers that will have been released by then.

    Returns:
        The bytes; None where the variable is not set.

    Raises:
        InvalidSettings: the variable is no byte count.
    """
    value = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not value:
        return None
    limit = parse_bytes(value, f"environment variable {LIMIT_VARIABLE}")
    return max(0, limit - live_bytes(device) + given_back)


def trim_heap() -> None:
    """Return freed memory to the system.

    glibc keeps the memory that a load has freed, tens of MiB, for later allocations.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, without this function


class Buffers:
    """The buffers of one model; made by `allocate`."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], tuple[Segment, torch.Tensor]] = {}

    def views(self, segment: str, device: str | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of a segment: name -> view with its own dtype and shape.

        Args:
            segment: see `TensorSpec.segment`.
            device: the device; all devices where None.
        """
        import torch

        return {
            tensor.spec.name: buffer[tensor.offset : tensor.offset + tensor.spec.nbytes]
            .view(getattr(torch, tensor.spec.dtype))
            .view(tensor.spec.shape)
            for (on, name), (layout, buffer) in self._buffers.items()
            if name == segment and device in (None, on)
            for tensor in layout.offsets
        }

    def whole(self, segment: str, device: str) -> torch.Tensor:
        """Return a buffer as a uint8 tensor."""
        return self._buffers[device, segment][1]

    def allocated_bytes(self, device: str | None = None, segment: str | None = None) -> int:
        """Return the bytes of all buffers, or of those of one device or segment."""
        return sum(
            buffer.nbytes
            for (on, name), (_, buffer) in self._buffers.items()
            if device in (None, on) and segment in (None, name)
        )

    def release(self) -> None:
        """Drop the buffers. Their memory is freed when the last view into it is dropped."""
        self._buffers.clear()

    def _take(self, segment: Segment, advance) -> None:
        if segment.read_by is not None:
            self._take_mapped(segment, segment.read_by)
            advance(segment.nbytes)
            return
        backend = backend_of(segment.device)
        buffer, owner = backend.empty(segment.device, segment.nbytes)
        _live[owner] = (segment.device, segment.nbytes)
        for first in range(0, segment.nbytes, TOUCH_BYTES):
            piece = buffer[first : first + TOUCH_BYTES]
            left = backend.capacity(segment.device)
            left_bytes = left.free_bytes if left.touchable_bytes is None else left.touchable_bytes
            if backend.taken_by_touch and left_bytes < piece.nbytes:
                raise MemoryError("another process took the memory")
            backend.touch(piece)
            advance(piece.nbytes)
        self._buffers[segment.device, segment.name] = (segment, buffer)

    def _take_mapped(self, segment: Segment, card: str) -> None:
        """Allocate main memory that a card reads. The driver takes all of it at once."""
        free_bytes = backend_of(segment.device).capacity(segment.device).free_bytes
        if free_bytes < segment.nbytes:
            raise MemoryError("another process took the memory")
        buffer, owner = backend_of(card).empty_mapped(card, segment.nbytes)
        _live[owner] = (segment.device, segment.nbytes)
        self._buffers[segment.device, segment.name] = (segment, buffer)


def allocate(segments: Iterable[Segment], progress: Progress | None = None) -> Buffers:
    """Allocate one buffer for every segment, all or none. Calls wait for each other.

    Args:
        segments: from `segments.lay_out`; each (device, name) once.
        progress: gets the bytes taken.

    Raises:
        InsufficientMemory: the system refused a buffer, or memory that the plan saw free is no
            longer free or no longer within `EXL_LOADER_MEMORY_LIMIT`. All buffers have been
            released.
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
    """Raise where another model of this process has taken memory since the plan was made."""
    for device in dict.fromkeys(segment.device for segment in segments):
        needed = sum(segment.nbytes for segment in segments if segment.device == device)
        left = environment_limit(device)
        if left is not None and needed > left:
            raise InsufficientMemory(
                f"{device}: no memory for another model of this process",
                expected=f"{needed} bytes, which the plan saw free",
                actual=f"{left} bytes left of {LIMIT_VARIABLE}",
                remedy="Unload the other model, or raise the limit",
            )


def _try_take(buffers: Buffers, segment: Segment, advance) -> str | None:
    """Allocate a buffer; where that fails, release all buffers and return the reason."""
    try:
        buffers._take(segment, advance)
    except MemoryError as error:
        # Text, because the traceback of the exception would keep the half-touched buffer alive.
        buffers.release()
        return str(error) or "the system refused it"
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
        remedy="All memory was given back. Close the program that took the memory, or choose a "
        "smaller ctx_size or a cache_type of fewer bits.",
    )
