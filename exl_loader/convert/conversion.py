"""The steps of a conversion: measure, choose mixes, quantise layer by layer, write.

It runs through the model twice. The first pass keeps the original weights and measures what each
way to store a block is worth (`measurement.py`). The second pass quantises layer by layer and
replaces the weights, so that every layer is calibrated on the activations of the quantised model.
After each layer of either pass the work folder has what the next layer needs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint.rope import MAX_POSITIONS
from ..formats.layer import LinearSpec
from ..model.parts.part import Block
from ..text.tokenizer import Tokenizer
from ..utils.errors import InvalidSettings
from ..utils.json_keys import read_json_object
from ..utils.progress import Heartbeat, Progress, checked_progress, task
from ..utils.setting_values import check_integer, check_number, invalid
from ..utils.table import MAIN_MEMORY
from . import measurement
from .activations import LayerRunner
from .allocation import Option, allocate
from .calibration import calibration_rows
from .error_feedback import PreparedHessian, quantize, sort_rows
from .measurement import (
    BlockMeasurement,
    Combination,
    count_parts,
    count_steps,
    mean_divergences,
    measure_block,
)
from .measurement_file import FILE_NAME, as_json, from_json, read_measurement
from .mixes import Mix
from .packing import QuantizedLinear, dequantize, exl2_tensors
from .reservation import ConversionReservation, ConversionSizes, reserve
from .roles import block_roles, layer_blocks
from .source import Source
from .work_folder import Checkpoint, WorkFolder
from .writer import (
    ShardWriter,
    check_other_files,
    check_out_dir,
    copy_other_files,
    new_folder,
    write_config,
)

MOST_BITS = 8
HEAD_MIXES = {bits: Mix((bits,), (128,)) for bits in (6, 8)}
# More rows than any text of 64 MiB has.
MAX_ROWS = 1 << 22
# Tokens on which errors of blocks are measured. Their statistics need fewer than those with which
# weights are quantised.
MEASURED_TOKENS = 8192
# Tokens on which blocks are compared with themselves quantised, and predictions with those with a
# block quantised: beginnings of texts, because several short ones say more than a long one.
PROBE_TOKENS = 1024
PROBE_LEN = 256
# Name of the hidden states of the source, without anything quantised.
_SOURCE = "source"


@dataclass(frozen=True)
class ConvertSettings:
    """Checked settings of a conversion; see `convert`."""

    bits: float
    head_bits: int
    calibration: Path | None
    num_rows: int
    row_len: int
    measurement: Path | None = None
    as_architecture: str | None = None
    device: str = MAIN_MEMORY

    def __post_init__(self) -> None:
        check_number("bits", self.bits, 2, MOST_BITS)
        if type(self.head_bits) is not int or self.head_bits not in HEAD_MIXES:
            raise invalid("head_bits", " or ".join(map(str, HEAD_MIXES)), self.head_bits)
        check_integer("calibration_rows", self.num_rows, 1, MAX_ROWS)
        check_integer("calibration_row_len", self.row_len, 16, MAX_POSITIONS)


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        out_dir: the new folder.
        layers: name of a linear layer -> the chosen mix.
        head_bits: bits of a code of the output head.
        bits_per_weight: stored bits per weight of the decoder layers, scales and tables included.
        file_bytes: size of the weight files.
        calibration_tokens: number of tokens on which the weights were quantised.
        seconds: duration, of a continued conversion since it was continued.
    """

    out_dir: Path
    layers: dict[str, Mix]
    head_bits: int
    bits_per_weight: float
    file_bytes: int
    calibration_tokens: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        layers = {name: mix.as_dict() for name, mix in self.layers.items()}
        return {**vars(self), "out_dir": str(self.out_dir), "layers": layers}


def run(
    model_dir: Path, out_dir: Path, settings: ConvertSettings, progress: Progress | None,
    announce: Callable[[ConversionReservation], None] | None,
) -> Conversion:
    """Convert a model; see `convert`."""
    check_out_dir(out_dir)
    source = Source(model_dir, settings.as_architecture)
    try:
        check_other_files(model_dir)
        with Heartbeat(checked_progress(progress)) as heartbeat:
            pipeline = _Pipeline(model_dir, source, settings, heartbeat)
            reservation = pipeline.reserve(out_dir)
            if announce is not None:
                announce(reservation)
            reservation.check()
            pipeline.check()
            return pipeline.run(out_dir)
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
        self.blocks: dict[str, Block] = {}
        for index, layer in enumerate(self.layers):
            self.blocks |= layer_blocks(index, layer)
        # Every linear layer that is quantised, but for the head.
        self.specs: dict[str, LinearSpec] = {
            linear.name: linear.spec
            for block in self.blocks.values()
            for linears in block_roles(block).values()
            for linear in linears
        }
        self.num_weights = sum(
            spec.in_features * spec.out_features for spec in self.specs.values()
        )
        row_len = min(settings.row_len, source.config.max_position_embeddings)
        with task(progress, "reading calibration text", None, ""):
            self.dataset, self.rows = calibration_rows(
                Tokenizer.from_dir(model_dir), settings.calibration, settings.num_rows, row_len
            )
        self.measured_rows = self.rows[: max(1, MEASURED_TOKENS // len(self.rows[0]))]
        self.probe_len = min(PROBE_LEN, len(self.rows[0]))
        self.probe_rows = min(len(self.measured_rows), PROBE_TOKENS // self.probe_len)
        self.measured: dict[str, BlockMeasurement] | None = None
        if settings.measurement is not None:
            self.measured = read_measurement(settings.measurement, self.blocks)

    def reserve(self, out_dir: Path) -> ConversionReservation:
        """Compute the memory and disk space that the conversion takes."""
        sizes = ConversionSizes(
            parts=self.source.parts_on(self.settings.device),
            device=self.settings.device,
            rows=len(self.rows),
            measured_rows=len(self.measured_rows),
            probe_tokens=self.probe_rows * self.probe_len,
            row_len=len(self.rows[0]),
            bits=self.settings.bits,
            head=HEAD_MIXES[self.settings.head_bits],
            has_measurement=self.measured is not None,
        )
        return reserve(sizes, out_dir)

    def check(self) -> None:
        """Check before hours of work that the bits suffice and that every weight can be used.

        Raises:
            InvalidSettings: the smallest mixes take more bits.
            InvalidCheckpoint: a value is NaN, infinite, or too large for float16.
        """
        least = self._least_bits()
        if least > self.settings.bits:
            raise InvalidSettings(
                "bits", expected=f"at least {least:.2f}, what this model takes at its smallest",
                actual=self.settings.bits, remedy="Ask for more bits",
            )
        _, head = self.source.parts.ends
        specs = [*self.specs.values(), head.linear.spec]
        with task(self.progress, "checking weights", len(specs), "matrices") as advance:
            for spec in specs:
                self.source.linear(spec).weight()
                advance(1)
            for _ in self.source.kept():
                pass

    def _least_bits(self) -> float:
        """Return the stored bits per weight with the smallest mix of everything."""
        if self.measured is not None:
            sizes = [
                min(one.size for one in block.combinations) for block in self.measured.values()
            ]
        else:
            sizes = [measurement.least_bits(spec) for spec in self.specs.values()]
        return sum(sizes) / self.num_weights

    def run(self, out_dir: Path) -> Conversion:
        """Convert, and leave the work folder to an interruption."""
        work = WorkFolder(out_dir)
        with _threads(work.begin(self._job(), torch.get_num_threads())):
            return self._convert(work, out_dir)

    def _convert(self, work: WorkFolder, out_dir: Path) -> Conversion:
        runner = LayerRunner(
            self.source, len(self.rows[0]), self.progress, self.settings.device
        )
        measured = self.measured or self._measure(work, runner)
        with task(self.progress, "choosing", None, ""):
            chosen = self._choose(measured)
        self._quantize(work, runner, chosen)
        with new_folder(out_dir) as folder:
            self._write_weights(work, folder)
            copy_other_files(self.model_dir, folder)
            config = read_json_object(self.model_dir / "config.json")
            write_config(config, self._quantization(), folder)
            (folder / FILE_NAME).write_text(
                json.dumps(as_json(measured), indent=1) + "\n", encoding="utf-8"
            )
            file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        work.remove()
        stored = sum(
            mix.stored_bits(self.specs[name].in_features, self.specs[name].out_features)
            for name, mix in chosen.items()
        )
        return Conversion(
            out_dir=out_dir,
            layers=chosen,
            head_bits=self.settings.head_bits,
            bits_per_weight=stored / self.num_weights,
            file_bytes=file_bytes,
            calibration_tokens=sum(map(len, self.rows)),
            seconds=time.monotonic() - self.started,
        )

    def _job(self) -> dict[str, Any]:
        """Return what decides the result, for the work folder."""
        settings = self.settings
        files = sorted(self.model_dir.glob("*.safetensors"))
        reused = settings.measurement
        return {
            "version": __version__,
            "bits": settings.bits,
            "head_bits": settings.head_bits,
            "calibration": {
                "text": self.dataset,
                "rows": len(self.rows),
                "length": len(self.rows[0]),
                "digest": _digest(json.dumps(self.rows).encode()),
            },
            "as_architecture": settings.as_architecture,
            "device": settings.device,
            "measurement": None if reused is None else _digest(reused.read_bytes()),
            "config.json": _digest((self.model_dir / "config.json").read_bytes()),
            "weight files": [
                [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files
            ],
        }

    def _measure(self, work: WorkFolder, runner: LayerRunner) -> dict[str, BlockMeasurement]:
        """Measure all blocks, or the ones that an interrupted conversion has not measured."""
        known = work.path / FILE_NAME
        if known.exists():
            return read_measurement(known, self.blocks)
        begun = work.load("measuring")
        if begun is None:
            states = {_SOURCE: runner.embed(self.measured_rows)}
            begun = Checkpoint(0, states, {"errors": {}, "measured": {}})
        # Hidden states by the key of the block that was quantised for them; _SOURCE for none.
        states, errors = begun.tensors, begun.values["errors"]
        own_blocks = list(self.blocks)[: 2 * begun.next_layer]
        measured: dict[str, Sequence[Combination]] = {
            key: block.combinations for key, block in from_json(
                begun.values["measured"], {key: self.blocks[key] for key in own_blocks},
                str(work.path),
            ).items()
        } if own_blocks else {}
        steps = [
            2 + sum(map(count_steps, layer_blocks(index, layer).values()))
            for index, layer in enumerate(self.layers)
        ]
        left = sum(steps[begun.next_layer :])
        with task(self.progress, "measuring", left, "steps") as advance:
            runner.tick = partial(advance, 0)
            for index in range(begun.next_layer, len(self.layers)):
                with self._layer_task(index):
                    self._measure_layer(runner, index, states, errors, measured, advance)
                saved = {"errors": errors, "measured": as_json({
                    key: BlockMeasurement(ways, None) for key, ways in measured.items()
                })}
                work.save("measuring", Checkpoint(index + 1, states, saved))
        source = self._probe(states.pop(_SOURCE))
        with task(self.progress, "comparing predictions", count_parts(source), "parts") as advance:
            runner.load_head()
            divergences = mean_divergences(runner, source, states, advance)
        found = {
            key: BlockMeasurement(ways, divergences[key] / errors[key])
            for key, ways in measured.items()
        }
        work.write_json(FILE_NAME, as_json(found))
        return found

    def _measure_layer(
        self, runner: LayerRunner, index: int, states: dict[str, torch.Tensor],
        errors: dict[str, float], measured: dict[str, Sequence[Combination]],
        advance: Callable[[int], None],
    ) -> None:
        """Measure the blocks of a layer, and run all hidden states through it.

        Args:
            states: hidden states before the layer, which become those after it; those with a
                block of this layer quantised are added.
            errors: key -> error of the block as it was quantised for its hidden states; added to.
            measured: key -> combinations; added to.
        """
        loaded = runner.load(index)
        inputs_of_layer = states[_SOURCE]
        outputs = torch.empty_like(inputs_of_layer)
        hessians, inputs = runner.record(loaded, inputs_of_layer, self.probe_rows, outputs)
        advance(1)
        prepared: dict[str, PreparedHessian] = {}
        for group in loaded.layer.input_groups():
            shared = PreparedHessian(hessians.pop(group[0].name))
            prepared |= {linear.name: shared for linear in group}
        begun = [key for key in states if key != _SOURCE]
        blocks = layer_blocks(index, loaded.layer)
        for (key, block), x in zip(blocks.items(), inputs.values(), strict=True):
            measured[key], probe, errors[key] = measure_block(
                runner, self.source, loaded, block, prepared, self._probe(x), advance
            )
            loaded.replace(probe)
            states[key] = self._probe(inputs_of_layer)
            runner.run(loaded, states[key])
            loaded.restore(probe)
        for key in begun:
            runner.run(loaded, states[key])
        states[_SOURCE] = outputs
        advance(1)

    def _probe(self, states: torch.Tensor) -> torch.Tensor:
        """Return a copy of the part of hidden states that blocks are compared on."""
        return states[: self.probe_rows, : self.probe_len].clone()

    def _choose(self, measured: Mapping[str, BlockMeasurement]) -> dict[str, Mix]:
        """Choose a mix for every linear layer."""
        options = [
            [Option(one.size, one.error * factor) for one in block.combinations]
            for block, factor in zip(measured.values(), _factors(measured.values()), strict=True)
        ]
        indexes = allocate(options, int(self.settings.bits * self.num_weights))
        found: dict[str, Mix] = {}
        for (key, block), index in zip(measured.items(), indexes, strict=True):
            mixes = block.combinations[index].mixes
            for role, linears in block_roles(self.blocks[key]).items():
                found |= {linear.name: mixes[role] for linear in linears}
        return found

    def _quantize(
        self, work: WorkFolder, runner: LayerRunner, chosen: Mapping[str, Mix]
    ) -> None:
        """Quantise all layers and the head, or those that an interrupted conversion has not."""
        begun = work.load("quantising")
        if begun is None:
            begun = Checkpoint(0, {_SOURCE: runner.embed(self.rows)}, {})
        count = len(self.layers)
        if begun.next_layer > count:
            return
        states = begun.tensors[_SOURCE]
        steps = [
            2 + sum(map(len, layer.input_groups())) for layer in self.layers[begun.next_layer :]
        ]
        with task(self.progress, "quantising", sum(steps) + 1, "steps") as advance:
            runner.tick = partial(advance, 0)
            for index in range(begun.next_layer, count):
                with self._layer_task(index):
                    tensors = self._quantize_layer(runner, index, states, chosen, advance)
                work.save_layer(index, tensors)
                work.save("quantising", Checkpoint(index + 1, {_SOURCE: states}, {}))
            head = PreparedHessian(runner.head_hessian(states))
            _, end = self.source.parts.ends
            spec = end.linear.spec
            mix = HEAD_MIXES[self.settings.head_bits]
            own = self._quantize_linear(runner, spec, head, mix)
            work.save_layer(count, exl2_tensors(spec.name, own.in_main_memory()))
            work.save("quantising", Checkpoint(count + 1, {}, {}))
            advance(1)

    def _quantize_layer(
        self, runner: LayerRunner, index: int, states: torch.Tensor, chosen: Mapping[str, Mix],
        advance: Callable[[int], None],
    ) -> dict[str, torch.Tensor]:
        """Quantise a layer, run hidden states through it, and return its tensors for the file."""
        loaded = runner.load(index)
        hessians, _ = runner.record(loaded, states)
        advance(1)
        tensors: dict[str, torch.Tensor] = {}
        decoded = {}
        for group in loaded.layer.input_groups():
            prepared = PreparedHessian(hessians.pop(group[0].name))
            for linear in group:
                mix = chosen[linear.name]
                own = self._quantize_linear(runner, linear.spec, prepared, mix)
                tensors |= exl2_tensors(linear.name, own.in_main_memory())
                decoded[linear.name] = dequantize(own)
                advance(1)
        loaded.replace(decoded)
        runner.run(loaded, states)
        advance(1)
        return tensors

    def _quantize_linear(
        self, runner: LayerRunner, spec: LinearSpec, hessian: PreparedHessian, mix: Mix
    ) -> QuantizedLinear:
        layer = self.source.linear(spec)
        rows = sort_rows(layer.weight(), hessian)
        return quantize(
            runner.ops, rows, spec.out_features, hessian, mix, layer.bias, runner.tick
        )

    def _layer_task(self, index: int) -> AbstractContextManager[object]:
        """Show that a layer is being worked on."""
        return task(self.progress, f"layer {index + 1} of {len(self.layers)}", None, "")

    def _write_weights(self, work: WorkFolder, folder: Path) -> None:
        writer = ShardWriter(folder)
        for name, tensor in self.source.kept():
            writer.add({name: tensor})
        with task(self.progress, "writing", len(self.layers) + 1, "layers") as advance:
            for index in range(len(self.layers) + 1):
                tensors = work.load_layer(index)
                for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
                    writer.add({k: t for k, t in tensors.items() if k.rpartition(".")[0] == name})
                advance(1)
        writer.finish()

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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use a number of threads, on which the rounding of its sums depends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _factors(measured: Iterable[BlockMeasurement]) -> list[float]:
    """Return what an error of each block is worth: all the same where not all were measured."""
    divergences = [block.divergence for block in measured]
    known = [divergence for divergence in divergences if divergence is not None]
    return known if len(known) == len(divergences) else [1.0] * len(divergences)


def _digest(data: bytes) -> str:
    """Return 16 digits that other data would not have."""
    return hashlib.sha256(data).hexdigest()[:16]
