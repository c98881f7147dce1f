"""A `Model` straight from a folder, without the loader: what tests of the forward pass need."""

from __future__ import annotations

from pathlib import Path

import torch

from exl_loader.cache.layout import PAGE_LEN, CacheType, cache_specs, pages_for
from exl_loader.cache.paging import PagedCache
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.loader import upload_buffers
from exl_loader.memory.buffers import allocate
from exl_loader.memory.segments import lay_out
from exl_loader.model.builder import build_parts
from exl_loader.model.forward import Model
from exl_loader.model.step import workspace_specs
from exl_loader.utils.table import DeviceMap


def build_model(
    folder: Path, ops, *, cache_type: str = "fp32", ctx_size: int = 512, sequences: int = 1,
    chunk_size: int = 128, logits_rows: int = 128, device: str | DeviceMap = "cpu", **options,
) -> tuple[Model, PagedCache]:
    """Build a model and a cache that holds `sequences` texts of `ctx_size` tokens.

    `ops` are those of every device, or each device's by name.
    """
    part = MachinePart(
        folder, ops, cache_type=cache_type, ctx_size=ctx_size, sequences=sequences,
        chunk_size=chunk_size, logits_rows=logits_rows, device=device,
    )
    cache = part.cache()
    return Model(part.parts, part.workspaces, cache, part.ops, **options), cache


class MachinePart:
    """What one machine has of a model, read: all of it, or by the device map a part.

    Arguments as those of `build_model`.
    """

    def __init__(
        self, folder: Path, ops, *, cache_type: str = "fp32", ctx_size: int = 512,
        sequences: int = 1, chunk_size: int = 128, logits_rows: int = 128,
        device: str | DeviceMap = "cpu",
    ) -> None:
        config, self._kind = ModelConfig.from_dir(folder), CacheType.parse(cache_type)
        self._num_pages = pages_for(ctx_size) * sequences
        with Checkpoint.open(folder) as checkpoint:
            devices = device
            if isinstance(device, str):
                devices = DeviceMap.single(device, config.num_hidden_layers)
            by_name = ops if isinstance(ops, dict) else dict.fromkeys(devices.devices, ops)
            self.ops = {name: by_name[name] for name in devices.devices}
            self.parts = build_parts(config, checkpoint, devices)
            workspace = workspace_specs(
                self.parts.stages(), ctx_size=ctx_size, cache_type=self._kind,
                chunk_size=chunk_size, max_batch_size=sequences, logits_rows=logits_rows,
            )
            cache_tensors = cache_specs(config, self._num_pages, self._kind, devices)
            self.buffers = allocate(
                lay_out([*self.parts.specs(), *cache_tensors, *workspace]).values()
            )
            with upload_buffers(self.ops, self.buffers):
                weights = self.buffers.views("weights") | self.buffers.views("embedding")
                self.parts.load(checkpoint, weights, self.ops)
        self.workspaces = {
            name: self.buffers.views("workspace", name) for name in devices.devices
        }

    def cache(self, elsewhere=None) -> PagedCache:
        """Make a cache of these layers."""
        return PagedCache.from_views(
            self.buffers.views("cache"), "cache", self._kind,
            [(self.workspaces[name], index) for name, index in self.parts.layer_places()],
            self._num_pages * PAGE_LEN, self.parts.device_map.first_layer, elsewhere,
        )


def run_chunks(
    model: Model, cache: PagedCache, ids: list[int], chunk: int, total: int | None = None
):
    """Return the logits of all of `ids`, float32 [T, vocab], fed `chunk` ids at a time.

    `total` is the length that the text is meant to reach, that of `ids` where None.
    """
    import torch

    sequence = cache.acquire(total or len(ids))
    rows = [
        model.forward([(sequence, ids[first : first + chunk])], "all").clone()
        for first in range(0, len(ids), chunk)
    ]
    cache.release(sequence)
    return torch.cat(rows)


def split(*counts: int, kind: str = "cpu") -> DeviceMap:
    """Put so many layers on the first device, the second, ..."""
    names = [f"{kind}:{i}" for i, count in enumerate(counts) for _ in range(count)]
    return DeviceMap(names[0], tuple(names), names[-1])


def together(model, cache, texts, steps=5):
    """Feed texts in the same steps: a few ids of each, then one at a time; all last rows."""
    sequences = [cache.acquire(len(ids)) for ids in texts]
    rows = [model.forward([(s, ids[:7]) for s, ids in zip(sequences, texts, strict=True)]).clone()]
    for step in range(7, 7 + steps):
        entries = [(s, [ids[step]]) for s, ids in zip(sequences, texts, strict=True)]
        rows.append(model.forward(entries).clone())
    for sequence in sequences:
        cache.release(sequence)
    return torch.stack(rows)
