"""The definition of every operation in plain PyTorch. Tests compare the kernels with it.

Sums are computed in float64 and rounded once, so the results do not depend on an order of
float32 sums. These operations are slow, because every call decodes quantised matrices again.
They also run on machines without a compiler. `base.py` has the contracts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..cpu.layout import PackedLinear
from ..layouts import TILE_COLUMNS, DenseLinear
from ..main_memory import MainMemoryOps
from . import cache as reference_cache
from . import planes
from .codec import cache_round_trip as cache_round_trip
from .rounding import RoundingOps

if TYPE_CHECKING:
    from ...cache.layout import CacheLayer
    from ..base import AttentionShape, Batch, Call, DeviceOps, Linear, Routing


# GPT-OSS clamps the factors of its gate to it.
SWIGLU_LIMIT = 7.0


def dense_weight(w: DenseLinear) -> torch.Tensor:
    """Return the matrix of a dense layer, [in_features, out_features] in its own dtype."""
    rows = w.weight.transpose(0, 1).reshape(w.in_features, -1)
    return rows[:, : w.out_features]


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply the activation of this name; see `Ops.gate`."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    assert activation == "gelu_tanh", activation
    return F.gelu(x, approximate="tanh")


class ReferenceOps(RoundingOps, MainMemoryOps):
    """The operations of `base.DeviceOps`, by their definitions."""

    name = "reference"

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        function(self)

    def prepare(self, calls: Sequence[Call]) -> list[Callable[[], None]]:
        return [partial(call.run, self) for call in calls]

    def embed(self, ids: torch.Tensor, table: torch.Tensor | Linear, factor: float,
              out: torch.Tensor) -> None:
        rows = ids.long()
        if isinstance(table, DenseLinear):
            picked = table.weight[rows // TILE_COLUMNS, :, rows % TILE_COLUMNS]
        else:
            assert isinstance(table, torch.Tensor)
            picked = table[rows]
        torch.mul(picked.float(), factor, out=out)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        exact = x.double()
        scale = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
        out.copy_(exact * scale * weight)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                   eps: float, out: torch.Tensor) -> None:
        exact = x.double().unflatten(0, (-1, len(weight)))
        variance, mean = torch.var_mean(exact, dim=-1, keepdim=True, correction=0)
        normalized = (exact - mean) * torch.rsqrt(variance + eps) * weight
        if bias is not None:
            normalized += bias
        out.copy_(normalized.flatten(0, 1))

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        assert isinstance(w, (PackedLinear, DenseLinear))
        weight = planes.dequantize(w) if isinstance(w, PackedLinear) else dense_weight(w)
        product = x.double() @ weight.double()
        if w.bias is not None:
            product += w.bias
        target = out[:, : w.out_features]
        target.copy_(product + target if add else product)

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        # Beyond a few thousand positions a float32 product is wrong by 1e-4 rad and more.
        angles = positions.double()[:, None] * inv_freq.double()
        out[:, 0] = angles.cos() * factor
        out[:, 1] = angles.sin() * factor

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        half = table.shape[2]
        if mean is not None:
            x -= mean
        cos, sin = table[:, None, 0], table[:, None, 1]
        turned = x[..., : 2 * half]
        pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
        first, second = pairs.clone().unbind(-1 if interleaved else -2)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        turned.copy_(torch.stack(rotated, -1 if interleaved else -2).flatten(-2))

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        reference_cache.write_cache(k, v, layer, batch)

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        reference_cache.attention(q, layer, batch, shape, out, sinks)

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        if activation == "clamped_swiglu":
            factor = up.double().clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1
            activated = activate(gate.double().clamp(max=SWIGLU_LIMIT), "quick_gelu")
            out.copy_(activated * factor)
        else:
            out.copy_(activate(gate.double(), activation) * up)

    def activate(self, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        out.copy_(activate(x.double(), activation))

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
        x.copy_(x.double() + y.double() * factor)

    def add_gated_rows(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> None:
        x.copy_(x.double() + torch.sigmoid(logits.double())[:, None] * y)

    def clamp(self, x: torch.Tensor, limit: float) -> None:
        x.clamp_(-limit, limit)

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        x.copy_(cap * torch.tanh(x.double() / cap))

    def moe_route(self, router_logits: torch.Tensor, routing: Routing, weights: torch.Tensor,
                  experts: torch.Tensor) -> None:
        exact = router_logits.double()
        scores = exact.sigmoid() if routing.score == "sigmoid" else exact.softmax(dim=-1)
        # Without a correction experts are sorted by logits, because different logits may round
        # to equal scores.
        choice = exact if routing.correction is None else scores + routing.correction
        order = choice.argsort(dim=-1, descending=True, stable=True)[:, : routing.top_k]
        chosen = scores.gather(-1, order)
        if routing.normalize:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        weights.copy_(chosen * routing.factor)
        experts.copy_(order)

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x[rows.long()])

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        out[rows.long()] += x * weights[:, None]

    def pack_words(self, words: torch.Tensor, first: int, groups: torch.Tensor,
                  codes: torch.Tensor) -> None:
        planes.pack_words(words, first, groups, codes)

    def pack_gptq(self, qweight: torch.Tensor, bits: int, perm: torch.Tensor | None,
                  groups: torch.Tensor, codes: torch.Tensor) -> None:
        planes.pack_gptq(qweight, bits, perm, groups, codes)
