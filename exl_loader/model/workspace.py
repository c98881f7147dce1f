"""The workspace: every tensor that a forward pass touches, planned before loading.

A step has at most `chunk_size` rows of at most `max_batch_size` sequences, and its logits at
most `logits_rows` rows. Steps of fewer rows use the first rows of the same tensors, so that
no response, however long, needs a byte more than the first token did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..backends import backend_of
from ..backends.base import AttentionShape, Shapes, StepSizes
from ..cache.layout import MAX_BIAS_PAIRS, CacheType, pages_for
from ..utils.table import TensorSpec

if TYPE_CHECKING:
    import torch

    from .blueprint import Blueprint

# Prefill rows of a step: enough to spread unpacking of the weights over, few enough that a
# stop request or a progress bar need not wait for long.
DEFAULT_CHUNK_SIZE = 256
# Texts that run at once: what a web UI with a few users needs, for a few ten KiB each.
DEFAULT_MAX_BATCH_SIZE = 8
# Rows of logits at a time where a caller wants all of them (128 KiB a row and more).
DEFAULT_LOGITS_ROWS = 32
# Pairs of a row and an expert that a device runs one by one, reading an expert's weights for
# each: two rows that chose the same expert could share them.
MAX_PAIRS = 16


def workspace_specs(
    blueprint: Blueprint,
    *,
    ctx_size: int,
    cache_type: CacheType,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    logits_rows: int = DEFAULT_LOGITS_ROWS,
) -> list[TensorSpec]:
    """List the workspace's tensors on every device of the blueprint.

    Args:
        blueprint: the model.
        ctx_size: tokens of the longest sequence, which bounds a page table's row.
        cache_type: bits of keys and values; the attention scratch depends on it.
        chunk_size: most rows of one step.
        max_batch_size: most sequences of one step.
        logits_rows: most rows of logits of one step; at least `max_batch_size` are made.
    """
    logits_rows = max(logits_rows, max_batch_size)
    specs: list[TensorSpec] = []
    for device in blueprint.device_map.devices:
        has_head = device == blueprint.device_map.head
        tensors = {
            **_input_tensors(blueprint, chunk_size, max_batch_size, pages_for(ctx_size)),
            **({"head_rows": ("int32", (logits_rows,))} if has_head else {}),
            **_row_tensors(blueprint, chunk_size),
        }
        if has_head:
            tensors.update(_head_tensors(blueprint, logits_rows))
        backend = backend_of(device)
        step = step_sizes(
            blueprint, device, rows=chunk_size, logits_rows=logits_rows,
            max_batch_size=max_batch_size, ctx_size=ctx_size, cache_type=cache_type,
        )
        tensors.update(backend.workspace_specs(step))
        tensors.update(_key_biases(blueprint, device))
        tensors["scratch"] = ("uint8", (backend.scratch_bytes(step),))
        specs += [
            TensorSpec(name, "workspace", dtype, shape, device)
            for name, (dtype, shape) in tensors.items()
        ]
    return specs


# What the host writes for a step. Neighbours in the workspace, so that one copy brings all of
# it to a device.
INPUTS = ("ids", "positions", "q_start", "past_len", "page_table", "inv_freq", "head_rows")


def _input_tensors(blueprint: Blueprint, rows: int, sequences: int, max_pages: int) -> Shapes:
    """List `INPUTS` but for the head's."""
    return {
        "ids": ("int32", (rows,)),
        "positions": ("int32", (rows,)),
        "q_start": ("int32", (sequences + 1,)),
        "past_len": ("int32", (sequences,)),
        "page_table": ("int32", (sequences, max_pages)),
        "inv_freq": ("float32", (sequences, blueprint.config.rope.rotary_dim // 2)),
    }


def _row_tensors(blueprint: Blueprint, rows: int) -> Shapes:
    config = blueprint.config
    hidden = config.hidden_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    pairs = config.rope.rotary_dim // 2
    tensors: Shapes = {
        "x": ("float32", (rows, hidden)),
        "h": ("float32", (rows, hidden)),
        "q": ("float32", (rows, q_size)),
        "k": ("float32", (rows, kv_size)),
        "v": ("float32", (rows, kv_size)),
        "attn": ("float32", (rows, q_size)),
        "gate": ("float32", (rows, config.intermediate_size)),
        "up": ("float32", (rows, config.intermediate_size)),
        "rope_table": ("float32", (rows, 2, pairs)),
    }
    if config.num_local_experts:
        top_k = config.num_experts_per_tok
        tensors["router_logits"] = ("float32", (rows, config.num_local_experts))
        tensors["route_weights"] = ("float32", (rows, top_k))
        tensors["route_experts"] = ("int32", (rows, top_k))
        tensors["expert_rows"] = ("int32", (rows * top_k,))
        tensors["expert_weights"] = ("float32", (rows * top_k,))
        tensors["expert_x"] = ("float32", (rows, hidden))
    return tensors


def _head_tensors(blueprint: Blueprint, rows: int) -> Shapes:
    config = blueprint.config
    return {
        "head_x": ("float32", (rows, config.hidden_size)),
        "logits": ("float32", (rows, config.vocab_size)),
    }


def _key_biases(blueprint: Blueprint, device: str) -> Shapes:
    """Room for what attention adds of each layer's key bias: how much is known after loading."""
    layers = [layer for layer in blueprint.layers if layer.device == device]
    if not any("bias" in layer.k.specs and layer.k_norm is None for layer in layers):
        return {}
    words = blueprint.config.num_key_value_heads * MAX_BIAS_PAIRS
    return {"key_biases": ("int32", (len(layers), 3, words))}


def step_sizes(
    blueprint: Blueprint,
    device: str,
    *,
    rows: int,
    logits_rows: int,
    max_batch_size: int,
    ctx_size: int,
    cache_type: CacheType,
) -> StepSizes:
    """Return what the largest step of a device is; arguments as those of `workspace_specs`."""
    config = blueprint.config
    layers = [layer for layer in blueprint.layers if layer.device == device]
    products = {
        (rows, linear.stored_rows, linear.out_features)
        for layer in layers
        for linear in layer.linears()
    }
    has_head = device == blueprint.device_map.head
    if has_head:
        products.add((logits_rows, config.hidden_size, config.vocab_size))
    return StepSizes(
        rows=rows,
        logits_rows=logits_rows if has_head else 0,
        max_batch_size=max_batch_size,
        ctx_size=ctx_size,
        cache_type=cache_type,
        attention=AttentionShape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, 1.0
        ),
        products=frozenset(products),
        vocab_size=config.vocab_size,
        num_layers=len(layers),
        num_experts=config.num_local_experts,
    )


@dataclass(frozen=True)
class RowViews:
    """The workspace's tensors cut to the T rows of a step, in the shapes operations take.

    `q_heads`, `k_heads`, `v_heads` and `attn_heads` are [T, heads, head_dim] and `q_rows`,
    `k_rows` [T * heads, head_dim] views of `q`, `k`, `v` and `attn`. The six from
    `router_logits` on are None where the MLP is dense. The last three are [P, ...] with a row
    for each pair of a row and one of its experts, and None where that is more than MAX_PAIRS.
    """

    x: torch.Tensor
    h: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn: torch.Tensor
    q_heads: torch.Tensor
    k_heads: torch.Tensor
    v_heads: torch.Tensor
    attn_heads: torch.Tensor
    q_rows: torch.Tensor
    k_rows: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    rope_table: torch.Tensor
    scratch: torch.Tensor
    router_logits: torch.Tensor
    route_weights: torch.Tensor
    route_experts: torch.Tensor
    expert_rows: torch.Tensor
    expert_weights: torch.Tensor
    expert_x: torch.Tensor
    pair_gate: torch.Tensor | None
    pair_up: torch.Tensor | None
    pair_x: torch.Tensor | None

    @classmethod
    def cut(cls, tensors: Mapping[str, torch.Tensor], rows: int, head_dim: int) -> RowViews:
        """Cut the first `rows` rows out of the workspace's tensors."""
        views = {
            name: tensors[name][:rows]
            for name in ("x", "h", "q", "k", "v", "attn", "gate", "up", "rope_table")
        }
        for name in ("q", "k", "v", "attn"):
            views[f"{name}_heads"] = views[name].view(rows, -1, head_dim)
        for name in ("q", "k"):
            views[f"{name}_rows"] = views[name].view(-1, head_dim)
        return cls(**views, **_expert_views(tensors, rows), scratch=tensors["scratch"])


def _expert_views(tensors: Mapping[str, torch.Tensor], rows: int) -> dict[str, Any]:
    names = ("router_logits", "route_weights", "route_experts", "expert_x")
    of_pairs = {"pair_gate": "gate", "pair_up": "up", "pair_x": "expert_x"}
    views: dict[str, Any] = dict.fromkeys((*names, "expert_rows", "expert_weights", *of_pairs))
    if "expert_x" not in tensors:
        return views
    views.update({name: tensors[name][:rows] for name in names})
    pairs = rows * tensors["route_experts"].shape[1]
    for name in ("expert_rows", "expert_weights"):
        views[name] = tensors[name][:pairs]
    if pairs <= min(MAX_PAIRS, len(tensors["expert_x"])):
        views.update({name: tensors[source][:pairs] for name, source in of_pairs.items()})
    return views
