"""Lay the table of bytes out: the buffer and the offset of each tensor.

Integers only; no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..backends import backend_of
from ..utils.integers import round_up
from ..utils.table import SEGMENTS, TensorSpec


@dataclass(frozen=True)
class TensorOffset:
    """A tensor spec and where it starts in its segment's buffer, in bytes."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Segment:
    """One buffer of one device.

    Args:
        device: its name.
        name: see `TensorSpec.segment`.
        offsets: of its tensors, in order.
        nbytes: size.
        read_by: see `TensorSpec.read_by`.
    """

    device: str
    name: str
    offsets: tuple[TensorOffset, ...]
    nbytes: int
    read_by: str | None = None


def align(nbytes: int, device: str) -> int:
    """Round a byte count up to the device's alignment."""
    return round_up(nbytes, backend_of(device).alignment_bytes)


def lay_out(specs: Iterable[TensorSpec]) -> dict[tuple[str, str], Segment]:
    """Lay specs out consecutively, each aligned.

    Returns:
        (device, segment name) -> Segment. Only segments that have tensors appear.
    """
    steps: dict[str, int] = {}
    ends: dict[tuple[str, str], int] = {}
    offsets: dict[tuple[str, str], list[TensorOffset]] = {}
    seen: set[tuple[str, str, str]] = set()
    for spec in specs:
        key = (spec.device, spec.segment)
        assert spec.segment in SEGMENTS, spec
        assert (*key, spec.name) not in seen, f"{spec.name} is in {key} twice"
        seen.add((*key, spec.name))
        offset = ends.get(key, 0)
        offsets.setdefault(key, []).append(TensorOffset(spec, offset))
        if spec.device not in steps:
            steps[spec.device] = backend_of(spec.device).alignment_bytes
        ends[key] = offset + round_up(spec.nbytes, steps[spec.device])
    return {
        key: Segment(*key, tuple(placed), ends[key], placed[0].spec.read_by)
        for key, placed in offsets.items()
    }
