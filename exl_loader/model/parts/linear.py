"""A linear layer in any format of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...formats import read_linear
from ...formats.packed import LinearPlan

if TYPE_CHECKING:
    import torch

    from ...backends import base
    from ...backends.base import Ops
    from ...utils.table import TensorSpec
    from .part import Loading


@dataclass(eq=False)
class Linear:
    """x @ W + bias.

    Args:
        plan: what the checkpoint holds of the layer. device: where it runs.
    """

    plan: LinearPlan
    device: str
    # What `Ops.linear` of its device takes.
    weights: base.Linear = field(init=False, repr=False)

    @property
    def name(self) -> str:
        """The layer's name, such as `model.layers.0.self_attn.q_proj`."""
        return self.plan.name

    @property
    def out_features(self) -> int:
        """N, without columns that only fill up a tile."""
        return self.plan.out_features

    @property
    def has_bias(self) -> bool:
        """Whether the checkpoint has a bias for the layer."""
        return "bias" in self.plan.specs

    def specs(self) -> Iterator[TensorSpec]:
        """The tensors as they will stand on the device."""
        yield from self.plan.specs.values()

    def load(self, loading: Loading) -> None:
        """Read the layer into its resident layout.

        Raises:
            InvalidCheckpoint, UnsupportedFormat: as `formats.read_linear` and `DeviceOps.pack`.
        """
        specs = self.plan.specs
        tensors = {role: loading.views[spec.name] for role, spec in specs.items()}
        layer = read_linear(self.plan, loading.checkpoint)
        self.weights = loading.ops[self.device].pack(layer, tensors)
        loading.advance(sum(spec.nbytes for spec in specs.values()))

    def run(self, ops: Ops, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out = x @ W + bias, float32 [T, in_features] and [T, out_features]."""
        ops.linear(x, self.weights, out, scratch)

    def add(self, ops: Ops, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out += x @ W + bias."""
        ops.linear(x, self.weights, out, scratch, True)
