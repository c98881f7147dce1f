"""A frame: a kind, small JSON fields and arrays, packed into one buffer of bytes and read back.

Layout of a buffer, little-endian:

    header   24 bytes: magic, class, destination, origin, bytes of the text, bytes of the frame
    text     JSON: [kind, fields, [[dtype, shape], ...]]
    arrays   each at the next multiple of 64 bytes

A frame comes from another machine. Every size is checked before it is used, and nothing but JSON
and numbers is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

_HEADER = struct.Struct("<4sBBBxIxxxxQ")
_MAGIC = b"EXM1"
_ALIGNMENT = 64
# The text of a frame: questions and replies have kilobytes.
MAX_TEXT_BYTES = 16 << 20
MAX_ARRAYS = 4096
MAX_DIMENSIONS = 8
# An array that is written in place must have an item size and no Python objects.
DTYPES = {
    name: np.dtype(name) for name in (
        "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool",
    )
}
# NumPy takes microseconds to write the name of a type.
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Neither reads nor writes NaN, which is no JSON. Kept, because making one takes microseconds.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
# The room of a frame besides its arrays, for `room`: header, text and alignment.
TEXT_ROOM = 64 << 10


class InvalidFrame(ValueError):
    """The bytes that came are no frame."""


class FrameClass(IntEnum):
    """How a frame travels."""

    ORDERED = 0  # to the next machine, in one order with all others
    EXPRESS = 1  # to one machine; those between forward it at once
    BEAT = 2     # says that the machine before is alive
    BYE = 3      # the last frame of a session
    PING = 4     # to the next machine, which answers on the same link; see `probe`


_CLASSES = list(FrameClass)


class Envelope(NamedTuple):
    """What a frame's header says besides sizes.

    Attributes:
        frame_class: how it travels.
        destination: for EXPRESS the place of the machine that it is for.
        origin: the place of the machine that made it.
    """

    frame_class: FrameClass
    destination: int = 0
    origin: int = 0


@dataclass
class Frame:
    """What one machine tells another.

    Attributes:
        kind: what it is about; the user's word.
        fields: small values that JSON can carry.
        arrays: numpy arrays. Those of a received frame are views of a buffer that is used again
            after `release`.
        envelope: of a received frame; None before it is sent.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()
    envelope: Envelope | None = None
    _give_back: Callable[[], None] | None = None

    @property
    def is_express(self) -> bool:
        """True for a received frame that was sent to one machine."""
        return (
            self.envelope is not None and self.envelope.frame_class == FrameClass.EXPRESS
        )

    def release(self) -> None:
        """Give the buffer of a received frame back. Its arrays must not be used afterwards."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            self.arrays = ()
            give_back()

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def room(array_bytes: int) -> int:
    """Return the buffer size that surely holds a frame with one array of that many bytes."""
    return array_bytes + TEXT_ROOM


def _aligned(nbytes: int) -> int:
    return (nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


class PackedFrame:
    """A frame whose text is written and whose arrays are to be copied into a buffer.

    Raises:
        ValueError: JSON cannot carry the fields, or an array's type cannot be sent.
    """

    def __init__(self, frame: Frame, envelope: Envelope) -> None:
        self._arrays = list(frame.arrays)
        if len(self._arrays) > MAX_ARRAYS:
            raise ValueError(f"a frame has at most {MAX_ARRAYS} arrays, not {len(self._arrays)}")
        described = []
        for array in self._arrays:
            name = _NAMES.get(array.dtype)
            if name is None:
                raise ValueError(f"frames have no arrays of {array.dtype}")
            described.append((name, array.shape))
        text = _ENCODER.encode((frame.kind, frame.fields, described)).encode()
        if len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"the text of a frame has at most {MAX_TEXT_BYTES} bytes")
        self._offsets = []
        end = _HEADER.size + len(text)
        for array in self._arrays:
            offset = _aligned(end)
            self._offsets.append(offset)
            end = offset + array.nbytes
        self.nbytes = end
        self._head = _HEADER.pack(
            _MAGIC, envelope.frame_class, envelope.destination, envelope.origin, len(text), end
        ) + text

    def write(self, buffer: np.ndarray) -> None:
        """Write the frame to the start of a buffer of uint8."""
        buffer[: len(self._head)] = np.frombuffer(self._head, np.uint8)
        for offset, array in zip(self._offsets, self._arrays, strict=True):
            target = buffer[offset : offset + array.nbytes].view(array.dtype)
            np.copyto(target.reshape(array.shape), array)


def read_header(buffer: np.ndarray, limit: int) -> tuple[Envelope, int]:
    """Read the start of a frame.

    Args:
        buffer: uint8, at least the first bytes of the frame.
        limit: the largest frame that is accepted.

    Returns:
        Its envelope, and the bytes of the whole frame.

    Raises:
        InvalidFrame: these bytes begin no frame, or the frame is larger than allowed.
    """
    envelope, _, nbytes = _header_parts(buffer)
    if nbytes > limit:
        raise InvalidFrame(f"a frame of {nbytes} bytes, of which {limit} are allowed")
    return envelope, nbytes


def _header_parts(buffer: np.ndarray) -> tuple[Envelope, int, int]:
    magic, frame_class, destination, origin, text_bytes, nbytes = _HEADER.unpack_from(
        buffer.data
    )
    if magic != _MAGIC:
        raise InvalidFrame("it does not begin as a frame does")
    if frame_class >= len(_CLASSES):
        raise InvalidFrame(f"class {frame_class}")
    if text_bytes > MAX_TEXT_BYTES or _HEADER.size + text_bytes > nbytes:
        raise InvalidFrame(f"a text of {text_bytes} bytes in a frame of {nbytes}")
    return Envelope(_CLASSES[frame_class], destination, origin), text_bytes, nbytes


def read_frame(buffer: np.ndarray, give_back: Callable[[], None] | None = None) -> Frame:
    """Read a whole frame. Its arrays are views of the buffer.

    Args:
        buffer: uint8; the frame is at its start.
        give_back: what `Frame.release` calls.

    Raises:
        InvalidFrame: the bytes are no frame.
    """
    envelope, text_bytes, nbytes = _header_parts(buffer)
    if nbytes > len(buffer):
        raise InvalidFrame(f"a frame of {nbytes} bytes in a buffer of {len(buffer)}")
    end = _HEADER.size + text_bytes
    try:
        value = json.loads(buffer[_HEADER.size : end].tobytes())
    except (ValueError, RecursionError) as error:
        raise InvalidFrame(f"its text is no JSON: {error}") from None
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)
            and isinstance(value[1], dict) and isinstance(value[2], list)):
        raise InvalidFrame("its text has no kind, fields and arrays")
    kind, fields, described = value
    if len(described) > MAX_ARRAYS:
        raise InvalidFrame(f"{len(described)} arrays")
    arrays = tuple(_views(buffer[:nbytes], end, described))
    return Frame(kind, fields, arrays, envelope, give_back)


def _views(buffer: np.ndarray, end: int, described: list[Any]) -> Iterator[np.ndarray]:
    for entry in described:
        dtype, shape = _checked_description(entry)
        offset = _aligned(end)
        end = offset + math.prod(shape) * dtype.itemsize
        if end > len(buffer):
            raise InvalidFrame("an array ends behind the frame")
        yield buffer[offset:end].view(dtype).reshape(shape)


def _checked_description(entry: Any) -> tuple[np.dtype, list[int]]:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            and entry[0] in DTYPES and isinstance(entry[1], list)
            and len(entry[1]) <= MAX_DIMENSIONS):
        raise InvalidFrame("an array without type and shape")
    shape = entry[1]
    if not all(type(count) is int and 0 <= count < 1 << 40 for count in shape):
        raise InvalidFrame("an array whose shape has something other than counts")
    return DTYPES[entry[0]], shape
