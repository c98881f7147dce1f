"""What all parts have in common, and what they are given to load and to run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...formats.common import require_finite

if TYPE_CHECKING:
    import torch

    from ...backends.base import Batch, DeviceOps, Ops, Shapes
    from ...cache.layout import CacheLayer
    from ...checkpoint import Checkpoint
    from ...utils.table import TensorSpec
    from .experts import ExpertTables
    from .linear import Linear
    from .norm import Norm
    from .vector import Vector


def _count_nothing(nbytes: int) -> None:
    return


@dataclass(frozen=True)
class Loading:
    """What a part needs to read its weights.

    Args:
        checkpoint: the files.
        views: name of a spec -> its view in the weights buffer.
        ops: device -> its operations, which repack codes there.
        advance: called with the bytes that a tensor takes on its device, once it is there.
    """

    checkpoint: Checkpoint
    views: Mapping[str, torch.Tensor]
    ops: Mapping[str, DeviceOps]
    advance: Callable[[int], None] = _count_nothing

    def read_floats(self, name: str) -> torch.Tensor:
        """Read a tensor of the checkpoint as float32.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        stored = self.checkpoint.read(name)
        require_finite(self.checkpoint.header(name).name, stored)
        return stored.float()


@dataclass(frozen=True)
class LayerState:
    """The state of a layer besides its weights, while it runs on a device.

    Args:
        cache: the layer's keys and values.
        expert_tables: see `Experts.tables`; None where the layer has no experts, or where its
            device does not choose experts by itself.
    """

    cache: CacheLayer
    expert_tables: ExpertTables | None = None


class StepViews:
    """The workspace of a device, cut to the T rows of a step.

    Args:
        workspace: tensors by name.
        batch: the step's sequences; T is their rows.
        hidden_size: H.

    Attributes:
        x: float32 [T, H], the hidden state that layers add to.
        h: float32 [T, H], what a norm made of `x`: the input of a block.
        scratch: uint8, for operations.
        max_rows: rows of the largest step.
    """

    def __init__(
        self, workspace: Mapping[str, torch.Tensor], batch: Batch, hidden_size: int
    ) -> None:
        self._workspace, self.batch = workspace, batch
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.rows, self.max_rows = batch.num_rows, workspace["x"].shape[0]
        self.x = self.view("x", self.rows, hidden_size)
        self.h = self.view("h", self.rows, hidden_size)
        self.scratch = workspace["scratch"]

    def view(self, name: str, *shape: int) -> torch.Tensor:
        """Return the first elements of a tensor in the shape that an operation takes.

        Layers share the tensors, whatever their widths. The same call returns the same object,
        by which a device recognises that two operations use the same tensor.
        """
        key = name, shape
        if key not in self._views:
            count = math.prod(shape)
            self._views[key] = self._workspace[name].view(-1)[:count].view(shape)
        return self._views[key]


class Block(ABC):
    """A part that is made of norms, linear layers and vectors: attention, or an MLP."""

    @abstractmethod
    def weights(self) -> Iterator[Norm | Linear | Vector]:
        """Every norm, linear layer and vector, in the order in which they are read."""

    def unread_bytes(self) -> int:
        """Return the bytes of the weights that a row does not run through."""
        return 0

    @abstractmethod
    def input_groups(self) -> list[list[Linear]]:
        """The linear layers that a converter quantises, those with the same input together."""

    @abstractmethod
    def workspace(self, rows: int) -> Shapes:
        """Return the tensors of steps of up to `rows` rows; layers share those of a name."""

    def routing_workspace(self, rows: int) -> Shapes:
        """Return the tensors in which rows are assigned to experts, shared like `workspace`."""
        return {}

    def layer_workspace(self) -> Shapes:
        """Return the tensors that every layer has for itself."""
        return {}

    @abstractmethod
    def run(self, ops: Ops, views: StepViews, state: LayerState, x: torch.Tensor,
            out: torch.Tensor, add: bool) -> None:
        """Compute the block.

        Args:
            ops: those of the device, or a `Recorder`.
            x: float32 [T, H]. out: float32 [T, H]; may be `x` unless `add`.
            add: add the result to `out` instead of overwriting it.
        """

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the weights as they will be on the device."""
        for part in self.weights():
            yield from part.specs()

    def load(self, loading: Loading) -> None:
        """Read the weights; see `assembly.ModelParts.load`."""
        for part in self.weights():
            part.load(loading)


def merged(shapes: Iterable[Shapes]) -> Shapes:
    """Join the workspaces of several parts: of tensors with the same name, the largest."""
    found: Shapes = {}
    for some in shapes:
        for name, (dtype, shape) in some.items():
            known = found.get(name)
            assert known is None or known[0] == dtype, (name, known, dtype)
            if known is None or math.prod(known[1]) < math.prod(shape):
                found[name] = dtype, shape
    return found
