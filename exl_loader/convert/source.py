"""Read the unquantised folder: the linear layers, and the tensors that are not quantised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..formats import read_linear
from ..formats.layer import DenseLayer, LinearSpec, QuantizedLayer
from ..model.assembly import ModelParts
from ..model.builder import build_parts
from ..utils.errors import InvalidCheckpoint, UnsupportedFormat
from ..utils.table import MAIN_MEMORY, DeviceMap

_DAMAGED = "Download the files of this model again"


class Source:
    """An unquantised model folder, opened.

    Args:
        model_dir: the folder.
        as_architecture: see `LoadOptions`.

    Attributes:
        config, checkpoint, parts: as the engine sees it.

    Raises:
        UnsupportedFormat: it is quantised already.
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint: as opening a
        model raises them.
        InvalidSettings: `as_architecture` does not fit the folder.
    """

    def __init__(self, model_dir: Path, as_architecture: str | None = None):
        self.config = ModelConfig.from_dir(model_dir, as_architecture)
        self.checkpoint = Checkpoint.open(model_dir, self.config)
        if self.checkpoint.format != "dense":
            raise UnsupportedFormat(
                f"{model_dir}",
                expected="an unquantised model",
                actual=f"a model in {self.checkpoint.format} format",
                remedy="Convert from the original float16 or bfloat16 model",
            )
        self.parts = build_parts(self.config, self.checkpoint)
        self._parts = {MAIN_MEMORY: self.parts}

    def parts_on(self, device: str) -> ModelParts:
        """Return the model's parts with all of them on a device."""
        if device not in self._parts:
            devices = DeviceMap.single(device, self.config.num_hidden_layers)
            self._parts[device] = build_parts(self.config, self.checkpoint, devices)
        return self._parts[device]

    def linear(self, spec: LinearSpec) -> DenseLayer | QuantizedLayer:
        """Open a layer: `weight()` reads float32 [in_features, out_features], `bias` is read.

        Raises:
            InvalidCheckpoint: a value is NaN or infinite.
        """
        return read_linear(spec, self.checkpoint)

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor of everything that is not quantised; float16 but for vectors."""
        embedding, _ = self.parts.ends
        yield self._float16(embedding.spec.name)
        if self.parts.positions is not None:
            yield self._float16(self.parts.positions.spec.name)
        for norm in self.parts.norms():
            for name in norm.tensors:
                yield self._float16(name)
        for vector in self.parts.vectors():
            # A few numbers, which stay as they are: the choice of experts depends on all bits.
            yield vector.spec.name, self.checkpoint.read(vector.spec.name)
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
