"""Run the calibration text through the engine's layers, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..backends.base import Batch, Linear
from ..backends.layouts import DenseLinear, fill_dense
from ..backends.reference.ops import ReferenceOps, dense_weight
from ..cache.layout import PAGE_LEN, CacheLayer, CacheType, cache_specs, pages_for
from ..checkpoint.rope import inv_freq
from ..model.builder import Builder
from ..model.decoder import DecoderLayer
from ..model.parts.part import LayerState, Loading, StepViews
from ..model.step import workspace_specs
from ..utils.table import MAIN_MEMORY, TensorSpec
from .error_feedback import Hessian
from .source import Source


class _RecordingOps(ReferenceOps):
    """The reference operations, with linear layers in float32 that record their inputs.

    float32 sums are exact enough for statistics over thousands of rows, and are several times
    faster than the float64 of the reference.
    """

    def __init__(self) -> None:
        self.hessians: dict[int, Hessian] = {}

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        hessian = self.hessians.get(id(w))
        if hessian is not None:
            hessian.add(x)
        assert isinstance(w, DenseLinear)
        product = x @ dense_weight(w).float()
        if w.bias is not None:
            product += w.bias
        target = out[:, : w.out_features]
        target.copy_(product + target if add else product)


def _allocate(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    return {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in specs}


class Activations:
    """The hidden states of all calibration rows, updated layer by layer.

    Args:
        source: the model.
        rows: token ids of the calibration rows, which have the same length T.
    """

    def __init__(self, source: Source, rows: list[list[int]]):
        self._source, self._rows = source, rows
        self._ops = _RecordingOps()
        row_len = len(rows[0])
        cache_type = CacheType.parse("fp32")
        self._workspace = _allocate(
            workspace_specs(source.parts.stages(), ctx_size=row_len, cache_type=cache_type,
                            chunk_size=row_len, logits_rows=1)
        )
        self._cache_specs = cache_specs(source.config, pages_for(row_len), cache_type)
        self._cache_type = cache_type
        self._batch = self._one_sequence(row_len)
        self._views = StepViews(self._workspace, self._batch, source.config.hidden_size)
        for rope in source.parts.ropes():
            frequencies, factor = inv_freq(rope.config, row_len)
            rope.run(self._ops, self._views, torch.tensor(frequencies), factor)
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
        """Reset the hidden states to the embeddings, which are the input of layer 0."""
        source = self._source
        table = source.checkpoint.read(source.parts.embedding.spec.name)
        factor = source.config.embedding_multiplier
        positions = source.parts.positions
        if positions is not None:
            positions.load(self._loading(positions.specs()))
        self._states = []
        for row in self._rows:
            state = self._views.x
            self._ops.embed(torch.tensor(row, dtype=torch.int32), table, factor, state)
            if positions is not None:
                positions.run(self._ops, self._views)
            self._states.append(state.clone())

    def run_layer(
        self,
        index: int,
        *,
        replaced: Mapping[str, torch.Tensor] | None = None,
        record: bool = False,
        advance: bool = True,
    ) -> dict[str, Hessian]:
        """Run all rows through the next layer.

        Args:
            index: number of the layer.
            replaced: name of a linear layer -> weight [in_features, out_features] to use instead
                of the source's.
            record: record the inputs of the linear layers that will be quantised.
            advance: keep the outputs as the inputs of the next layer. Without it the same layer
                can be run again.

        Returns:
            Name of the first layer of every `input_groups` group -> Hessian of its inputs;
            empty without `record`.
        """
        layer = self._load(index, replaced or {})
        cache = _allocate([s for s in self._cache_specs if s.name.startswith(f"cache.{index}.")])
        state = LayerState(
            CacheLayer(cache[f"cache.{index}.k_codes"], None, cache[f"cache.{index}.v_codes"],
                       None, self._cache_type)
        )
        firsts = [group[0] for group in layer.input_groups()] if record else []
        hessians = {first.name: Hessian(first.spec.in_features) for first in firsts}
        self._ops.hessians = {id(first.weights): hessians[first.name] for first in firsts}
        for hidden in self._states:
            self._views.x.copy_(hidden)
            layer.run(self._ops, self._views, state)
            if advance:
                hidden.copy_(self._views.x)
        self._ops.hessians = {}
        return hessians

    def head_hessian(self) -> Hessian:
        """Return the Hessian of the output head's inputs. Call it only after the last layer."""
        source, norm = self._source, self._source.parts.head.norm
        norm.load(self._loading(norm.specs()))
        hessian = Hessian(source.config.hidden_size)
        for state in self._states:
            normed = torch.empty_like(state)
            norm.run(self._ops, state, normed)
            hessian.add(normed)
        return hessian

    def _load(self, index: int, replaced: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """Read the weights of one layer."""
        source = self._source
        # A new object each time, so that its weights are freed with it.
        layer = Builder(source.config, source.checkpoint).layer(index, MAIN_MEMORY)
        layer.load(self._loading(layer.specs()))
        for linear in layer.linears:
            weights = linear.weights
            assert isinstance(weights, DenseLinear)
            if linear.name in replaced:
                weight = replaced[linear.name]
                weights.weight = torch.zeros_like(weights.weight, dtype=weight.dtype)
                fill_dense(weight.t().contiguous(), 0, weights.weight)
        return layer

    def _loading(self, specs: Iterable[TensorSpec]) -> Loading:
        """Return what parts with these specs load into: new memory."""
        views = _allocate(list(specs))
        return Loading(self._source.checkpoint, views, {MAIN_MEMORY: self._ops})
