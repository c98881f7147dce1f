"""The memory and disk space that a conversion takes, computed before it starts. No PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..backends import backend_of
from ..cache.layout import CacheType, cache_specs, pages_for
from ..formats.layer import LinearSpec
from ..model.assembly import ModelParts
from ..model.decoder import DecoderLayer
from ..model.parts.linear import Linear
from ..model.step import workspace_specs
from ..utils.byte_counts import amount
from ..utils.errors import InsufficientMemory, InvalidSettings
from ..utils.table import MAIN_MEMORY, TensorSpec
from .mixes import Mix

# Tokens of a step: enough to spread the reading of weights over, few enough for the workspace.
STEP_TOKENS = 2048
# Rows of logits that are computed at a time.
LOGITS_ROWS = 128
# Exact keys and values, so that a layer's result is that of its weights alone.
CACHE_TYPE = CacheType.parse("fp32")

# Bytes of a matrix while it is quantised, per weight: kept in float32 for the next mix, codes, and
# decoded values with their scales in float32, then in float16 in both orders of rows.
_QUANTIZED_BYTES = 4 + 1 + 4 + 4 + 2 + 2 + 2
# Bytes of an input's Hessian, per element: summed, and prepared.
_HESSIAN_BYTES = 4 + 4
# Bytes per element of a Hessian while it is prepared, in float64: itself, with damping, its factor,
# the factor in the order of rows, and products of its inversion.
_PREPARING_BYTES = 5 * 8
# Share of the embedding in the output that is worth a line.
_LARGE_SHARE = 0.2
# float32 [rows, vocab_size]: logits and what a divergence is computed with.
_COMPARED_LOGITS = 6


def rows_at_once(row_len: int) -> int:
    """Return the texts of a step."""
    return max(1, STEP_TOKENS // row_len)


def step_specs(parts: ModelParts, row_len: int) -> list[TensorSpec]:
    """List the workspace of a step of `rows_at_once` texts of row_len tokens."""
    rows = rows_at_once(row_len)
    return workspace_specs(
        parts.stages(), ctx_size=row_len, cache_type=CACHE_TYPE, chunk_size=rows * row_len,
        max_batch_size=rows, logits_rows=LOGITS_ROWS, has_open_pages=False,
    )


def step_cache_specs(parts: ModelParts, row_len: int) -> list[TensorSpec]:
    """List the cache of every layer for a step; only that of one layer is allocated at a time."""
    return cache_specs(parts.config, rows_at_once(row_len) * pages_for(row_len), CACHE_TYPE)


@dataclass(frozen=True)
class ConversionSizes:
    """What a conversion is of.

    Args:
        parts: the model's.
        rows: calibration texts. measured_rows: those that blocks are measured on.
        probe_tokens: tokens on which blocks and predictions are compared.
        row_len: tokens of a text.
        bits: of a weight in the layers. head: mix of the head.
        has_measurement: nothing is measured.
    """

    parts: ModelParts
    rows: int
    measured_rows: int
    probe_tokens: int
    row_len: int
    bits: float
    head: Mix
    has_measurement: bool
    device: str = MAIN_MEMORY


@dataclass(frozen=True)
class ConversionReservation:
    """Bytes of a conversion.

    Args:
        memory: part -> bytes in main memory.
        device: that runs the layers.
        device_memory: part -> bytes on it; empty where it is main memory.
        work: bytes of the work folder at its largest.
        output: part -> bytes of the folder that is made.
        num_weights: of the source; a matrix that is embedding and head counts once.
        free_memory_bytes, free_device_bytes, free_disk_bytes: what there is.
    """

    memory: dict[str, int]
    device: str
    device_memory: dict[str, int]
    work: int
    output: dict[str, int]
    num_weights: int
    free_memory_bytes: int
    free_device_bytes: int
    free_disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Bytes of main memory."""
        return sum(self.memory.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's memory."""
        return sum(self.device_memory.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk at the end, when the output is written and the work folder is there."""
        return self.work + sum(self.output.values())

    def check(self) -> None:
        """Refuse a conversion that does not fit.

        Raises:
            InsufficientMemory: there is too little memory.
            InvalidSettings: there is too little room on the disk.
        """
        if self.memory_bytes > self.free_memory_bytes:
            raise InsufficientMemory(
                "memory for the conversion", expected=f"{amount(self.memory_bytes)} free",
                actual=amount(self.free_memory_bytes),
                remedy="Give fewer or shorter calibration rows, or end other programs",
            )
        if self.device_bytes > self.free_device_bytes:
            raise InsufficientMemory(
                f"memory of {self.device} for the conversion",
                expected=f"{amount(self.device_bytes)} free",
                actual=amount(self.free_device_bytes),
                remedy="End other programs that use it, or convert without --device",
            )
        if self.disk_bytes > self.free_disk_bytes:
            raise InvalidSettings(
                "disk space for the conversion", expected=f"{amount(self.disk_bytes)} free",
                actual=amount(self.free_disk_bytes), remedy="Choose a folder on another disk",
            )

    def __str__(self) -> str:
        total = sum(self.output.values())
        lines = [
            f"memory: {amount(self.memory_bytes)} of {amount(self.free_memory_bytes)} that are "
            f"free ({_listed(self.memory)})",
            f"disk: {amount(self.disk_bytes)} of {amount(self.free_disk_bytes)} that are free, "
            f"{amount(self.work)} of them for the time of the conversion",
            f"output: {amount(total)} ({_listed(self.output)})",
        ]
        if self.device_memory:
            lines.insert(1, (
                f"{self.device}: {amount(self.device_bytes)} of {amount(self.free_device_bytes)} "
                f"that are free ({_listed(self.device_memory)})"
            ))
        share = self.output["embedding"] / total
        if share > _LARGE_SHARE:
            lines.append(
                f"The embedding stays in float16 in this format: {share:.0%} of the output, which "
                f"has {8 * total / self.num_weights:.1f} bits per weight of the source altogether."
            )
        return "\n".join(lines)


def reserve(sizes: ConversionSizes, out_dir: Path) -> ConversionReservation:
    """Compute the bytes of a conversion.

    Args:
        sizes: of the model and its calibration.
        out_dir: the folder that will be made.
    """
    parts, config = sizes.parts, sizes.parts.config
    token_bytes = config.hidden_size * 4
    row_bytes = sizes.row_len * token_bytes
    quantising = sizes.rows * row_bytes
    measuring = beside = compared = products = 0
    if not sizes.has_measurement:
        blocks = 2 * len(parts.layers)
        # The inputs of both blocks, and outputs and differences of one.
        compared = (blocks + 5) * sizes.probe_tokens
        measuring = sizes.measured_rows * row_bytes + compared * token_bytes
        # A layer's outputs, and the products that are computed once.
        products = sizes.probe_tokens * max(map(_first_products, parts.layers)) * 4
        beside = sizes.measured_rows * row_bytes + products
    states = max(quantising, measuring)
    layer = max(map(_layer_bytes, parts.layers))
    cache = sum(spec.nbytes for spec in step_cache_specs(parts, sizes.row_len))
    table, end = parts.ends
    head = end.linear.spec
    matrices = [linear.spec for one in parts.layers for linear in _quantized(one)]
    largest = max(spec.in_features * spec.out_features for spec in [*matrices, head])
    # A file is written from a copy.
    in_main_memory = {"hidden states": 2 * states + beside}
    on_device = {
        "a layer": layer,
        "Hessians": max(map(_hessian_bytes, parts.layers)),
        "workspace": sum(spec.nbytes for spec in step_specs(parts, sizes.row_len))
        + cache // len(parts.layers) + _COMPARED_LOGITS * LOGITS_ROWS * config.vocab_size * 4,
        "a matrix that is quantised": _QUANTIZED_BYTES * largest,
    }
    overhead = "PyTorch and kernels"
    memory = {overhead: _overhead_bytes(MAIN_MEMORY), **in_main_memory, **on_device}
    device_memory = {}
    if sizes.device != MAIN_MEMORY:
        device_memory = {
            overhead: _overhead_bytes(sizes.device),
            "compared texts": compared * token_bytes + products,
            **on_device,
        }
        # A matrix is read in main memory.
        matrix = "a matrix that is quantised"
        memory = {
            overhead: memory[overhead], **in_main_memory, matrix: on_device[matrix],
        }
    num_weights = sum(spec.in_features * spec.out_features for spec in matrices)
    layers = int(sizes.bits * num_weights) // 8
    head_bytes = sizes.head.stored_bits(head.in_features, head.out_features) // 8
    output = {
        "layers": layers,
        "head": head_bytes,
        # In float16, also where head and embedding are one tensor of the source.
        "embedding": 2 * config.vocab_size * config.hidden_size,
    }
    # Hidden states are written beside those of the layer before, which they replace.
    work = 2 * states + layers + head_bytes
    free_memory, free_on_device = (
        backend_of(device).capacity(device).free_bytes for device in (MAIN_MEMORY, sizes.device)
    )
    folder = next(path for path in out_dir.absolute().parents if path.is_dir())
    embedding = config.vocab_size * config.hidden_size
    untied = 0 if head.source == table.spec.name.removesuffix(".weight") else embedding
    return ConversionReservation(
        memory, sizes.device, device_memory, work, output, num_weights + embedding + untied,
        free_memory, free_on_device, shutil.disk_usage(folder).free,
    )


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in parts.items() if nbytes)


def _overhead_bytes(device: str) -> int:
    nbytes, _ = backend_of(device).overhead(device)
    return nbytes


def _quantized(layer: DecoderLayer) -> list[Linear]:
    return [linear for group in layer.input_groups() for linear in group]


def _layer_bytes(layer: DecoderLayer) -> int:
    """Return the bytes of a layer's weights and of those that replace them, in float16."""
    own = sum(spec.nbytes for spec in layer.specs())
    return own + sum(2 * _weights(linear.spec) for linear in _quantized(layer))


def _first_products(layer: DecoderLayer) -> int:
    """Return the most elements of a token in products of a block's input."""
    groups = layer.attention.input_groups()[0], layer.mlp.input_groups()[0]
    return max(sum(linear.spec.out_features for linear in group) for group in groups)


def _weights(spec: LinearSpec) -> int:
    return spec.in_features * spec.out_features


def _hessian_bytes(layer: DecoderLayer) -> int:
    sizes = [group[0].spec.in_features ** 2 for group in layer.input_groups()]
    return _HESSIAN_BYTES * sum(sizes) + _PREPARING_BYTES * max(sizes)
