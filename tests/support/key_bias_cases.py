"""Layers and models whose keys have large biases."""

from __future__ import annotations

import torch

from exl_loader.backends.base import AttentionShape
from exl_loader.model.parts.key_bias import remove_from, split_bias
from support import hf_models
from support.cache_layers import attend, make_batch, make_layer, part, write


def qwen_bias(kv_heads, head_dim, half, size=100.0, count=3, seed=0):
    """Bias of 0.2 everywhere, and of up to `size` at a few places of each head's turned part."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(kv_heads, head_dim, generator=generator) * 0.2
    for head in bias:
        places = torch.randperm(2 * half, generator=generator)[:count]
        head[places] = (torch.rand(count, generator=generator) + 0.5) * size / 1.5
    return bias


def turned(x, positions, frequencies, factor=1.0):
    """Apply RoPE by its definition: x [T, heads, head_dim], frequencies [T, half]."""
    angles = positions.double()[:, None] * frequencies.double()
    cos, sin = (f(angles)[:, None] * factor for f in (torch.cos, torch.sin))
    half, out = frequencies.shape[1], x.double().clone()
    a, b = out[..., :half].clone(), out[..., half : 2 * half].clone()
    out[..., :half], out[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
    return out.float()


class Case:
    """Keys, values and queries of some sequences, of a layer whose keys have a bias.

    Args:
        past, new: tokens of each sequence before and in the call.
        size: of the bias; 0 for none at all.
    """

    def __init__(self, past, new, *, heads=8, kv_heads=2, head_dim=64, half=None, size=100.0,
                 factor=1.0, window=0, softcap=0.0, theta=1e6, seed=0):
        self.half = half or head_dim // 2
        self.shape = AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, softcap, window)
        self.batch = make_batch(past, new)
        self.whole = part(self.batch, [0] * len(past), [p + n for p, n in
                                                       zip(past, new, strict=True)])
        # Sequences of different rope_len may have frequencies of their own.
        steps = torch.arange(self.half) / self.half
        frequencies = torch.stack([theta ** -(steps * (1 - 0.1 * s)) for s in range(len(past))])
        for batch in (self.batch, self.whole):
            batch.inv_freq, batch.rope_factor = frequencies.float().contiguous(), factor
        self.bias = qwen_bias(kv_heads, head_dim, self.half, size) if size else None
        generator = torch.Generator().manual_seed(seed + 1)
        rows = self.whole.num_rows
        self.k, self.v = torch.randn(2, rows, kv_heads, head_dim, generator=generator)
        self.q = self._turned(torch.randn(rows, heads, head_dim, generator=generator), self.whole)
        new_rows = torch.cat([
            torch.arange(int(first) + p, int(end)) for first, end, p in
            zip(self.whole.q_start[:-1], self.whole.q_start[1:], past, strict=True)
        ])  # fmt: skip
        self.q = self.q[new_rows].contiguous()

    def _turned(self, x, batch):
        lengths = batch.q_start.diff().long()
        frequencies = batch.inv_freq.repeat_interleave(lengths, dim=0)
        return turned(x, batch.positions, frequencies, batch.rope_factor)

    def layer(self, writer, cache_type, taken_out):
        """Return a layer that holds all keys, with the bias inside or beside them."""
        heads, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        layer = make_layer(cache_type, int(self.batch.page_table.max()) + 1, heads, head_dim)
        bias = torch.zeros(heads, head_dim) if self.bias is None else self.bias.clone()
        if taken_out:
            layer.key_bias = split_bias(bias, torch.full((heads,), float(head_dim)), self.half)
            assert layer.key_bias is not None
            remove_from(bias, layer.key_bias)
        k = self._turned(self.k + bias, self.whole)
        write(writer, k, self.v, layer, self.whole)
        return layer

    def attend(self, ops, cache_type, taken_out=False):
        layer = self.layer(ops, cache_type, taken_out)
        return attend(ops, self.q, layer, self.batch, self.shape)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def biased_qwen(folder, size):
    """Save a random Qwen2 whose key biases are large in two channels of each head."""
    hf = hf_models.make_model("qwen2", 5, folder)
    with torch.no_grad():
        for layer in hf.model.layers:
            bias = layer.self_attn.k_proj.bias.view(4, -1)
            bias[:, 3] += size
            bias[:, -2] -= size
            # As in trained models, queries are small in channels with a large bias.
            for projection in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
                rows = projection.view(4, bias.shape[1], -1)
                for channel in (3, bias.shape[1] - 2):
                    rows[:, channel] *= 0.02
                    rows[:, (channel + bias.shape[1] // 2) % bias.shape[1]] *= 0.02
    hf.save_pretrained(folder)
    return hf
