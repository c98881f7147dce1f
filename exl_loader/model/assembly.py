"""The parts of a whole model, and those of a stage: what is on one device.

They are made by `builder`, before any weight is read. PyTorch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from ..backends import backend_of
from ..utils.integers import round_up
from ..utils.parallel import Task, run_tasks
from ..utils.table import DeviceMap, TensorSpec
from .decoder import DecoderLayer
from .parts.embedding import Embedding
from .parts.head import Head
from .parts.linear import Linear
from .parts.norm import Norm
from .parts.part import Loading
from .parts.positions import LearnedPositions
from .parts.rope import Rope
from .parts.vector import Vector

if TYPE_CHECKING:
    import torch

    from ..backends.base import DeviceOps
    from ..checkpoint import Checkpoint
    from ..checkpoint.config import ModelConfig


@dataclass(frozen=True)
class StageParts:
    """The parts of a model that are on one device.

    Args:
        embedding, positions: None on devices other than the first layer's, `positions` also
            where the model has none.
        head: None on devices other than the head's.
    """

    config: ModelConfig
    device: str
    embedding: Embedding | None
    positions: LearnedPositions | None
    layers: tuple[DecoderLayer, ...]
    head: Head | None

    def ropes(self) -> list[Rope]:
        """Return the RoPEs of the layers, each once."""
        ropes = dict.fromkeys(layer.attention.rope for layer in self.layers)
        return [rope for rope in ropes if rope is not None]


@dataclass(frozen=True)
class WeightCosts:
    """Bytes that a model's weights take on one kind of device, each tensor aligned.

    Args:
        embedding: the token embedding, where it has a table of its own.
        positions: the table of learned positions, 0 without one.
        layers: bytes of the first n layers, for every n from 0.
        head: final norm and output head.
        is_tied: the head serves as the embedding where both are on one device.
    """

    embedding: int
    positions: int
    layers: tuple[int, ...]
    head: int
    is_tied: bool

    def of_range(self, first: int, end: int, with_embedding: bool, has_head: bool) -> int:
        """Return the bytes of layers first..end, of the embedding before them, and of the head.

        Args:
            with_embedding: the embedding of the first layer is in the same memory.
            has_head: the head is in the same memory, which is not always that of the last layer.
        """
        needs_table = with_embedding and first == 0 and not (self.is_tied and has_head)
        start = (self.embedding if needs_table else 0) + (self.positions if first == 0 else 0)
        layers = self.layers[end] - self.layers[first]
        return start + layers + (self.head if has_head else 0)


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that are on one machine, before or after their weights are read.

    Args:
        device_map: where they are.
        embedding, head: None where they are on another machine, both or neither.
        positions: None where the model has none, and without an embedding.
        layers: the layers of `device_map`.
    """

    config: ModelConfig
    device_map: DeviceMap
    embedding: Embedding | None
    positions: LearnedPositions | None
    layers: tuple[DecoderLayer, ...]
    head: Head | None

    def stages(self) -> list[StageParts]:
        """Return each device's parts, in the order of the devices."""
        where = self.device_map
        return [
            StageParts(
                self.config,
                device,
                self.embedding if device == where.layers[0] else None,
                self.positions if device == where.layers[0] else None,
                tuple(layer for layer in self.layers if layer.device == device),
                self.head if device == where.head else None,
            )
            for device in where.devices
        ]

    def layer_places(self) -> list[tuple[str, int]]:
        """Return the device of each layer, and its place among the device's layers."""
        return [
            (stage.device, index)
            for stage in self.stages()
            for index in range(len(stage.layers))
        ]

    def cut(self, first: int, end: int, has_head: bool) -> StageParts:
        """Return layers first..end as a stage, with the embedding before layer 0.

        Only of a whole model on one device.

        Args:
            has_head: the stage has the head too.
        """
        (device,) = self.device_map.devices
        return StageParts(
            self.config,
            device,
            self.embedding if first == 0 else None,
            self.positions if first == 0 else None,
            self.layers[first:end],
            self.head if has_head else None,
        )

    def costs(self) -> WeightCosts:
        """Return what the weights cost by part, for splitting the model over several devices.

        Only of a whole model on one device, whose kind decides.
        """
        (device,) = self.device_map.devices
        embedding, head = self.ends
        step = backend_of(device).alignment_bytes

        def aligned(specs: Iterable[TensorSpec]) -> int:
            return sum(round_up(spec.nbytes, step) for spec in specs)

        layers = accumulate((aligned(layer.specs()) for layer in self.layers), initial=0)
        return WeightCosts(
            aligned([embedding.spec]),
            0 if self.positions is None else aligned(self.positions.specs()),
            tuple(layers), aligned(head.specs()), embedding.head is not None,
        )

    @property
    def ends(self) -> tuple[Embedding, Head]:
        """Embedding and head, of parts that have them."""
        assert self.embedding is not None and self.head is not None, "on another machine"
        return self.embedding, self.head

    def ropes(self) -> list[Rope]:
        """Return the RoPEs of the layers, each once."""
        return list(dict.fromkeys(rope for stage in self.stages() for rope in stage.ropes()))

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the head last."""
        for layer in self.layers:
            yield from layer.linears
        if self.head is not None:
            yield self.head.linear

    def norms(self) -> Iterator[Norm]:
        """Every norm, the final one last."""
        for layer in self.layers:
            yield from layer.norms
        if self.head is not None:
            yield self.head.norm

    def vectors(self) -> Iterator[Vector]:
        """Every vector."""
        for layer in self.layers:
            yield from layer.vectors

    def specs(self) -> list[TensorSpec]:
        """Describe all weights as they will be on their devices."""
        specs: list[TensorSpec] = []
        if self.embedding is not None:
            specs += self.embedding.specs()
        if self.positions is not None:
            specs += self.positions.specs()
        for layer in self.layers:
            specs += layer.specs()
        if self.head is not None:
            specs += self.head.specs()
        return specs

    def load(
        self,
        checkpoint: Checkpoint,
        views: Mapping[str, torch.Tensor],
        ops: Mapping[str, DeviceOps],
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Read every weight once, check it, and write it to its view.

        Args:
            checkpoint: where from.
            views: name of a spec -> its view in the weights buffer.
            ops: device -> its operations, which repack codes there.
            advance: called with the bytes that a tensor takes on its device once it is there, on
                the calling thread; all calls together sum up to the bytes of `specs()`.

        Raises:
            InvalidCheckpoint: a file shrank, or holds values that cannot be (NaN, a group table
                that does not add up, a permutation that is none).
        """
        loading = Loading(checkpoint, views, ops)
        threads = {name: operations.load_threads for name, operations in ops.items()}
        at_once: list[Task] = []
        in_turn: list[Task] = []
        for part, device in self._parts_to_load():
            tasks = at_once if threads.get(device, 1) > 1 else in_turn
            tasks.append(partial(_load, part, loading))
        run_tasks(at_once, max(threads.values()), advance)
        run_tasks(in_turn, 1, advance)
        if self.embedding is not None and self.embedding.head is not None:
            self.embedding.load(loading)

    def _parts_to_load(self) -> Iterator[tuple[_Loaded, str]]:
        """Yield the parts that have weights of their own, each with its device.

        Head and tables come first, because what ends last decides when a load on several threads
        ends, and they are larger than a layer.
        """
        if self.head is not None:
            yield self.head, self.head.linear.device
        if self.embedding is not None and self.embedding.head is None:
            yield self.embedding, self.embedding.spec.device
        if self.positions is not None:
            yield self.positions, self.positions.spec.device
        for layer in self.layers:
            yield layer, layer.device


class _Loaded(Protocol):
    def load(self, loading: Loading) -> None:
        """Read the weights."""


def _load(part: _Loaded, loading: Loading, advance: Callable[[int], None]) -> None:
    part.load(replace(loading, advance=advance))
