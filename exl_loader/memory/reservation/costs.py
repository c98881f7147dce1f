"""The bytes that a model's layers take on a device: sums of the table that the loader allocates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...backends import backend_of
from ...cache.layout import CacheType, cache_specs, pages_for
from ...formats.layer import PIECE_BYTES
from ...model.adapters import AdaptedPart, AdapterTensors, adapted_parts, room_spec
from ...model.assembly import ModelParts, WeightCosts
from ...model.builder import build_parts
from ...model.parts.embedding import EMBEDDING_ROWS
from ...model.step import beside_cache_shapes, most_rows, workspace_specs
from ...utils.table import DTYPE_BYTES, MAIN_MEMORY, DeviceMap, TensorSpec
from ..segments import Segment, align, lay_out
from .options import RunOptions
from .split import Work

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from ...backends.base import Shapes
    from ...checkpoint import Checkpoint
    from ...checkpoint.adapter import Adapter
    from ...checkpoint.config import ModelConfig
    from ...model.assembly import StageParts

# Before the names of a draft model's tensors, which are in the same buffers as the model's.
DRAFT_PREFIX = "draft."

# The large tensors of a quantised layer in the files, EXL2's and GPTQ's.
UPLOADED_TENSORS = ("q_weight", "q_scale", "qweight", "qzeros", "scales")

# How many pieces of unquantised weights and how many quantised layers exist at once while they
# are read, with the freed memory that the C library keeps. Measured: at most 6.4 and 1.7;
# tests/memory/test_keep.py holds both.
UPLOADED_PIECES = 7
UPLOADED_LAYERS = 2


@dataclass(frozen=True)
class BufferBytes:
    """The bytes of the buffers of a device's layers; `loras` is the room for adapters."""

    weights: int
    cache: int
    workspace: int
    loras: int = 0

    @property
    def total(self) -> int:
        """All buffers."""
        return self.weights + self.cache + self.workspace + self.loras

    def rounding(self, granularity: int) -> int:
        """Return the bytes that are added where each buffer is rounded up to whole pages."""
        buffers = (self.weights, self.cache, self.workspace, self.loras)
        return sum(-n % granularity for n in buffers)

    def __add__(self, other: BufferBytes) -> BufferBytes:
        return BufferBytes(
            self.weights + other.weights, self.cache + other.cache,
            self.workspace + other.workspace, self.loras + other.loras,
        )


@dataclass(frozen=True)
class Loras:
    """The adapters that a model is planned with.

    Args:
        adapters: open adapters, each with the user's scaling.
        least_bytes: the least room on each device.
    """

    adapters: tuple[tuple[Adapter, float], ...] = ()
    least_bytes: int = 0


NO_LORAS = Loras()


@dataclass(frozen=True)
class PlacedModel:
    """A model on its devices.

    Args:
        parts: the model, each part on its device.
        checkpoint: open.
        ctx_size: tokens of context.
        cache_tokens: tokens that its cache holds, in whole pages.
        loras: the adapters to load with it.
        rooms: device -> bytes of room for adapters.
    """

    parts: ModelParts
    checkpoint: Checkpoint
    ctx_size: int
    cache_tokens: int
    loras: Loras = NO_LORAS
    rooms: Mapping[str, int] = field(default_factory=dict)


def segments_of(
    model: PlacedModel, run: RunOptions, draft: PlacedModel | None = None
) -> dict[tuple[str, str], Segment]:
    """Lay out all tensors of a run, which the loader allocates and the plan sums."""
    specs = _table(model, run)
    if draft is not None:
        specs += [_of_draft(spec) for spec in _table(draft, run)]
    return lay_out(specs)


def _of_draft(spec: TensorSpec) -> TensorSpec:
    """Return a draft model's spec, which shares memory with no tensor of the model."""
    phase = None if spec.phase is None else (DRAFT_PREFIX + spec.phase[0], spec.phase[1])
    return replace(spec, name=DRAFT_PREFIX + spec.name, phase=phase)


def _table(model: PlacedModel, run: RunOptions) -> list[TensorSpec]:
    parts, pages = model.parts, pages_for(model.cache_tokens)
    return [
        *parts.specs(),
        *cache_specs(parts.config, pages, run.cache_type, parts.device_map),
        *_workspace(parts.stages(), model.ctx_size, run, model.loras),
        *(room_spec(device, nbytes) for device, nbytes in model.rooms.items() if nbytes),
    ]


def _workspace(
    stages: Iterable[StageParts], ctx_size: int, run: RunOptions, loras: Loras
) -> list[TensorSpec]:
    assert run.max_batch_size is not None, "RunOptions.at was not called"
    return workspace_specs(
        stages,
        ctx_size=ctx_size,
        cache_type=run.cache_type,
        chunk_size=run.chunk_size,
        max_batch_size=run.max_batch_size,
        has_adapters=loras != NO_LORAS,
        has_open_pages=run.has_open_pages,
    )


class LayerCosts:
    """The bytes that ranges of a model's layers take. Each is computed once.

    They depend on the kind of a device, whose alignment they follow, and not on the device.

    Args:
        config: the model.
        checkpoint: open.
        loras: the adapters that are planned with the model.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, loras: Loras = NO_LORAS
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.loras = loras
        self._adapted: dict[str, list[list[AdaptedPart]]] = {}
        self._rooms: dict[tuple[str, range, int], int] = {}
        self._parts: dict[DeviceMap, ModelParts] = {}
        self._wholes: dict[str, ModelParts] = {}
        self._weights: dict[str, WeightCosts] = {}
        self._caches: dict[tuple[str, int, CacheType], int] = {}
        self._workspaces: dict[tuple[object, ...], int] = {}
        self._besides: dict[tuple[object, ...], int] = {}
        self._layer_kinds: list[Hashable] | None = None
        self._counts_layers = False

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def parts(self, device_map: DeviceMap) -> ModelParts:
        """Return the model's parts on these devices."""
        if device_map not in self._parts:
            self._parts[device_map] = build_parts(self.config, self.checkpoint, device_map)
        return self._parts[device_map]

    def whole(self, device: str) -> ModelParts:
        """Return the model's parts with everything on one device of the kind of `device`."""
        kind = backend_of(device).kind
        if kind not in self._wholes:
            self._wholes[kind] = self.parts(DeviceMap.single(device, self.num_layers))
        return self._wholes[kind]

    def buffers(
        self, device: str, layers: range, ctx_size: int, run: RunOptions, with_embedding: bool,
        has_head: bool,
    ) -> BufferBytes:
        """Return the buffers of a range of layers.

        Args:
            with_embedding: the embedding is counted with the first layer.
            has_head: the output head is on the device too.
        """
        pages = pages_for(run.cache_tokens(ctx_size))
        cache = self._layer_cache_bytes(device, pages, run.cache_type)
        weights = self._weight_costs(device)
        return BufferBytes(
            weights.of_range(layers.start, layers.stop, with_embedding, has_head),
            cache * len(layers),
            self._workspace_bytes(device, layers, ctx_size, run, has_head),
            self._room_bytes(device, layers, run),
        )

    def work(self, device: str, ctx_size: int, run: RunOptions) -> Work:
        """Return the bytes that a step over all texts reads where they fill the cache.

        Of a layer these are its cache and its weights, of which every row of a mixture counts
        only its own experts. Of an embedding a step reads next to nothing.
        """
        whole = self.whole(device)
        _, head = whole.ends
        pages = pages_for(run.cache_tokens(ctx_size))
        cache = self._layer_cache_bytes(device, pages, run.cache_type)
        layers = itertools.accumulate(
            (layer.read_bytes() + cache for layer in whole.layers), initial=0
        )
        return Work(tuple(layers), sum(spec.nbytes for spec in head.specs()))

    def main_memory_embedding_bytes(self, device: str, has_head: bool) -> int:
        """Return the bytes of the embedding in main memory.

        Args:
            device: a card, which has the first layer.
            has_head: the head is on it too. A tied one is the embedding as well.
        """
        if has_head and self._weight_costs(device).is_tied:
            return 0
        embedding, _ = self.whole(device).ends
        return align(embedding.spec.nbytes, MAIN_MEMORY)

    def page_bytes(self, cache_type: CacheType) -> int:
        """Return the bytes of a page of the cache in all layers, in main memory."""
        (page,) = lay_out(cache_specs(self.config, 1, cache_type)).values()
        return page.nbytes

    def upload_bytes(self, device: str) -> int:
        """Return the most main memory that weights take on their way into the buffers.

        The tensors of a quantised layer are read whole before they are packed. Unquantised
        weights are read in pieces, which are checked and rearranged; those that are stored
        transposed are read whole for each piece.
        """
        parts = self.whole(device)
        pieces, layers, whole = [0], [0], [0]
        embedding, _ = parts.ends
        tables = [*embedding.specs()]
        if parts.positions is not None:
            tables += parts.positions.specs()
        for spec in tables:
            rows = spec.shape[0]
            pieces.append(spec.nbytes // rows * min(EMBEDDING_ROWS, rows))
        headers = self.checkpoint.headers
        for adapter, _ in self.loras.adapters:
            for module in adapter.modules:
                # A of an embedding is read whole, because its columns are packed.
                a_bytes = module.a.nbytes if module.is_embedding else 0
                pieces.append(max(a_bytes, min(PIECE_BYTES, module.b.nbytes)))
        for linear in parts.linears():
            if linear.spec.format == "dense":
                pieces.append(min(PIECE_BYTES, linear.tensors["weight"].nbytes))
                if linear.spec.options["transposed"]:
                    header = headers[f"{linear.spec.source}.weight"]
                    stored_rows = math.prod(header.shape[:-1])
                    whole.append(header.nbytes // stored_rows * linear.spec.in_features)
            else:
                names = (f"{linear.spec.source}.{tensor}" for tensor in UPLOADED_TENSORS)
                layers.append(sum(headers[name].nbytes for name in names if name in headers))
        return max(UPLOADED_PIECES * max(pieces) + max(whole), UPLOADED_LAYERS * max(layers))

    def _weight_costs(self, device: str) -> WeightCosts:
        kind = backend_of(device).kind
        if kind not in self._weights:
            self._weights[kind] = self.whole(device).costs()
        return self._weights[kind]

    def _room_bytes(self, device: str, layers: range, run: RunOptions) -> int:
        """Return the room for adapters of a range of layers, aligned."""
        if not self.loras.adapters:
            return align(self.loras.least_bytes, device)
        kind = backend_of(device).kind
        if kind not in self._adapted:
            whole = self.whole(device)
            self._adapted[kind] = [
                adapted_parts(whole, adapter) for adapter, _ in self.loras.adapters
            ]
        assert run.max_batch_size is not None
        rows = most_rows(run.chunk_size, run.max_batch_size)
        key = kind, layers, rows
        if key not in self._rooms:
            first = layers.start if layers.start else -1
            end = layers.stop + (layers.stop == self.num_layers)
            needed = 0
            for (_, scaling), parts in zip(
                self.loras.adapters, self._adapted[kind], strict=True
            ):
                on_device = [part for part in parts if first <= part.target.layer < end]
                needed += AdapterTensors(on_device, scaling, rows, device).nbytes()
            self._rooms[key] = align(max(needed, self.loras.least_bytes), device)
        return self._rooms[key]

    def _layer_cache_bytes(self, device: str, pages: int, cache_type: CacheType) -> int:
        key = (backend_of(device).kind, pages, cache_type)
        if key not in self._caches:
            one_layer = replace(self.config, num_hidden_layers=1)
            device_map = DeviceMap.single(device, 1)
            segments = lay_out(cache_specs(one_layer, pages, cache_type, device_map))
            self._caches[key] = segments[device, "cache"].nbytes
        return self._caches[key]

    def _workspace_bytes(
        self, device: str, layers: range, ctx_size: int, run: RunOptions, has_head: bool
    ) -> int:
        """Lay out the workspace of a range, once for all ranges with the same workspace."""
        whole = self.whole(device)
        if self._layer_kinds is None:
            self._layer_kinds = [(layer.workspace_key, layer.widths) for layer in whole.layers]
            # Tables of experts and key biases have an entry for each layer of a device.
            self._counts_layers = bool(self.config.num_local_experts) or any(
                layer.layer_workspace() for layer in whole.layers
            )
        key = (
            backend_of(device).kind,
            has_head,
            frozenset(self._layer_kinds[layers.start : layers.stop]),
            len(layers) if self._counts_layers else 0,
            ctx_size,
            run,
        )
        if key not in self._workspaces:
            stage = whole.cut(layers.start, layers.stop, has_head)
            beside = self._beside_cache(1, run)
            specs = _workspace([stage], ctx_size, run, self.loras)
            segments = lay_out(spec for spec in specs if spec.name not in beside)
            self._workspaces[key] = segments[stage.device, "workspace"].nbytes
        return self._workspaces[key] + self._beside_cache_bytes(device, len(layers), run)

    def _beside_cache_bytes(self, device: str, num_layers: int, run: RunOptions) -> int:
        """Return the bytes of `_beside_cache`, aligned."""
        num_open_pages = run.max_batch_size if run.has_open_pages else 0
        key = backend_of(device).kind, num_layers, num_open_pages, run.cache_type
        if key not in self._besides:
            self._besides[key] = sum(
                align(math.prod(shape) * DTYPE_BYTES[dtype], device)
                for dtype, shape in self._beside_cache(num_layers, run).values()
            )
        return self._besides[key]

    def _beside_cache(self, num_layers: int, run: RunOptions) -> Shapes:
        """Return the tensors of the workspace that grow with the number of layers."""
        assert run.max_batch_size is not None
        num_open_pages = run.max_batch_size if run.has_open_pages else 0
        return beside_cache_shapes(self.config, num_layers, num_open_pages, run.cache_type)
