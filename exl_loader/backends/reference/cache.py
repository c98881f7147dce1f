"""The definition of writing the key/value cache and of attention over it.

`codec.py` defines what is stored, and explains why attention needs only one rotation of its
queries and one of its output. `model/parts/key_bias.py` explains `_bias_scores`. Sums are in
float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...cache.layout import PAGE_LEN
from . import fp16 as reference_fp16
from .codec import (
    cache_round_trip,
    dequantize,
    quantize,
    quantize_plainly,
    rotate,
    rotate_back,
)

if TYPE_CHECKING:
    from ...cache.layout import CacheLayer, KeyBias, OpenPages, StoredTokens
    from ..base import AttentionShape, Batch

__all__ = ["attention", "cache_round_trip", "write_cache"]


def _bounds(batch: Batch, sequence: int) -> tuple[int, int, int]:
    """Return the first row of a sequence, one past its last row, and its past_len."""
    first, end = batch.q_start[sequence : sequence + 2].tolist()
    return first, end, int(batch.past_len[sequence])


def _pages_and_tokens(
    batch: Batch, sequence: int, first: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return page, and token within the page, of a sequence's positions first to end."""
    positions = torch.arange(first, end)
    return batch.page_table[sequence].long()[positions // PAGE_LEN], positions % PAGE_LEN


def _write(x: torch.Tensor, stored: StoredTokens, feedback: torch.Tensor | None,
           pages: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write x, float32 [T, kv_heads, head_dim], to the given tokens of pages, int64 [T] each."""
    if stored.bits == 32:
        stored.codes[pages, :, tokens] = x
    elif stored.scales is None:
        _put(stored, (reference_fp16.encode(x.flatten(0, 1)),), pages, tokens)
    else:
        rotated = rotate(x.double()).float()
        if feedback is not None:
            feedback = feedback.repeat(len(x), 1, 1)
        _put(stored, quantize(rotated.flatten(0, 1), stored.bits, feedback), pages, tokens)


def _put(stored: StoredTokens, encoded: Sequence[torch.Tensor], pages: torch.Tensor,
         tokens: torch.Tensor) -> None:
    """Put codes, [T * kv_heads, ...], and the scales of quantised ones in their places."""
    for target, vectors in zip((stored.codes, stored.scales), encoded, strict=False):
        assert target is not None
        target[pages, :, tokens] = vectors.unflatten(0, (len(pages), -1))


def _write_open(x: torch.Tensor, opened: OpenPages, page: int, positions: torch.Tensor) -> None:
    """Write x, float32 [T, kv_heads, head_dim], to an open page; `positions` int64 [T]."""
    rotated = rotate(x.double()).float()
    for stored, rows, tokens in (
        (opened.tokens, rotated, positions % PAGE_LEN),
        (opened.first, rotated[positions == 0], positions[positions == 0]),
    ):
        if not len(rows):
            continue
        vectors = rows.flatten(0, 1)
        encoded = (
            (reference_fp16.encode(vectors),) if stored.scales is None
            else quantize_plainly(vectors)
        )
        _put(stored, encoded, torch.full_like(tokens, page), tokens)


def write_cache(k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch) -> None:
    """Define `Ops.write_cache`."""
    for s in range(batch.num_sequences):
        first, end, past = _bounds(batch, s)
        pages, tokens = _pages_and_tokens(batch, s, past, past + end - first)
        for x, stored, feedback, opened in (
            (k[first:end], layer.keys, layer.key_feedback, layer.k_open),
            (v[first:end], layer.values, None, layer.v_open),
        ):
            _write(x, stored, feedback, pages, tokens)
            if opened is not None:
                assert batch.open_pages is not None
                assert past // PAGE_LEN == (past + end - first - 1) // PAGE_LEN, "rows of two pages"
                positions = torch.arange(past, past + end - first)
                _write_open(x, opened, int(batch.open_pages[s]), positions)


def _read(stored: StoredTokens, head_dim: int, pages: torch.Tensor,
          tokens: torch.Tensor) -> torch.Tensor:
    """Read tokens of pages, float64 [T, kv_heads, head_dim], rotated if they are stored so."""
    codes = stored.codes[pages, :, tokens]
    if stored.bits == 32:
        return codes.double()
    flat = codes.flatten(0, 1)
    if stored.scales is None:
        vectors = reference_fp16.decode(flat)
    else:
        scales = stored.scales[pages, :, tokens].flatten(0, 1)
        vectors = dequantize(flat, scales, head_dim, stored.bits)
    return vectors.unflatten(0, codes.shape[:2]).double()


def _read_sequence(stored: StoredTokens, opened: OpenPages | None, head_dim: int, batch: Batch,
                   sequence: int, start: int, total: int) -> torch.Tensor:
    """Read positions start to total of a sequence, float64 [total - start, kv_heads, head_dim]."""
    vectors = _read(stored, head_dim, *_pages_and_tokens(batch, sequence, start, total))
    if opened is None:
        return vectors
    assert batch.open_pages is not None
    first_open = int(batch.past_len[sequence]) // PAGE_LEN * PAGE_LEN
    page = int(batch.open_pages[sequence])
    positions = torch.arange(max(start, first_open), total)
    pages = torch.full_like(positions, page)
    vectors[positions - start] = _read(opened.tokens, head_dim, pages, positions % PAGE_LEN)
    if start == 0 and first_open > 0:
        vectors[:1] = _read(opened.first, head_dim, torch.tensor([page]), torch.tensor([0]))
    return vectors


def attention(q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
              out: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Define `Ops.attention`."""
    kind = layer.cache_type
    for s in range(batch.num_sequences):
        first, end, past = _bounds(batch, s)
        total = past + end - first
        start = max(0, past + 1 - shape.sliding_window) if shape.sliding_window else 0
        where = shape.head_dim, batch, s, start, total
        k = _read_sequence(layer.keys, layer.k_open, *where)
        v = _read_sequence(layer.values, layer.v_open, *where)
        rows = q[first:end].double()
        added = _bias_scores(rows, layer.key_bias, batch, s, range(start, total), shape)
        rotated = rotate(rows) if kind.k_rotated else rows
        result = _attend(rotated, k, v, added, past - start, shape, sinks)
        out[first:end] = rotate_back(result) if kind.v_rotated else result


def _bias_scores(q: torch.Tensor, bias: KeyBias | None, batch: Batch, sequence: int,
                 positions: range, shape: AttentionShape) -> torch.Tensor | float:
    """Return what a layer's key bias adds to q @ k, float64 [heads, T, positions]; 0.0 for None."""
    if bias is None:
        return 0.0
    assert batch.inv_freq is not None
    sharing = shape.num_heads // shape.num_kv_heads
    first, second, pairs = (
        x.repeat_interleave(sharing, dim=0) for x in (bias.first, bias.second, bias.pairs.long())
    )
    index = pairs.expand(len(q), -1, -1)
    q1, q2 = q.gather(2, index), q.gather(2, index + bias.half)
    frequencies = batch.inv_freq[sequence].double()[pairs]
    angles = torch.tensor(positions, dtype=torch.float64)[:, None, None] * frequencies
    added = torch.einsum("thi,nhi->htn", q1 * first + q2 * second, angles.cos())
    added += torch.einsum("thi,nhi->htn", q2 * first - q1 * second, angles.sin())
    return added * batch.rope_factor


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | float,
            first: int, shape: AttentionShape, sinks: torch.Tensor | None) -> torch.Tensor:
    """Compute attention in float64.

    Args:
        q: [T, heads, head_dim].
        k, v: [N, kv_heads, head_dim].
        added: [heads, T, N], added to q @ k.
        first: index of the key at the position of q's first row.
        sinks: [heads], logits of keys without a value; None for none.

    Returns:
        [T, heads, head_dim].
    """
    sharing = shape.num_heads // shape.num_kv_heads
    k, v = (x.repeat_interleave(sharing, dim=1) for x in (k, v))
    scores = (torch.einsum("thd,nhd->htn", q, k) + added) * shape.scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    distance = torch.arange(first, first + len(q))[:, None] - torch.arange(len(k))
    hidden = distance < 0
    if shape.sliding_window:
        hidden |= distance >= shape.sliding_window
    scores.masked_fill_(hidden, -torch.inf)
    if sinks is not None:
        sink_scores = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("htn,nhd->thd", weights, v)
