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
    """Lay specs out consecutively, each aligned; phases of a region at the same offset.

    Returns:
        (device, segment name) -> Segment. Only segments that have tensors appear.
    """
    by_segment: dict[tuple[str, str], list[TensorSpec]] = {}
    seen: set[tuple[str, str, str]] = set()
    for spec in specs:
        key = (spec.device, spec.segment)
        assert spec.segment in SEGMENTS, spec
        assert (*key, spec.name) not in seen, f"{spec.name} is in {key} twice"
        seen.add((*key, spec.name))
        by_segment.setdefault(key, []).append(spec)
    return {key: _segment(*key, tensors) for key, tensors in by_segment.items()}


def _segment(device: str, name: str, specs: list[TensorSpec]) -> Segment:
    """Lay out a segment: tensors of their own, then each region from its own offset."""
    step = backend_of(device).alignment_bytes
    offsets, end = [], 0
    for spec in specs:
        if spec.phase is None:
            offsets.append(TensorOffset(spec, end))
            end += round_up(spec.nbytes, step)
    regions = dict.fromkeys(spec.phase[0] for spec in specs if spec.phase is not None)
    for region in regions:
        ends: dict[str, int] = {}
        for spec in specs:
            if spec.phase is not None and spec.phase[0] == region:
                offset = ends.get(spec.phase[1], end)
                offsets.append(TensorOffset(spec, offset))
                ends[spec.phase[1]] = offset + round_up(spec.nbytes, step)
        end = max(ends.values())
    return Segment(device, name, tuple(offsets), end, specs[0].read_by)
