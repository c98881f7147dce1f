"""The table of bytes: everything that will live on a device, as tensor specs.

The reservation is the sum of this table and the loader carves its buffers from the same
table, so predicted and allocated agree by construction. Integers only; no PyTorch.
"""

from __future__ import annotations

import math
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

SEGMENTS = ("weights", "cache", "workspace", "embedding", "loras")

# Main memory. Every machine has it, so it is the default device.
MAIN_MEMORY = "cpu"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that will live in one of a device's buffers.

    Args:
        name: unique within its device and segment, e.g. `model.norm.weight`.
        segment: `weights`, `cache`, `workspace`, `embedding` for an embedding in main memory whose
            model runs on a card, or `loras` for the room for adapters.
        dtype: a key of `DTYPE_BYTES`.
        shape: dimensions in elements, outermost first.
        device: `cpu`, `cuda:0`, ...
        read_by: the card whose kernels read the tensor in main memory; None for a tensor that
            only its own device uses.
        phase: (region, phase of a step) of a tensor that is used in one phase alone. The phases
            of a region share memory. None for a tensor that has memory of its own.
    """

    name: str
    segment: str
    dtype: str
    shape: tuple[int, ...]
    device: str = MAIN_MEMORY
    read_by: str | None = None
    phase: tuple[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, without alignment."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class DeviceMap:
    """Which device of a machine each part of a model lives on: contiguous layer ranges, in order.

    A model over several machines has a map on each of them, of the layers that are there. The
    first machine has embedding and head as well, wherever the model's last layer is.

    Args:
        embed: device whose memory the token embedding is in: the first layer's, or main memory
            for a card. The first layer's device looks tokens up in either case. None where the
            embedding is on another machine.
        layers: device of each decoder layer on the machine, its weights and its cache; at least
            one layer.
        head: device of the final norm and the output head, that of the last of `layers`; None
            where the head is on another machine.
        first_layer: the model's number of the first of `layers`.
    """

    embed: str | None
    layers: tuple[str, ...]
    head: str | None
    first_layer: int = 0

    @classmethod
    def single(cls, device: str, num_layers: int) -> DeviceMap:
        """Put everything on one device."""
        return cls(device, (device,) * num_layers, device)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that computes, each once, in the order in which a token visits them."""
        ends = () if self.head is None else (self.head,)
        return tuple(dict.fromkeys((*self.layers, *ends)))

    @property
    def numbers(self) -> range:
        """The model's numbers of the layers."""
        return range(self.first_layer, self.first_layer + len(self.layers))
