"""Weights from a checkpoint into the buffers that the table has carved.

Every tensor is read once, checked, and written to its place; nothing is kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..backends.base import Ops
from ..backends.cuda.layout import StreamLinear
from ..checkpoint import Checkpoint
from ..formats import pack_linear
from ..formats.common import require_finite
from ..formats.packed import DenseLinear
from .blueprint import EMBEDDING, Blueprint, MlpPlan, NormPlan

if TYPE_CHECKING:
    from ..backends.base import Linear
    from ..cache.layout import KeyBias

# Rows of the embedding read at a time: what is in flight stays within tens of megabytes.
EMBEDDING_ROWS = 2048


@dataclass
class Weights:
    """A model's weights on their devices.

    Args:
        embedding: [vocab_size, hidden_size], or the head where that serves as both.
        norms: tensor name -> float32 [size], offsets inside.
        linears: layer name -> its packed or dense tensors.
        key_biases: what attention adds of each layer's key bias, once it has been taken out
            of the projections; see `key_bias`.
    """

    embedding: torch.Tensor | DenseLinear
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    linears: dict[str, Linear] = field(default_factory=dict)
    key_biases: list[KeyBias | None] | None = None


def load_weights(
    blueprint: Blueprint,
    checkpoint: Checkpoint,
    views: Mapping[str, torch.Tensor],
    ops: Mapping[str, Ops],
    advance: Callable[[int], None] | None = None,
) -> Weights:
    """Fill the views of `blueprint.specs()` from the checkpoint.

    Args:
        blueprint: what to load.
        checkpoint: where from.
        views: spec name -> its view in the weights buffer.
        ops: device -> what repacks codes there.
        advance: called with the bytes that a tensor takes on its device once it is there;
            all calls together sum up to the bytes of `blueprint.specs()`.

    Raises:
        InvalidCheckpoint: a file shrank, or holds values that cannot be (NaN, a group table
            that does not add up, a permutation that is none).
    """
    done = advance or (lambda nbytes: None)
    norms = {}
    for norm in blueprint.norms():
        norms[norm.spec.name] = _load_norm(norm, checkpoint, views[norm.spec.name])
        done(norm.spec.nbytes)
    linears: dict[str, Any] = {}
    for plan in blueprint.linears():
        specs = plan.specs
        tensors = {role: views[spec.name] for role, spec in specs.items()}
        (device,) = {spec.device for spec in specs.values()}
        linears[plan.name] = pack_linear(plan, checkpoint, tensors, ops[device])
        done(sum(spec.nbytes for spec in specs.values()))
    for layer in blueprint.layers:
        _share_permutations([linears[plan.name] for plan in (layer.q, layer.k, layer.v)])
        if isinstance(layer.mlp, MlpPlan):
            _share_permutations([linears[layer.mlp.gate.name], linears[layer.mlp.up.name]])
    if blueprint.embedding is None:
        head = linears[blueprint.head.name]
        assert isinstance(head, DenseLinear)
        return Weights(head, norms, linears)
    table = views[blueprint.embedding.name]
    _load_embedding(checkpoint, table, done)
    return Weights(table, norms, linears)


def _share_permutations(layers: Sequence[Any]) -> None:
    """Let layers that permute one input alike refer to one permutation.

    Operations of a card then permute and quantise it once (`LinearOps.prepare_linears`).
    """
    first, *others = layers
    for other in others:
        if not isinstance(first, StreamLinear) or not isinstance(other, StreamLinear):
            return
        if first.perm is None or other.perm is None:
            continue
        if torch.equal(first.perm.cpu(), other.perm.cpu()):
            other.perm = first.perm


def _load_norm(norm: NormPlan, checkpoint: Checkpoint, view: torch.Tensor) -> torch.Tensor:
    weight = checkpoint.read(norm.spec.name)
    require_finite(norm.spec.name, weight)
    view.copy_(weight.float() + norm.offset)
    return view


def _load_embedding(
    checkpoint: Checkpoint, table: torch.Tensor, done: Callable[[int], None]
) -> None:
    name = f"{EMBEDDING}.weight"
    for first in range(0, table.shape[0], EMBEDDING_ROWS):
        end = min(first + EMBEDDING_ROWS, table.shape[0])
        rows = checkpoint.read_rows(name, first, end)
        require_finite(name, rows)
        table[first:end].copy_(rows)
        done(rows.numel() * rows.element_size())
