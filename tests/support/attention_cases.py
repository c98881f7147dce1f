"""Cache layers, batches and calls for the tests of attention on CPUs and on CUDA."""

from __future__ import annotations

import torch

from exl_loader.backends.base import AttentionShape, Batch
from exl_loader.backends.cuda.attention import AttentionOps, attention_scratch_bytes
from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from exl_loader.backends.reference import fp16 as reference_fp16
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import PAGE_LEN, CacheLayer, StoredTokens, pages_for
from support.cache_layers import attend as attend_on_cpu
from support.cache_layers import make_layer, part, random_rows, write
from support.cuda_emulation import EmulatedLauncher
from support.targets import Target

SOURCES = ("cache_write", "attention_decode", "attention_decode_padded", "attention_prefill",
           "attention_generic")
REFERENCE = ReferenceOps()


def shape_of(heads: int, kv_heads: int, head_dim: int, *, softcap: float = 0.0,
             window: int = 0, scale: float | None = None) -> AttentionShape:
    factor = head_dim**-0.5 if scale is None else scale
    return AttentionShape(heads, kv_heads, head_dim, factor, softcap, window)


def _fill(codes: torch.Tensor, scales: torch.Tensor | None, generator: torch.Generator) -> None:
    if codes.dtype == torch.uint8:
        codes.random_(0, 256, generator=generator)
        assert scales is not None
        scales.copy_(torch.randn(scales.shape, generator=generator))
        return
    x = torch.randn(codes.shape, generator=generator)
    codes.copy_(x if codes.dtype == torch.float32
                else reference_fp16.encode(x.flatten(0, -2)).view(x.shape))


def random_layer(cache_type: str, batch: Batch, shape: AttentionShape, seed: int = 0,
                 magnitude: float = 1.0, has_open_pages: bool = False) -> CacheLayer:
    """Return a layer with random contents for every token of the batch, and NaN after them.

    Contents are drawn as they are stored: quantising them first would take longer than all
    the rest. With open pages, whatever the batch's rows do not read is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    pages = int(batch.page_table.max()) + 1
    layer = make_layer(cache_type, pages, shape.num_kv_heads, shape.head_dim,
                       batch.num_sequences if has_open_pages else 0)
    nothing = make_layer(cache_type, 1, shape.num_kv_heads, shape.head_dim)
    _fill(layer.k_codes, layer.k_scales, generator)
    _fill(layer.v_codes, layer.v_scales, generator)
    if layer.k_scales is not None:
        layer.k_scales *= magnitude
    ends: dict[int, int] = {}
    for s, past in enumerate(batch.past_len.tolist()):
        total = past + int(batch.q_start[s + 1] - batch.q_start[s])
        page = int(batch.page_table[s, pages_for(total) - 1])
        ends[page] = max(ends.get(page, 0), (total - 1) % PAGE_LEN + 1)
    names = ("k_codes", "k_scales", "v_codes", "v_scales")
    for tensor, poison in ((getattr(layer, n), getattr(nothing, n)) for n in names):
        for page, end in ends.items():
            if tensor is not None:
                tensor[page, :, end:] = poison[0, :, end:]
    if has_open_pages:
        _fill_open_pages(layer, batch, generator)
    return layer


def _fill_open_pages(layer: CacheLayer, batch: Batch, generator: torch.Generator) -> None:
    assert batch.open_pages is not None
    for pages, opened in ((layer.keys, layer.k_open), (layer.values, layer.v_open)):
        if opened is None:
            continue
        for stored in (opened.tokens, opened.first):
            _fill(stored.codes, stored.scales, generator)
        for s, past in enumerate(batch.past_len.tolist()):
            count = int(batch.q_start[s + 1] - batch.q_start[s])
            own, page = past // PAGE_LEN, int(batch.open_pages[s])
            assert (past + count - 1) // PAGE_LEN == own
            _poison(opened.tokens, page, slice((past + count - 1) % PAGE_LEN + 1, None))
            _poison(pages, int(batch.page_table[s, own]), slice(None))
            if own > 0:
                _poison(pages, int(batch.page_table[s, 0]), slice(1))
            else:
                _poison(opened.first, page, slice(None))


def _poison(stored: StoredTokens, page: int, tokens: slice) -> None:
    for tensor in (stored.codes, stored.scales):
        if tensor is not None:
            tensor.view(torch.uint8)[page, :, tokens] = 0xFF


def filled_layer(writer: Target, cache_type: str, batch: Batch, shape: AttentionShape,
                 seed: int = 0) -> CacheLayer:
    """Return a layer to which `writer` wrote everything before and in the batch's rows."""
    past, new = batch.past_len.tolist(), batch.q_start.diff().tolist()
    whole = part(batch, [0] * len(past), [p + n for p, n in zip(past, new, strict=True)])
    pages = int(batch.page_table.max()) + 1
    layer = make_layer(cache_type, pages, shape.num_kv_heads, shape.head_dim)
    k, v = (random_rows(whole.num_rows, shape.num_kv_heads, shape.head_dim, s)
            for s in (seed, seed + 1))
    write(writer, k, v, layer, whole)
    return layer


def scratch_for(q: torch.Tensor, batch: Batch, shape: AttentionShape) -> torch.Tensor:
    """Return exactly what is reserved: counters of zero, then garbage."""
    nbytes = attention_scratch_bytes(
        q.shape[0], batch.num_sequences, batch.page_table.shape[1] * PAGE_LEN, shape
    )
    scratch = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
    scratch[:COUNTER_BYTES] = 0
    return scratch


def attend(target: Target, q: torch.Tensor, layer: CacheLayer, batch: Batch,
           shape: AttentionShape, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Call `attention` in exactly the scratch that is reserved for it."""
    if target.kind == "cpu":
        return attend_on_cpu(target, q, layer, batch, shape, sinks)
    scratch = scratch_for(q, batch, shape)
    out = torch.full_like(q, torch.nan)
    target.attention(q.clone(), layer, batch, shape, out, scratch, sinks)
    assert not scratch[:COUNTER_BYTES].any(), "counters are zero again"
    return out


def expected_of(q: torch.Tensor, layer: CacheLayer, batch: Batch,
                shape: AttentionShape, sinks: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty_like(q)
    REFERENCE.attention(q.clone(), layer, batch, shape, out, torch.empty(0), sinks)
    return out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.double().norm())


def attention_target(launcher: EmulatedLauncher) -> Target:
    return Target(AttentionOps(launcher), None)
