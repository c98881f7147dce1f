"""What is read from the unquantised folder: the linear layers, and all that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..formats import read_linear
from ..formats.layer import LinearSpec
from ..model.builder import build_parts
from ..utils.errors import InvalidCheckpoint, UnsupportedFormat

_DAMAGED = "Download the files of this model again"


class Source:
    """An unquantised model folder, opened.

    Args:
        model_dir: the folder.

    Attributes:
        config, checkpoint, parts: as the engine sees it.

    Raises:
        UnsupportedFormat: it is quantised already.
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint: as opening a
        model raises them.
    """

    def __init__(self, model_dir: Path):
        self.config = ModelConfig.from_dir(model_dir)
        self.checkpoint = Checkpoint.open(model_dir, self.config)
        if self.checkpoint.format != "dense":
            raise UnsupportedFormat(
                f"{model_dir}",
                expected="an unquantised model",
                actual=f"a model in {self.checkpoint.format} format",
                remedy="Convert from the original float16 or bfloat16 model",
            )
        self.parts = build_parts(self.config, self.checkpoint)

    def weight(self, plan: LinearSpec) -> torch.Tensor:
        """Read a layer's weight: float32 [in_features, out_features].

        Raises:
            InvalidCheckpoint: it holds NaN or infinities.
        """
        weight = read_linear(plan, self.checkpoint).weight()
        if not torch.isfinite(weight).all():
            raise InvalidCheckpoint(
                f"{plan.source}.weight", expected="finite values",
                actual="NaN or infinite values", remedy=_DAMAGED,
            )
        return weight

    def bias(self, plan: LinearSpec) -> torch.Tensor | None:
        """Read a layer's bias: [out_features], or None."""
        if not plan.has_bias:
            return None
        bias = self.checkpoint.read(f"{plan.source}.bias")
        return bias if plan.rows is None else bias[plan.rows[0] : plan.rows[1]].clone()

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and float16 tensor of all that is not quantised."""
        yield self._float16(self.parts.embedding.spec.name)
        for norm in self.parts.norms():
            yield self._float16(norm.spec.name)
        quantised = {
            linear.name for layer in self.parts.layers for group in layer.input_groups()
            for linear in group
        }
        for layer in self.parts.layers:
            for linear in layer.linears:
                if linear.name in quantised:
                    continue
                for name in (f"{linear.spec.source}.weight", f"{linear.spec.source}.bias"):
                    if name in self.checkpoint.headers:
                        yield self._float16(name)

    def _float16(self, name: str) -> tuple[str, torch.Tensor]:
        tensor = self.checkpoint.read(name)
        half = tensor.to(torch.float16)
        if not torch.isfinite(half).all():
            raise InvalidCheckpoint(
                name, expected="finite values that float16 can hold",
                actual="others among them", remedy=_DAMAGED,
            )
        return name, half

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()
