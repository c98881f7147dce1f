"""A linear layer in any format of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ...backends import backend_of
from ...formats import read_linear
from ...formats.layer import LinearSpec
from ...utils.table import TensorSpec
from .lora import LowRank

if TYPE_CHECKING:
    import torch

    from ...backends import base
    from ...backends.base import Ops
    from .part import Loading


@dataclass(eq=False)
class Linear:
    """x @ W + bias, and the products of the adapters on it.

    Args:
        spec: what the checkpoint holds of the layer. device: where it runs.

    Attributes:
        low_ranks: the loaded adapters on the layer. A step records those that it finds.
    """

    spec: LinearSpec
    device: str
    # What `Ops.linear` of its device takes.
    weights: base.Linear = field(init=False, repr=False)
    low_ranks: list[LowRank] = field(init=False, default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """The layer's name, such as `model.layers.0.self_attn.q_proj`."""
        return self.spec.name

    @property
    def out_features(self) -> int:
        """N, without columns that only fill up a tile."""
        return self.spec.out_features

    @property
    def has_bias(self) -> bool:
        """Whether the checkpoint has a bias for the layer."""
        return self.spec.has_bias

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Return role -> spec of a tensor as it will be on the device."""
        shapes = backend_of(self.device).linear_shapes(self.spec.sizes)
        if self.has_bias:
            shapes["bias"] = ("float32", (self.out_features,))
        return {
            role: TensorSpec(f"{self.name}.{role}", "weights", dtype, shape, self.device)
            for role, (dtype, shape) in shapes.items()
        }

    @property
    def is_dense(self) -> bool:
        """Whether the device stores the weights unquantised."""
        return "weight" in self.tensors

    @property
    def stored_rows(self) -> int:
        """Rows of W as the device stores it, for which products take scratch."""
        return backend_of(self.device).stored_rows(self.spec.sizes)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the tensors as they will be on the device."""
        yield from self.tensors.values()

    def load(self, loading: Loading) -> None:
        """Read the layer into its resident layout.

        Raises:
            InvalidCheckpoint, UnsupportedFormat: as `formats.read_linear` and `DeviceOps.pack`.
        """
        views = {role: loading.views[tensor.name] for role, tensor in self.tensors.items()}
        layer = read_linear(self.spec, loading.checkpoint)
        self.weights = loading.ops[self.device].pack(layer, views)
        loading.advance(sum(tensor.nbytes for tensor in self.tensors.values()))

    def run(self, ops: Ops, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out = x @ W + bias, float32 [T, in_features] and [T, out_features]."""
        self._run(ops, x, out, scratch, add=False)

    def add(self, ops: Ops, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out += x @ W + bias."""
        self._run(ops, x, out, scratch, add=True)

    def _run(self, ops: Ops, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor,
             add: bool) -> None:
        # Adapters read `x` first, because a card that joins a gate with the product right after
        # it does not write the gate's result.
        hidden = [low_rank.project(ops, x, scratch) for low_rank in self.low_ranks]
        ops.linear(x, self.weights, out, scratch, add)
        for low_rank, h in zip(self.low_ranks, hidden, strict=True):
            low_rank.add(ops, h, out, scratch)


def run_linears(ops: Ops, x: torch.Tensor, linears: Sequence[Linear],
                outs: Sequence[torch.Tensor], scratch: torch.Tensor) -> None:
    """Run linear layers of one input: out = x @ W + bias of each.

    The adapters come last, because a card makes one launch of neighbouring products with W.
    """
    for linear, out in zip(linears, outs, strict=True):
        ops.linear(x, linear.weights, out, scratch)
    for linear, out in zip(linears, outs, strict=True):
        for low_rank in linear.low_ranks:
            low_rank.add(ops, low_rank.project(ops, x, scratch), out, scratch)
