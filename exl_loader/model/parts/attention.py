"""Attention over the key/value cache, with RoPE and norms of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...cache.layout import MAX_BIAS_PAIRS, MAX_BIAS_SHARING
from .linear import Linear, run_linears
from .norm import Norm
from .part import Block, LayerState, Loading, StepViews
from .rope import Rope
from .vector import Vector

if TYPE_CHECKING:
    import torch

    from ...backends.base import AttentionShape, DeviceOps, Ops, Shapes
    from ...cache.layout import KeyBias


@dataclass(eq=False)
class Attention(Block):
    """o(attention(rope(q_norm(q(x))), rope(k_norm(k(x))), v(x))).

    Args:
        q_norm, k_norm: of each head or of all heads together, before RoPE; None where there is
            none.
        shape: heads, scale, soft cap and sliding window.
        rope: the angles; None where the layer has no RoPE.
        clip: queries, keys and values are clipped to -clip..clip first; 0 for no.
        sinks: a logit of each head that joins the softmax of its rows; None where there are none.

    Attributes:
        key_bias: the part of the key bias that attention adds, because the stored keys are
            without it; see `key_bias`.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    shape: AttentionShape
    rope: Rope | None
    clip: float = 0.0
    sinks: Vector | None = None
    key_bias: KeyBias | None = field(init=False, default=None, repr=False)
    _key_bias_is_taken: bool = field(init=False, default=False, repr=False)

    def weights(self) -> Iterator[Norm | Linear | Vector]:
        yield from (self.q, self.k, self.v)
        if self.q_norm is not None:
            yield self.q_norm
        if self.k_norm is not None:
            yield self.k_norm
        yield self.o
        if self.sinks is not None:
            yield self.sinks

    def input_groups(self) -> list[list[Linear]]:
        return [[self.q, self.k, self.v], [self.o]]

    def workspace(self, rows: int) -> Shapes:
        queries = ("float32", (rows, self.q.out_features))
        keys = ("float32", (rows, self.k.out_features))
        return {"q": queries, "k": keys, "v": keys, "attn": queries}

    def layer_workspace(self) -> Shapes:
        """Room for `key_bias`: how much of the bias it is turns out after loading."""
        if not self._has_constant_bias():
            return {}
        return {"key_biases": ("int32", (3, self.shape.num_kv_heads * MAX_BIAS_PAIRS))}

    def load(self, loading: Loading) -> None:
        """Read the weights."""
        super().load(loading)
        same_input = [self.q, self.k, self.v]
        ops = loading.ops[self.q.device]
        ops.share_permutations([linear.weights for linear in same_input])

    def take_key_bias(self, ops: DeviceOps, input_norm: Norm | None,
                      workspace: Mapping[str, torch.Tensor], room: torch.Tensor) -> None:
        """Move the large part of the key bias from the projection to `key_bias`, once.

        Args:
            ops: the device's operations.
            input_norm: the norm in front of the block; None where there is none.
            workspace: tensors by name; those of a step are used.
            room: int32 [3, kv_heads * MAX_BIAS_PAIRS] of the workspace, for the result.
        """
        from .key_bias import take_key_bias

        if self._key_bias_is_taken or not self._has_constant_bias():
            return
        self._key_bias_is_taken = True
        assert self.rope is not None
        self.key_bias = take_key_bias(
            ops, self.k.weights, input_norm, self.shape, self.rope.pairs, workspace, room
        )

    @property
    def may_add_bias(self) -> bool:
        """Whether attention can add a `KeyBias` to the layer's scores.

        It does so with the frequencies of the first RoPE, to the pairs of the half-split order.
        """
        rope, sharing = self.rope, self.shape.num_heads // self.shape.num_kv_heads
        turns = rope is not None and rope.index == 0 and not rope.interleaved
        return turns and sharing <= MAX_BIAS_SHARING

    def _has_constant_bias(self) -> bool:
        # After a k_norm or clipping the contribution of the bias is no longer constant, so it
        # stays in the projection.
        return self.may_add_bias and self.k.has_bias and self.k_norm is None and not self.clip

    def run(self, ops: Ops, views: StepViews, state: LayerState, x: torch.Tensor,
            out: torch.Tensor, add: bool) -> None:
        rows, scratch, shape = views.rows, views.scratch, self.shape
        q = views.view("q", rows, shape.num_heads, shape.head_dim)
        k = views.view("k", rows, shape.num_kv_heads, shape.head_dim)
        v = views.view("v", rows, shape.num_kv_heads, shape.head_dim)
        attn = views.view("attn", rows, shape.num_heads, shape.head_dim)
        linears = self.q, self.k, self.v
        outs = [
            views.view(name, rows, linear.out_features)
            for name, linear in zip("qkv", linears, strict=True)
        ]
        run_linears(ops, x, linears, outs, scratch)
        if self.clip:
            for projected in (q, k, v):
                ops.clamp(projected, self.clip)
        if self.q_norm is not None:
            heads = views.view("q", q.numel() // self.q_norm.size, self.q_norm.size)
            self.q_norm.run(ops, heads, heads)
        if self.k_norm is not None:
            heads = views.view("k", k.numel() // self.k_norm.size, self.k_norm.size)
            self.k_norm.run(ops, heads, heads)
        if self.rope is not None:
            self.rope.turn(ops, views, q)
            self.rope.turn(ops, views, k, state.cache.key_mean)
        ops.write_cache(k, v, state.cache, views.batch, scratch)
        sinks = None if self.sinks is None else self.sinks.values
        ops.attention(q, state.cache, views.batch, shape, attn, scratch, sinks)
        project = self.o.add if add else self.o.run
        project(ops, views.view("attn", rows, self.q.out_features), out, scratch)
