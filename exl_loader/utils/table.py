"""The table of bytes: everything that will live on a device, as tensor specs.

The reservation is the sum of this table and the loader carves its buffers from the same
table, so predicted and allocated agree by construction. Integers only; no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}

SEGMENTS = ("weights", "cache", "workspace")

# Every tensor starts on a multiple of this many bytes: one cache line and one AVX-512
# register on the CPU; the CUDA driver's own granularity (256) for coalesced loads.
ALIGNMENT = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that will live in one of a device's three buffers.

    Args:
        name: unique within its device and segment, e.g. `model.norm.weight`.
        segment: `weights`, `cache` or `workspace`.
        dtype: a key of `DTYPE_BYTES`.
        shape: dimensions in elements, outermost first.
        device: `cpu`, `cuda:0`, ...
    """

    name: str
    segment: str
    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, without alignment."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class DeviceMap:
    """Which device each part of a model lives on: contiguous layer ranges, in order.

    Args:
        embed: device of the token embedding; the first layer's device.
        layers: device of each decoder layer, its weights and its cache.
        head: device of the final norm and the output head; the last layer's device.
    """

    embed: str
    layers: tuple[str, ...]
    head: str

    @classmethod
    def single(cls, device: str, num_layers: int) -> DeviceMap:
        """Put everything on one device."""
        return cls(device, (device,) * num_layers, device)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device used, each once, in the order in which a token visits them."""
        return tuple(dict.fromkeys((self.embed, *self.layers, self.head)))


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
    step = ALIGNMENT[device.split(":")[0]]
    return -(-nbytes // step) * step


def place(specs: Iterable[TensorSpec]) -> dict[tuple[str, str], Segment]:
    """Lay specs out one behind the other, each aligned.

    Returns:
        (device, segment name) -> Segment. Only segments that have tensors appear.
    """
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
        offsets[key] = offset + align(spec.nbytes, spec.device)
    return {
        key: Segment(key[0], key[1], tuple(placements[key]), offsets[key]) for key in placements
    }
