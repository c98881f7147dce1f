"""The steps of a conversion: measure, choose bit widths, quantise layer by layer, write.

It runs through the model twice. The first pass keeps the original weights and measures how much
each bit width and group size would change the output of every linear layer. The second pass
quantises layer by layer and replaces the weights, so that every layer is calibrated on the
activations of the quantised model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.rope import MAX_POSITIONS
from ..formats.layer import LinearSpec
from ..text.tokenizer import Tokenizer
from ..utils.json_keys import read_json_object
from ..utils.progress import Progress, checked_progress, task
from ..utils.setting_values import check_integer, check_number, invalid
from .activations import Activations
from .allocation import Option, allocate
from .calibration import calibration_rows, calibration_text
from .error_feedback import PreparedHessian, quantize, relative_error
from .packing import dequantize, exl2_tensors, stored_bits
from .source import Source
from .writer import (
    ShardWriter,
    check_other_files,
    check_out_dir,
    copy_other_files,
    new_folder,
    write_config,
)

WIDTHS = (2, 3, 4, 5, 6, 8)
HEAD_WIDTHS = (6, 8)
# More rows than any text of 64 MiB has.
MAX_ROWS = 1 << 22
# Small groups store more scales, which is worth it for codes of few bits.
GROUP_SIZES = (32, 64, 128)
HEAD_GROUP_SIZE = 128
# Columns are quantised independently except for the maximum that their scales share, so an even
# sample of columns represents all of them.
MEASURED_COLUMNS = 256


@dataclass(frozen=True)
class ConvertSettings:
    """Checked settings of a conversion; see `convert`."""

    bits: float
    head_bits: int
    calibration: Path | None
    num_rows: int
    row_len: int
    as_architecture: str | None = None

    def __post_init__(self) -> None:
        check_number("bits", self.bits, 2, 16)
        if type(self.head_bits) is not int or self.head_bits not in HEAD_WIDTHS:
            raise invalid("head_bits", " or ".join(map(str, HEAD_WIDTHS)), self.head_bits)
        check_integer("calibration_rows", self.num_rows, 1, MAX_ROWS)
        check_integer("calibration_row_len", self.row_len, 16, MAX_POSITIONS)


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        out_dir: the new folder.
        layers: name of a linear layer -> the chosen option. Its `error` is the expected relative
            error of the layer's output.
        head_bits: bits of a code of the output head.
        bits_per_weight: stored bits per weight of the decoder layers, scales and tables included.
        file_bytes: size of the weight files.
        calibration_tokens: number of tokens on which the activations were measured.
        seconds: duration of the conversion.
    """

    out_dir: Path
    layers: dict[str, Option]
    head_bits: int
    bits_per_weight: float
    file_bytes: int
    calibration_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {**asdict(self), "out_dir": str(self.out_dir)}


def run(
    model_dir: Path, out_dir: Path, settings: ConvertSettings, progress: Progress | None
) -> Conversion:
    """Convert a model; see `convert`."""
    progress = checked_progress(progress)
    check_out_dir(out_dir)
    check_other_files(model_dir)
    source = Source(model_dir, settings.as_architecture)
    try:
        return _Pipeline(model_dir, source, settings, progress).run(out_dir)
    finally:
        source.close()


class _Pipeline:
    """One conversion."""

    def __init__(
        self, model_dir: Path, source: Source, settings: ConvertSettings, progress: Progress
    ):
        self.started = time.monotonic()
        self.model_dir, self.source, self.settings = model_dir, source, settings
        self.progress = progress
        self.layers = source.parts.layers
        self.dataset, text = calibration_text(settings.calibration)
        row_len = min(settings.row_len, source.config.max_position_embeddings)
        encode = Tokenizer.from_dir(model_dir).prompt_ids
        self.rows = calibration_rows(encode, text, settings.num_rows, row_len)

    def run(self, out_dir: Path) -> Conversion:
        activations = Activations(self.source, self.rows)
        chosen = self._choose(activations)
        activations.restart()
        with new_folder(out_dir) as folder:
            self._write_weights(activations, chosen, folder)
            copy_other_files(self.model_dir, folder)
            config = read_json_object(self.model_dir / "config.json")
            write_config(config, self._quantization(), folder)
            file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        stored = sum(option.stored_bits for option in chosen.values())
        return Conversion(
            out_dir=out_dir,
            layers=chosen,
            head_bits=self.settings.head_bits,
            bits_per_weight=stored / self._num_weights(),
            file_bytes=file_bytes,
            calibration_tokens=sum(map(len, self.rows)),
            seconds=time.monotonic() - self.started,
        )

    def _num_weights(self) -> int:
        specs = [
            linear.spec
            for layer in self.layers
            for group in layer.input_groups()
            for linear in group
        ]
        return sum(spec.in_features * spec.out_features for spec in specs)

    def _choose(self, activations: Activations) -> dict[str, Option]:
        """Measure every option of every layer and choose one for each."""
        measured: dict[str, list[Option]] = {}
        with task(self.progress, "measuring", len(self.layers), "layers") as advance:
            for index, layer in enumerate(self.layers):
                hessians = activations.run_layer(index, record=True)
                for group in layer.input_groups():
                    prepared = PreparedHessian(hessians.pop(group[0].name))
                    for linear in group:
                        weight = self.source.linear(linear.spec).weight()
                        measured[linear.name] = measure(weight, prepared)
                advance(1)
        return allocate(measured, self._num_weights(), self.settings.bits)

    def _write_weights(
        self, activations: Activations, chosen: Mapping[str, Option], folder: Path
    ) -> None:
        writer = ShardWriter(folder)
        for name, tensor in self.source.kept():
            writer.add({name: tensor})
        with task(self.progress, "quantising", len(self.layers) + 1, "layers") as advance:
            for index, layer in enumerate(self.layers):
                hessians = activations.run_layer(index, record=True, advance=False)
                decoded = {}
                for group in layer.input_groups():
                    prepared = PreparedHessian(hessians.pop(group[0].name))
                    for linear in group:
                        option = chosen[linear.name]
                        decoded[linear.name] = self._write_layer(
                            linear.spec, prepared, option.bits, option.group_size, writer
                        )
                activations.run_layer(index, replaced=decoded)
                advance(1)
            head = PreparedHessian(activations.head_hessian())
            bits = self.settings.head_bits
            spec = self.source.parts.head.linear.spec
            self._write_layer(spec, head, bits, HEAD_GROUP_SIZE, writer)
            advance(1)
        writer.finish()

    def _write_layer(
        self,
        spec: LinearSpec,
        hessian: PreparedHessian,
        bits: int,
        group_size: int,
        writer: ShardWriter,
    ) -> torch.Tensor:
        """Quantise a layer and write it; return the decoded weight."""
        source = self.source.linear(spec)
        layer = quantize(source.weight(), hessian, bits, group_size, source.bias)
        writer.add(exl2_tensors(spec.name, layer))
        return dequantize(layer)

    def _quantization(self) -> dict[str, Any]:
        """Return `quantization_config` for config.json."""
        return {
            "quant_method": "exl2",
            "version": __version__,
            "bits": self.settings.bits,
            "head_bits": self.settings.head_bits,
            "calibration": {
                "rows": len(self.rows),
                "length": len(self.rows[0]),
                "dataset": self.dataset,
            },
        }


def measure(weight: torch.Tensor, hessian: PreparedHessian) -> list[Option]:
    """Quantise a layer with every bit width and group size, and measure the errors.

    Args:
        weight: float32 [in_features, out_features].
        hessian: the Hessian of its inputs.

    Returns:
        An option for every bit width and group size, with the relative error of the output.
    """
    in_features, out_features = weight.shape
    count = min(MEASURED_COLUMNS, out_features)
    columns = torch.linspace(0, out_features - 1, count).round().long()
    sample = weight[:, columns]
    options = []
    for bits in WIDTHS:
        for group_size in GROUP_SIZES:
            decoded = dequantize(quantize(sample, hessian, bits, group_size))
            size = stored_bits(in_features, out_features, bits, group_size)
            error = relative_error(sample, decoded, hessian)
            options.append(Option(bits, group_size, size, error))
    return options


