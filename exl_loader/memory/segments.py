"""The table of bytes laid out: where each tensor starts in which buffer of which device.

Integers only; no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..backends import backend_of
from ..utils.integers import round_up
from ..utils.table import SEGMENTS, TensorSpec


@dataclass(frozen=True)
class Placement:
    """A tensor spec and where it starts in its segment's buffer, in bytes."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Segment:
    """One buffer of one device: its placements in order and its size in bytes."""

    device: str
    name: str
    placements: tuple[Placement, ...]
    nbytes: int


def align(nbytes: int, device: str) -> int:
    """Round a byte count up to the device's alignment."""
    return round_up(nbytes, backend_of(device).alignment_bytes)


def place(specs: Iterable[TensorSpec]) -> dict[tuple[str, str], Segment]:
    """Lay specs out consecutively, each aligned.

    Returns:
        (device, segment name) -> Segment. Only segments that have tensors appear.
    """
    steps: dict[str, int] = {}
    offsets: dict[tuple[str, str], int] = {}
    placements: dict[tuple[str, str], list[Placement]] = {}
    seen: set[tuple[str, str, str]] = set()
    for spec in specs:
        key = (spec.device, spec.segment)
        assert spec.segment in SEGMENTS, spec
        assert (*key, spec.name) not in seen, f"{spec.name} stands twice in {key}"
        seen.add((*key, spec.name))
        offset = offsets.get(key, 0)
        placements.setdefault(key, []).append(Placement(spec, offset))
        if spec.device not in steps:
            steps[spec.device] = backend_of(spec.device).alignment_bytes
        offsets[key] = offset + round_up(spec.nbytes, steps[spec.device])
    return {
        key: Segment(key[0], key[1], tuple(placements[key]), offsets[key]) for key in placements
    }
