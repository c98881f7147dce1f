"""The tensors of a step: every tensor that a forward pass touches, planned before loading.

A step has at most `chunk_size` rows of at most `max_batch_size` sequences, and its logits at
most `logits_rows` rows. Steps of fewer rows use the beginning of the same tensors, so that no
response, however long, needs a byte more than the first token did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..backends import backend_of
from ..backends.base import StepSizes
from ..cache.layout import CacheType, key_sample_shapes, open_page_shapes, pages_for
from ..utils.table import DTYPE_BYTES, TensorSpec
from .parts.part import merged

if TYPE_CHECKING:
    from ..backends.base import Shapes
    from ..checkpoint.config import ModelConfig
    from .assembly import StageParts
    from .decoder import DecoderLayer

# Prefill rows of a step: enough to spread unpacking of the weights over, few enough that a
# stop request or a progress bar need not wait for long.
DEFAULT_CHUNK_SIZE = 256
# Texts that run at once: what a web UI with a few users needs, for a few ten KiB each.
DEFAULT_MAX_BATCH_SIZE = 8
# Most rows of logits at a time where a caller wants all of them (128 KiB a row and more).
MOST_LOGITS_ROWS = 32
# The memory that the blocks of a layer share, one after the other, and then the head.
BLOCKS = "blocks"

# What the CPU writes for a step. Neighbours in the workspace, so that one copy brings all of it
# to a device.
INPUTS = (
    "ids", "positions", "q_start", "past_len", "page_table", "open_pages", "inv_freq",
    "inv_freq_1", "head_rows",
)


def workspace_specs(
    stages: Iterable[StageParts],
    *,
    ctx_size: int,
    cache_type: CacheType,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    logits_rows: int | None = None,
    has_adapters: bool = False,
    has_open_pages: bool = True,
) -> list[TensorSpec]:
    """List the workspace's tensors on every device.

    Args:
        stages: each device's parts.
        ctx_size: tokens of the longest sequence, which bounds a page table's row.
        cache_type: bits of keys and values; the attention scratch depends on it.
        chunk_size: most rows of one step.
        max_batch_size: most sequences of one step.
        logits_rows: most rows of logits of one step; at least `max_batch_size` are made. None
            for as many as the memory of the blocks holds, at most 32 and `chunk_size`.
        has_adapters: there is room for adapters, which are unquantised beside every layer.
        has_open_pages: each sequence of a step has an open page in a quantised cache.
    """
    specs: list[TensorSpec] = []
    for stage in stages:
        phases = _block_phases(stage, chunk_size)
        most = _logits_rows(stage, phases, chunk_size) if logits_rows is None else logits_rows
        sizes = _step_sizes(
            stage, chunk_size, max(most, max_batch_size), max_batch_size, ctx_size, cache_type,
            has_adapters,
        )
        if stage.head is not None:
            phases["head"] = stage.head.workspace(sizes.logits_rows)
        specs += [
            TensorSpec(name, "workspace", dtype, shape, stage.device)
            for name, (dtype, shape) in _stage_tensors(stage, sizes).items()
        ]
        beside = beside_cache_shapes(
            stage.config, len(stage.layers), max_batch_size if has_open_pages else 0, cache_type
        )
        specs += [
            TensorSpec(name, "workspace", dtype, shape, stage.device)
            for name, (dtype, shape) in beside.items()
        ]
        specs += [
            TensorSpec(name, "workspace", dtype, shape, stage.device, phase=(BLOCKS, phase))
            for phase, shapes in phases.items()
            for name, (dtype, shape) in shapes.items()
        ]
    return specs


def beside_cache_shapes(
    config: ModelConfig, num_layers: int, num_open_pages: int, cache_type: CacheType
) -> Shapes:
    """Return what the workspace has of each layer's cache: its open pages, and what a sample finds.

    Args:
        config: gives num_key_value_heads and head_dim.
        num_layers: decoder layers on the device.
        num_open_pages: sequences that may run at once; 0 without open pages.
        cache_type: how keys and values are stored.
    """
    shapes = key_sample_shapes(config, num_layers, cache_type)
    if num_open_pages:
        shapes |= open_page_shapes(config, num_layers, num_open_pages, cache_type)
    return shapes


def most_rows(chunk_size: int, max_batch_size: int, logits_rows: int = 0) -> int:
    """Return the most rows of any product of a step; arguments as those of `workspace_specs`."""
    return max(chunk_size, logits_rows, max_batch_size)


def _kinds(stage: StageParts) -> list[DecoderLayer]:
    """Return one layer of each kind, because plans ask for many workspaces."""
    return list({layer.workspace_key: layer for layer in stage.layers}.values())


def _block_phases(stage: StageParts, rows: int) -> dict[str, Shapes]:
    """Return block -> the tensors that the layers share while it runs."""
    of_kinds = [layer.phases(rows) for layer in _kinds(stage)]
    return {name: merged(phases[name] for phases in of_kinds) for name in of_kinds[0]}


def _logits_rows(stage: StageParts, phases: Mapping[str, Shapes], chunk_size: int) -> int:
    """Return the rows of logits that fit into the memory of the blocks."""
    if stage.head is None:
        return 0
    blocks = max(_nbytes(shapes) for shapes in phases.values())
    return min(MOST_LOGITS_ROWS, chunk_size, blocks // _nbytes(stage.head.workspace(1)))


def _nbytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in shapes.values())


def _stage_tensors(stage: StageParts, sizes: StepSizes) -> Shapes:
    """Return the tensors of one device that have memory of their own."""
    rows, sequences = sizes.rows, sizes.max_batch_size
    tensors: Shapes = {
        "ids": ("int32", (rows,)),
        "positions": ("int32", (rows,)),
        "q_start": ("int32", (sequences + 1,)),
        "past_len": ("int32", (sequences,)),
        "page_table": ("int32", (sequences, pages_for(sizes.ctx_size))),
        "open_pages": ("int32", (sequences,)),
        **merged(rope.inputs(sequences) for rope in stage.ropes()),
    }
    if stage.head is not None:
        tensors |= stage.head.inputs(sizes.logits_rows)
    kinds = _kinds(stage)
    tensors |= merged(layer.workspace(rows) for layer in kinds)
    backend = backend_of(stage.device)
    tensors |= backend.workspace_shapes(sizes)
    # A room for each layer, by its place among the device's layers.
    for name, (dtype, shape) in merged(layer.layer_workspace() for layer in kinds).items():
        tensors[name] = dtype, (len(stage.layers), *shape)
    tensors["scratch"] = ("uint8", (backend.scratch_bytes(sizes),))
    return tensors


def _step_sizes(
    stage: StageParts, rows: int, logits_rows: int, max_batch_size: int, ctx_size: int,
    cache_type: CacheType, has_adapters: bool,
) -> StepSizes:
    """Return what the largest step of a device is; arguments as those of `workspace_specs`."""
    config = stage.config
    widths = frozenset[tuple[int, bool]]().union(*(layer.widths for layer in stage.layers))
    products = {(rows, *width) for width in widths}
    if stage.head is not None:
        products.add((logits_rows, config.hidden_size, stage.head.linear.is_dense))
    return StepSizes(
        rows=rows,
        logits_rows=logits_rows if stage.head is not None else 0,
        max_batch_size=max_batch_size,
        ctx_size=ctx_size,
        cache_type=cache_type,
        attention=replace(stage.layers[0].attention.shape, sliding_window=0),
        products=frozenset((n, k) for n, k, is_dense in products if not is_dense),
        dense_products=frozenset(
            (n, k) for n, k, is_dense in products if is_dense or has_adapters
        ),
        vocab_size=config.vocab_size,
        num_layers=len(stage.layers),
        num_experts=config.num_local_experts,
    )
