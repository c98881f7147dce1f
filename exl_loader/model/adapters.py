"""Low-rank adapters of a model: which parts they change, the bytes they take, loading them.

An adapter is packed into a room that is reserved with the model, so that adapters come and go
while PyTorch allocates nothing. Planning needs headers only and does not import PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..backends import backend_of
from ..checkpoint.adapter import same_folder_key
from ..checkpoint.architectures import ARCHITECTURES
from ..formats.common import require_finite
from ..formats.layer import DenseLayer, DenseSizes, RowRanges
from ..utils.byte_counts import amount
from ..utils.errors import InsufficientMemory, InvalidCheckpoint, InvalidSettings, shown_names
from ..utils.integers import round_up
from ..utils.table import TensorSpec
from .builder import fused_rows
from .parts.embedding import Embedding
from .parts.linear import Linear
from .parts.lora import LowRank

if TYPE_CHECKING:
    import torch

    from ..backends.base import DeviceOps
    from ..checkpoint.adapter import AdaptedModule, Adapter
    from ..checkpoint.safetensors_header import TensorHeader
    from .assembly import ModelParts

ROOM = "room"
"""The name of a device's tensor of the segment `loras`, in which adapters are."""

# Before `layers.` or `embed_tokens`, by how a model is wrapped when it is trained.
_WRAPPERS = ("model", "language_model")
_OTHER_MODEL = "The adapter was trained on another model: load it with that one"


@dataclass(frozen=True)
class Target:
    """A part of a model that a module of an adapter changes.

    Args:
        part: the part.
        layer: the index of its decoder layer; -1 for the embedding, the number of layers for the
            output head.
        rows: the output rows of the module that are the part's: all of them, unless the module
            is fused.
    """

    part: Linear | Embedding
    layer: int
    rows: RowRanges

    @property
    def out_features(self) -> int:
        """The number of these rows."""
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class AdaptedPart:
    """A part, and the module of an adapter that changes it."""

    target: Target
    module: AdaptedModule


@dataclass(frozen=True)
class LoadedLora:
    """An adapter that is loaded.

    Args:
        name: its folder's own name.
        path: its folder.
        scaling: the factor that the user chose, besides the adapter's own scale.
        nbytes: the bytes that it takes on all devices.
    """

    name: str
    path: str
    scaling: float
    nbytes: int


def adapted_parts(parts: ModelParts, adapter: Adapter) -> list[AdaptedPart]:
    """Find the parts that an adapter changes.

    Raises:
        InvalidCheckpoint: the adapter is of another model: of another class, a module that this
            one lacks, or a shape that differs.
    """
    config, found = parts.config, []
    if adapter.base_class in ARCHITECTURES and adapter.base_class != config.architecture:
        raise InvalidCheckpoint(
            f"LoRA {adapter.path}", expected=f"an adapter of {config.architecture}",
            actual=f"one of {adapter.base_class}", remedy=_OTHER_MODEL,
        )
    targets, names = _targets(parts), ARCHITECTURES[config.architecture]
    keys = {module.name: _key(names.renamed_module(module.name)) for module in adapter.modules}
    missing = [name for name, key in keys.items() if key not in targets]
    if missing:
        raise InvalidCheckpoint(
            f"LoRA {adapter.path}: {shown_names(missing)}",
            expected=f"modules of {config.architecture} with {config.num_hidden_layers} layers",
            actual="no such modules in the model", remedy=_OTHER_MODEL,
        )
    for module in adapter.modules:
        of_module = targets[keys[module.name]]
        _check_shape(adapter, module, of_module, config.hidden_size)
        found += [AdaptedPart(target, module) for target in of_module]
    return found


def _key(name: str) -> str:
    """Return a module's name without the names of what wraps a causal language model."""
    first, _, rest = name.partition(".")
    return _key(rest) if first in _WRAPPERS and rest else name


def _targets(parts: ModelParts) -> dict[str, list[Target]]:
    """Return name of a module -> the parts that it is, for every module that can be adapted."""
    names = ARCHITECTURES[parts.config.architecture]
    found: dict[str, list[Target]] = {}
    for index, layer in enumerate(parts.layers):
        linears = {linear.name: linear for linear in layer.linears}
        for linear in linears.values():
            target = Target(linear, index, (range(linear.out_features),))
            found[_key(linear.name)] = [target]
            if linear.spec.rows is None:
                found[_key(linear.spec.source)] = [target]
        prefix = f"{names.layers}.{index}."
        for source, fused in names.fused.items():
            in_layer = {name: linears[prefix + name] for name in fused if prefix + name in linears}
            if len(in_layer) == len(fused):
                widths = {name: part.out_features for name, part in in_layer.items()}
                found[_key(prefix + source)] = [
                    Target(part, index, fused_rows(parts.config, widths, name))
                    for name, part in in_layer.items()
                ]
    embedding, end = parts.ends
    head, vocab_size = end.linear, parts.config.vocab_size
    # Versions of transformers differ in the head's name where it is not lm_head.
    for name in ("lm_head", _key(head.name)):
        found[name] = [Target(head, len(parts.layers), (range(vocab_size),))]
    rows = range(parts.config.hidden_size)
    found[_key(names.embedding)] = [Target(embedding, -1, (rows,))]
    return found


def _check_shape(
    adapter: Adapter, module: AdaptedModule, targets: Sequence[Target], hidden_size: int
) -> None:
    part, out_features = targets[0].part, sum(target.out_features for target in targets)
    is_embedding = isinstance(part, Embedding)
    in_features = part.spec.shape[0] if isinstance(part, Embedding) else part.spec.in_features
    kind = "lora_embedding" if is_embedding else "lora"
    expected = f"{kind}_A [rank, {in_features}] and {kind}_B [{out_features}, rank]"
    fits = module.a.shape[1] == in_features and module.b.shape[0] == out_features
    if module.is_embedding != is_embedding or not fits:
        actual = "lora_embedding" if module.is_embedding else "lora"
        raise InvalidCheckpoint(
            f"LoRA {adapter.path}: {module.name}", expected=expected,
            actual=f"{actual}_A {list(module.a.shape)} and {actual}_B {list(module.b.shape)}",
            remedy=_OTHER_MODEL,
        )
    # Scratch memory is planned for inputs of the model's own widths.
    if module.rank > hidden_size:
        raise InvalidCheckpoint(
            f"LoRA {adapter.path}: {module.name}: rank", expected=f"at most {hidden_size}, the "
            "model's hidden_size", actual=module.rank,
        )


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter on one device.

    Args:
        adapted: the parts on the device.
        scaling: the user's factor on the adapter.
        rows: the most rows of a step.
        device: its name.
    """

    adapted: Sequence[AdaptedPart]
    scaling: float
    rows: int
    device: str

    def specs(self) -> Iterator[TensorSpec]:
        """Describe them in the order in which they are in the room; none without parts."""
        seen = set()
        for part in self.adapted:
            if part.module.name not in seen:
                seen.add(part.module.name)
                yield self.a(part)
            yield self.b(part)
        if self.adapted:
            yield self.hidden()

    def a(self, adapted: AdaptedPart) -> TensorSpec:
        """Describe a module's A, which the parts of a fused module share."""
        module = adapted.module
        rank, width = module.a.shape
        out_features, in_features = (width, rank) if module.is_embedding else (rank, width)
        return self._weight(f"{module.name}.A", out_features, in_features, module.a.dtype)

    def b(self, adapted: AdaptedPart) -> TensorSpec:
        """Describe a part's rows of B with the scale in it.

        In the file's dtype a scale that is no power of two would be rounded with each value.
        """
        module, target = adapted.module, adapted.target
        scale = module.scale * self.scaling
        dtype = module.b.dtype if math.frexp(scale)[0] in (0.5, -0.5, 0.0) else "float32"
        name = f"{module.name}.B.{target.rows[0].start}"
        return self._weight(name, target.out_features, module.rank, dtype)

    def hidden(self) -> TensorSpec:
        """Describe the room for `LowRank`'s h."""
        rank = max(part.module.rank for part in self.adapted)
        return TensorSpec("hidden", "loras", "float32", (self.rows * rank,), self.device)

    def nbytes(self) -> int:
        """Return the bytes of all tensors, each aligned."""
        step = backend_of(self.device).alignment_bytes
        return sum(round_up(spec.nbytes, step) for spec in self.specs())

    def _weight(self, name: str, out_features: int, in_features: int, dtype: str) -> TensorSpec:
        sizes = DenseSizes(out_features, in_features, dtype)
        ((dtype, shape),) = backend_of(self.device).linear_shapes(sizes).values()
        return TensorSpec(name, "loras", dtype, shape, self.device)


def room_spec(device: str, nbytes: int) -> TensorSpec:
    """Describe the room of a device."""
    return TensorSpec(ROOM, "loras", "uint8", (nbytes,), device)


class Adapters:
    """The adapters of a loaded model, and the rooms that they are in.

    Args:
        parts: the model's parts, loaded.
        rooms: device -> uint8 [n]; devices without a room are missing.
        ops: device -> its operations.
        rows: the most rows of a step.

    Attributes:
        loaded: the adapters in the order of loading.
    """

    def __init__(self, parts: ModelParts, rooms: Mapping[str, torch.Tensor],
                 ops: Mapping[str, DeviceOps], rows: int) -> None:
        self._parts, self._rooms, self._ops, self._rows = parts, rooms, ops, rows
        self._ends = dict.fromkeys(parts.device_map.devices, 0)
        self._adapted: list[Linear | Embedding] = []
        self.loaded: tuple[LoadedLora, ...] = ()

    def load(self, adapter: Adapter, scaling: float) -> None:
        """Pack an adapter behind those that are loaded. After an error nothing has changed.

        Args:
            adapter: an open adapter folder.
            scaling: a factor on its scale.

        Raises:
            InvalidSettings: this folder is loaded already.
            InvalidCheckpoint: as `adapted_parts`; the file has changed, or a value is not finite.
            InsufficientMemory: it does not fit into a device's room.
        """
        path = str(adapter.path)
        own_key = same_folder_key(path)
        if any(same_folder_key(lora.path) == own_key for lora in self.loaded):
            raise InvalidSettings(f"LoRA {path}", expected="an adapter that is not loaded",
                                  actual="it is loaded", remedy="Unload the LoRAs first")
        by_device: dict[str, list[AdaptedPart]] = {}
        for adapted in adapted_parts(self._parts, adapter):
            by_device.setdefault(self._device(adapted.target.part), []).append(adapted)
        on_devices = [AdapterTensors(on_device, scaling, self._rows, device)
                      for device, on_device in by_device.items()]
        self._check_room(adapter, on_devices)
        made = [pair for tensors in on_devices for pair in self._pack(adapter, tensors)]
        for part, low_rank in made:
            part.low_ranks.append(low_rank)
            self._adapted.append(part)
        for tensors in on_devices:
            self._ends[tensors.device] += tensors.nbytes()
        nbytes = sum(tensors.nbytes() for tensors in on_devices)
        self.loaded += (LoadedLora(adapter.name, path, scaling, nbytes),)

    def clear(self) -> None:
        """Unload all adapters."""
        for part in self._adapted:
            part.low_ranks.clear()
        self._adapted.clear()
        self._ends = dict.fromkeys(self._ends, 0)
        self.loaded = ()

    def _device(self, part: Linear | Embedding) -> str:
        if isinstance(part, Embedding):
            # The embedding may be in main memory; the first layer's device reads it.
            return self._parts.device_map.layers[0]
        return part.device

    def _check_room(self, adapter: Adapter, on_devices: Iterable[AdapterTensors]) -> None:
        for tensors in on_devices:
            device, nbytes = tensors.device, tensors.nbytes()
            room = self._rooms[device].nbytes if device in self._rooms else 0
            free = room - self._ends[device]
            if nbytes > free:
                needed = self._ends[device] + nbytes
                raise InsufficientMemory(
                    f"LoRA {adapter.path} on {device}",
                    expected=f"{nbytes} bytes ({amount(nbytes)}) of room for LoRAs",
                    actual=f"{free} bytes free of {room} that were reserved",
                    remedy=f"Load the model with max_lora_bytes={needed}B, or name the LoRAs when "
                    "it is loaded",
                )

    def _pack(
        self, adapter: Adapter, tensors: AdapterTensors
    ) -> Iterator[tuple[Linear | Embedding, LowRank]]:
        """Read an adapter's matrices of one device into its room."""
        views = self._views(tensors)
        ops, hidden = self._ops[tensors.device], views[tensors.hidden().name]
        packed = {}
        for adapted in tensors.adapted:
            module, target = adapted.module, adapted.target
            a, b = tensors.a(adapted), tensors.b(adapted)
            if a.name not in packed:
                rank, width = module.a.shape
                if module.is_embedding:
                    columns = _Columns(adapter, module.a)
                    layer = DenseLayer(rank, width, a.dtype, columns.read, None)
                else:
                    read = partial(_read, adapter, module.a, (range(rank),), 1.0, a.dtype)
                    layer = DenseLayer(width, rank, a.dtype, read, None)
                packed[a.name] = ops.pack(layer, {"weight": views[a.name]})
            scale = module.scale * tensors.scaling
            read = partial(_read, adapter, module.b, target.rows, scale, b.dtype)
            layer = DenseLayer(module.rank, target.out_features, b.dtype, read, None)
            in_room = ops.pack(layer, {"weight": views[b.name]})
            yield target.part, LowRank(packed[a.name], in_room, hidden)

    def _views(self, tensors: AdapterTensors) -> dict[str, torch.Tensor]:
        import torch

        device, views = tensors.device, {}
        step, offset = backend_of(device).alignment_bytes, self._ends[device]
        for spec in tensors.specs():
            raw = self._rooms[device][offset : offset + spec.nbytes]
            views[spec.name] = raw.view(getattr(torch, spec.dtype)).view(spec.shape)
            offset += round_up(spec.nbytes, step)
        return views


def _read(adapter: Adapter, header: TensorHeader, ranges: RowRanges, scale: float, dtype: str,
          first: int, end: int) -> torch.Tensor:
    """Read rows of a matrix, multiplied by `scale`, [end - first, columns].

    Args:
        ranges: the rows of the matrix that count.
        first, end: which of these are read.
    """
    import torch

    pieces, before = [], 0
    for whole in ranges:
        piece = whole[max(first - before, 0) : max(end - before, 0)]
        if piece:
            pieces.append(adapter.read_rows(header, piece.start, piece.stop))
        before += len(whole)
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    require_finite(header.name, rows)
    if scale != 1.0 or header.dtype != dtype:
        rows = (rows.double() * scale).to(getattr(torch, dtype))
        require_finite(f"{header.name} times {scale:g}", rows)
    return rows


class _Columns:
    """Reads columns of an embedding's A, which is read whole when the first are asked for."""

    def __init__(self, adapter: Adapter, header: TensorHeader) -> None:
        self._adapter, self._header = adapter, header
        self._matrix: torch.Tensor | None = None

    def read(self, first: int, end: int) -> torch.Tensor:
        """Return columns first..end as rows, [end - first, rank]."""
        if self._matrix is None:
            rank = self._header.shape[0]
            whole = (range(rank),)
            dtype = self._header.dtype
            self._matrix = _read(self._adapter, self._header, whole, 1.0, dtype, 0, rank)
        return self._matrix[:, first:end].t().contiguous()
