"""Cache layers, batches and random rows for tests of the attention operations."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from exl_loader.backends.base import AttentionShape, Batch
from exl_loader.backends.cpu.attention import attention_scratch_bytes
from exl_loader.cache.layout import (
    CacheLayer,
    CacheType,
    cache_specs,
    open_page_shapes,
    pages_for,
)


def make_layer(cache_type: str, num_pages: int, num_kv_heads: int, head_dim: int,
               num_open_pages: int = 0) -> CacheLayer:
    """Allocate a layer and fill it with bytes that are NaN where they are read as floats."""
    kind = CacheType.parse(cache_type)
    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=num_kv_heads, head_dim=head_dim
    )
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in cache_specs(config, num_pages, kind)}
    if num_open_pages:
        shapes |= open_page_shapes(config, 1, num_open_pages, kind)
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        tensors[name].view(torch.uint8).fill_(0xFF)
    layer = CacheLayer(
        tensors["cache.0.k_codes"], tensors.get("cache.0.k_scales"),
        tensors["cache.0.v_codes"], tensors.get("cache.0.v_scales"), kind,
    )  # fmt: skip
    layer.take_open_pages(tensors, 0)
    return layer


def make_batch(past_lens: list[int], q_lens: list[int], seed: int = 0) -> Batch:
    """Give each sequence its own pages and its own open page, in random order."""
    totals = [past + new for past, new in zip(past_lens, q_lens, strict=True)]
    counts = [pages_for(total) for total in totals]
    pages = list(range(sum(counts)))
    random.Random(seed).shuffle(pages)
    table = torch.full((len(totals), max(counts)), -1, dtype=torch.int32)
    for s, count in enumerate(counts):
        table[s, :count] = torch.tensor([pages.pop() for _ in range(count)])
    starts = [0]
    for new in q_lens:
        starts.append(starts[-1] + new)
    positions = [
        torch.arange(past, total) for past, total in zip(past_lens, totals, strict=True)
    ]
    return Batch(
        positions=torch.cat(positions).int(),
        q_start=torch.tensor(starts, dtype=torch.int32),
        past_len=torch.tensor(past_lens, dtype=torch.int32),
        page_table=table,
        max_total_len=max(totals),
        open_pages=torch.tensor(
            random.Random(seed).sample(range(len(totals)), len(totals)), dtype=torch.int32
        ),
    )


def part(batch: Batch, past_lens: list[int], q_lens: list[int]) -> Batch:
    """Return a batch on the same pages with other lengths."""
    other = make_batch(past_lens, q_lens)
    other.page_table, other.open_pages = batch.page_table, batch.open_pages
    return other


def one_of(batch: Batch, sequence: int) -> Batch:
    """Return a batch of one of the sequences alone."""
    first, end = batch.q_start[sequence : sequence + 2].tolist()
    assert batch.open_pages is not None
    return Batch(
        positions=batch.positions[first:end].contiguous(),
        q_start=torch.tensor([0, end - first], dtype=torch.int32),
        past_len=batch.past_len[sequence : sequence + 1].contiguous(),
        page_table=batch.page_table[sequence : sequence + 1].contiguous(),
        max_total_len=int(batch.past_len[sequence]) + end - first,
        open_pages=batch.open_pages[sequence : sequence + 1].contiguous(),
    )


def random_rows(rows: int, heads: int, head_dim: int, seed: int) -> torch.Tensor:
    """Return normal float32 [rows, heads, head_dim] with one channel ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads, head_dim, generator=generator)
    x[..., seed % head_dim] *= 10
    return x


def attend(ops, q: torch.Tensor, layer: CacheLayer, batch: Batch,
           shape: AttentionShape, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Call `attention` with exactly as much scratch as it is planned with."""
    nbytes = attention_scratch_bytes(batch.num_sequences, batch.max_total_len, shape)
    scratch = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
    out = torch.full_like(q, torch.nan)
    ops.attention(q.clone(), layer, batch, shape, out, scratch, sinks)
    return out


def write(ops, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch) -> None:
    """Call `write_cache`."""
    ops.write_cache(k, v, layer, batch, torch.empty(0, dtype=torch.uint8))
