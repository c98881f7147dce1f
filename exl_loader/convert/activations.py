"""Run the calibration text through the engine's layers, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..backends.base import Batch
from ..backends.reference.ops import ReferenceOps, dense_weight
from ..cache.layout import PAGE_LEN, CacheLayer, CacheType, cache_specs, pages_for
from ..checkpoint.rope import inv_freq
from ..formats import pack_linear
from ..formats.packed import TILE_COLUMNS, DenseLinear, PackedLinear
from ..model.blueprint import EMBEDDING, LayerPlan
from ..model.layers import build_layer, decoder_layer
from ..model.weights import Weights
from ..model.workspace import RowViews, workspace_specs
from ..utils.table import TensorSpec
from .gptq import Hessian
from .source import Source, input_groups


class _RecordingOps(ReferenceOps):
    """The reference operations, with linear layers in float32 that note down their inputs.

    float32 sums are exact enough for statistics over thousands of rows, and several times
    faster than the reference's float64.
    """

    def __init__(self) -> None:
        self.hessians: dict[int, Hessian] = {}

    def linear(self, x: torch.Tensor, w: Any, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        hessian = self.hessians.get(id(w))
        if hessian is not None:
            hessian.add(x)
        product = x @ dense_weight(w).float()
        if w.bias is not None:
            product += w.bias
        target = out[:, : w.out_features]
        target.copy_(product + target if add else product)

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Run what a recorder would put off until replay."""
        function(self, *args)


def _allocate(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in specs}


class Activations:
    """Hidden states of all calibration rows, carried from layer to layer.

    Args:
        source: the model.
        rows: ids of the calibration rows, all of the same length T.
    """

    def __init__(self, source: Source, rows: list[list[int]]):
        self._source, self._rows = source, rows
        self._ops = _RecordingOps()
        row_len = len(rows[0])
        cache_type = CacheType.parse("fp32")
        self._workspace = _allocate(
            workspace_specs(source.blueprint, ctx_size=row_len, cache_type=cache_type,
                            chunk_size=row_len, logits_rows=1)
        )
        self._cache_specs = cache_specs(source.config, pages_for(row_len), cache_type)
        self._cache_type = cache_type
        self._batch = self._one_sequence(row_len)
        self._views = RowViews.cut(self._workspace, row_len, source.config.head_dim)
        frequencies, factor = inv_freq(source.config.rope, row_len)
        self._ops.rope_table(
            self._batch.positions, torch.tensor(frequencies), factor, self._views.rope_table
        )
        self.restart()

    def _one_sequence(self, row_len: int) -> Batch:
        assert PAGE_LEN * pages_for(row_len) >= row_len
        return Batch(
            positions=torch.arange(row_len, dtype=torch.int32),
            q_start=torch.tensor([0, row_len], dtype=torch.int32),
            past_len=torch.zeros(1, dtype=torch.int32),
            page_table=torch.arange(pages_for(row_len), dtype=torch.int32)[None],
            max_total_len=row_len,
        )

    def restart(self) -> None:
        """Go back to the embeddings: the input of layer 0."""
        source = self._source
        table = source.checkpoint.read(f"{EMBEDDING}.weight")
        scaled = source.blueprint.architecture.embed_scale
        factor = source.config.hidden_size**0.5 if scaled else 1.0
        self._states = []
        for row in self._rows:
            state = torch.empty_like(self._views.x)
            self._ops.embed(torch.tensor(row, dtype=torch.int32), table, factor, state)
            self._states.append(state)

    def run_layer(
        self,
        index: int,
        *,
        replaced: Mapping[str, torch.Tensor] | None = None,
        record: bool = False,
        advance: bool = True,
    ) -> dict[str, Hessian]:
        """Run all rows through a layer, which must be the next one.

        Args:
            index: of the layer.
            replaced: layer name -> weight [in_features, out_features] to use instead of the
                source's.
            record: note down the inputs of the layers that will be quantised.
            advance: keep the outputs as the next layer's inputs; without it, the same layer
                can be run again.

        Returns:
            Name of the first layer of every `input_groups` group -> Hessian of its inputs;
            empty without `record`.
        """
        plan = self._source.blueprint.layers[index]
        weights = self._load(plan, replaced or {})
        cache = _allocate([s for s in self._cache_specs if s.name.startswith(f"cache.{index}.")])
        layer = build_layer(
            self._source.blueprint, index, weights,
            CacheLayer(cache[f"cache.{index}.k_codes"], None, cache[f"cache.{index}.v_codes"],
                       None, self._cache_type),
        )
        firsts = [group[0] for group in input_groups(plan)] if record else []
        hessians = {first.name: Hessian(first.in_features) for first in firsts}
        self._ops.hessians = {id(weights.linears[n]): h for n, h in hessians.items()}
        for state in self._states:
            self._views.x.copy_(state)
            decoder_layer(self._ops, layer, self._views, self._batch)
            if advance:
                state.copy_(self._views.x)
        self._ops.hessians = {}
        return hessians

    def head_hessian(self) -> Hessian:
        """The Hessian of the output head's inputs; only after the last layer."""
        config, norm = self._source.config, self._source.blueprint.norm
        weight = self._source.checkpoint.read(norm.spec.name).float() + norm.offset
        hessian = Hessian(config.hidden_size)
        for state in self._states:
            normed = torch.empty_like(state)
            self._ops.rms_norm(state, weight, config.rms_norm_eps, normed)
            hessian.add(normed)
        return hessian

    def _load(self, plan: LayerPlan, replaced: Mapping[str, torch.Tensor]) -> Weights:
        """Read one layer's weights; embedding and everything else stay out."""
        checkpoint = self._source.checkpoint
        norms = {
            norm.spec.name: checkpoint.read(norm.spec.name).float() + norm.offset
            for norm in plan.norms()
        }
        linears: dict[str, PackedLinear | DenseLinear] = {}
        for linear in plan.linears():
            named = {spec.name: role for role, spec in linear.specs.items()}
            tensors = {named[n]: t for n, t in _allocate(list(linear.specs.values())).items()}
            packed = pack_linear(linear, checkpoint, tensors, self._ops)
            assert isinstance(packed, DenseLinear)
            if linear.name in replaced:
                packed.weight = _tiled(replaced[linear.name])
            linears[linear.name] = packed
        return Weights(torch.empty(0), norms, linears)


def _tiled(weight: torch.Tensor) -> torch.Tensor:
    """A weight [K, N] in `DenseLinear`'s layout [tiles, K, TILE_COLUMNS]."""
    in_features, out_features = weight.shape
    tiles = -(-out_features // TILE_COLUMNS)
    padded = weight.new_zeros(in_features, tiles * TILE_COLUMNS)
    padded[:, :out_features] = weight
    return padded.view(in_features, tiles, TILE_COLUMNS).transpose(0, 1).contiguous()
