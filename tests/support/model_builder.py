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
    config, kind = ModelConfig.from_dir(folder), CacheType.parse(cache_type)
    num_pages = pages_for(ctx_size) * sequences
    with Checkpoint.open(folder) as checkpoint:
        devices = device
        if isinstance(device, str):
            devices = DeviceMap.single(device, config.num_hidden_layers)
        by_name = ops if isinstance(ops, dict) else dict.fromkeys(devices.devices, ops)
        on_device = {name: by_name[name] for name in devices.devices}
        parts = build_parts(config, checkpoint, devices)
        workspace = workspace_specs(
            parts.stages(), ctx_size=ctx_size, cache_type=kind, chunk_size=chunk_size,
            max_batch_size=sequences, logits_rows=logits_rows,
        )
        cache_tensors = cache_specs(config, num_pages, kind, devices)
        buffers = allocate(lay_out([*parts.specs(), *cache_tensors, *workspace]).values())
        with upload_buffers(on_device, buffers):
            weights = buffers.views("weights") | buffers.views("embedding")
            parts.load(checkpoint, weights, on_device)
    workspaces = {name: buffers.views("workspace", name) for name in devices.devices}
    cache = PagedCache.from_views(
        buffers.views("cache"), "cache", kind,
        [(workspaces[name], index) for name, index in parts.layer_places()],
        num_pages * PAGE_LEN,
    )
    return Model(parts, workspaces, cache, on_device, **options), cache


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
