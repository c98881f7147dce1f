"""RMS norm and LayerNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ...utils.table import TensorSpec

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops
    from .part import Loading


@dataclass(eq=False)
class Norm:
    """(x - m) / sqrt(mean((x - m)^2) + eps) * weight + bias, m is 0 (RMS norm) or mean(x).

    Args:
        spec: of the weight, float32 [size]; or [P, size], where row r of x has weight r % P. It
            has the name of the tensor in the checkpoint.
        eps: of the config.
        kind: `rms`, or `layer` for LayerNorm.
        offset: added to the stored weight when it is read. Gemma stores weight - 1.
        factor: on the result; weight and bias are multiplied by it when they are read.
        bias: spec of the bias, float32 like the weight; None where there is none.
        weight_tensors: the tensors of the checkpoint that have the P weights, where each has its
            own; () where one tensor has all.
    """

    spec: TensorSpec
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    factor: float = 1.0
    bias: TensorSpec | None = None
    weight_tensors: tuple[str, ...] = ()
    weight: torch.Tensor = field(init=False, repr=False)
    _bias: torch.Tensor | None = field(init=False, default=None, repr=False)

    @property
    def size(self) -> int:
        """Elements of a row."""
        return self.spec.shape[-1]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors in the checkpoint."""
        weights = self.weight_tensors or (self.spec.name,)
        return weights if self.bias is None else (*weights, self.bias.name)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe weight and bias as they will be on the device."""
        yield self.spec
        if self.bias is not None:
            yield self.bias

    def load(self, loading: Loading) -> None:
        """Read weight and bias.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        self.weight = loading.views[self.spec.name]
        stored = self.weight.view(len(self.weight_tensors) or 1, -1)
        for name, target in zip(self.weight_tensors or (self.spec.name,), stored, strict=True):
            target.copy_((loading.read_floats(name).flatten() + self.offset) * self.factor)
        if self.kind == "layer":
            self.weight = self.weight.view(-1, self.size)
        if self.bias is not None:
            bias = loading.views[self.bias.name]
            bias.copy_(loading.read_floats(self.bias.name) * self.factor)
            self._bias = bias.view(-1, self.size)
        loading.advance(sum(spec.nbytes for spec in self.specs()))

    def run(self, ops: Ops, x: torch.Tensor, out: torch.Tensor) -> None:
        """Normalise the rows of x, float32 [R, size]; `out` may be x."""
        if self.kind == "rms":
            ops.rms_norm(x, self.weight, self.eps, out)
        else:
            ops.layer_norm(x, self.weight, self._bias, self.eps, out)
