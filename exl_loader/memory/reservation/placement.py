"""Which layers go to which device, and what that takes of each: sums of the true table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...backends import backend_of
from ...cache.layout import CacheType, cache_specs, pages_for
from ...model.builder import ModelParts, StageParts, WeightCosts, build_parts
from ...model.step import workspace_specs
from ...utils.table import DeviceMap, TensorSpec
from ..segments import Segment, place
from .budgets import Budget
from .options import RunOptions
from .split import largest_fitting
from .staging import staging_bytes

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from ...checkpoint.config import ModelConfig

# Before the names of a draft model's tensors, which lie in the model's own buffers.
DRAFT_PREFIX = "draft."


@dataclass(frozen=True)
class Run:
    """A model on its devices, its open checkpoint, and the tokens that its cache is for."""

    parts: ModelParts
    checkpoint: Checkpoint
    ctx_size: int


@dataclass(frozen=True)
class Share:
    """What one device takes: its layers and its buffers, in bytes.

    Of the buffers, `draft_bytes` are a draft model's.
    """

    budget: Budget
    first_layer: int
    end_layer: int
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    draft_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The three buffers."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def spare_bytes(self) -> int:
        """What stays free; negative where it does not fit."""
        return self.budget.spare_bytes(self.total_bytes, self.overhead_bytes)


def segments_of(
    parts: ModelParts, ctx_size: int, options: RunOptions, draft: Run | None = None
) -> dict[tuple[str, str], Segment]:
    """Lay out the whole table of a run: what the loader allocates and the plan sums."""
    specs = _table(parts, ctx_size, options)
    if draft is not None:
        specs += [
            replace(spec, name=DRAFT_PREFIX + spec.name)
            for spec in _table(draft.parts, draft.ctx_size, options)
        ]
    return place(specs)


def _table(parts: ModelParts, ctx_size: int, options: RunOptions) -> list[TensorSpec]:
    pages = pages_for(ctx_size)
    specs = parts.specs()
    specs += cache_specs(parts.config, pages, options.cache_type, parts.device_map)
    return specs + _workspace(parts.stages(), ctx_size, options)


class Placer:
    """Puts contiguous layer ranges on devices, in the devices' order.

    Args:
        config, checkpoint: the model.
        budgets: the devices that may be used.
        draft: a draft model, which lives as a whole where the first layer does.
        ctx_size_draft: its tokens of context; 0 for as many as the model's.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, budgets: Sequence[Budget],
        draft: Placer | None = None, ctx_size_draft: int = 0,
    ) -> None:
        self.draft = draft
        self._ctx_size_draft = ctx_size_draft
        self.config = config
        self.budgets = list(budgets)
        self._checkpoint = checkpoint
        self._by_map: dict[DeviceMap, ModelParts] = {}
        # By kind of device: bytes depend on its alignment, not on which one it is.
        self._wholes: dict[str, ModelParts] = {}
        self._costs: dict[str, WeightCosts] = {}
        self._cache_bytes: dict[tuple[str, int, CacheType], int] = {}
        self._workspace_bytes: dict[tuple[object, ...], int] = {}
        whole = self._whole(budgets[0].device)
        self._widths = [layer.widths for layer in whole.layers]
        # Tables of experts and key biases have a room for each layer in the workspace.
        self._layers_have_rooms = bool(config.num_local_experts) or any(
            layer.layer_workspace() for layer in whole.layers
        )
        self._staging_bytes = staging_bytes(whole, checkpoint)
        if draft is not None:
            self._staging_bytes = max(self._staging_bytes, draft._staging_bytes)
        names = (budget.device for budget in budgets)
        self._staged_on = next((n for n in names if backend_of(n).is_main_memory), None)

    def parts(self, device_map: DeviceMap) -> ModelParts:
        """Make the parts for a device map, once each."""
        found = self._by_map.get(device_map)
        if found is None:
            found = build_parts(self.config, self._checkpoint, device_map)
            self._by_map[device_map] = found
        return found

    def place(self, ctx_size: int, options: RunOptions) -> list[Share]:
        """Give each device in turn as many layers as fit.

        With the devices in this order no other contiguous split fits where this one does
        not: every device holds the most it can. The last device gets what is left, fitting
        or not, so that the shortfall shows.

        Returns:
            a share for each device that holds a layer.
        """
        num_layers, first = self.config.num_hidden_layers, 0
        shares: list[Share] = []
        for budget in self.budgets:
            end = num_layers
            if budget is not self.budgets[-1]:
                end = self._most(budget, first, ctx_size, options)
            if end > first:
                shares.append(self._share(budget, first, end, ctx_size, options))
                first = end
            if first == num_layers:
                break
        return shares

    def most_pages(self, options: RunOptions) -> int:
        """Return more cache pages than could fit if the cache were all there is."""
        free = sum(budget.capacity.free_bytes for budget in self.budgets)
        (page,) = place(cache_specs(self.config, 1, options.cache_type)).values()
        return free // page.nbytes + 1

    def draft_run(self, shares: Sequence[Share], ctx_size: int) -> Run | None:
        """Return what the draft model will be beside these shares; None without one."""
        if self.draft is None:
            return None
        on_one = DeviceMap.single(shares[0].budget.device, self.draft.config.num_hidden_layers)
        parts = self.draft.parts(on_one)
        return Run(parts, self.draft._checkpoint, self._ctx_size_draft or ctx_size)

    def device_map(self, shares: Sequence[Share]) -> DeviceMap:
        """Name the device of each part."""
        layers = [
            share.budget.device
            for share in shares
            for _ in range(share.first_layer, share.end_layer)
        ]
        return DeviceMap(layers[0], tuple(layers), layers[-1])

    def _most(self, budget: Budget, first: int, ctx_size: int, options: RunOptions) -> int:
        """Find the largest end for which layers first..end fit; `first` if not even one does."""

        def spare(count: int) -> int:
            return self._share(budget, first, first + count, ctx_size, options).spare_bytes

        return first + largest_fitting(spare, self.config.num_hidden_layers - first)

    def _share(
        self, budget: Budget, first: int, end: int, ctx_size: int, options: RunOptions
    ) -> Share:
        device = budget.device
        buffers = self._buffers_bytes(device, first, end, ctx_size, options)
        draft_bytes = 0
        if self.draft is not None and first == 0:
            num_layers, tokens = self.draft.config.num_hidden_layers, self._ctx_size_draft
            more = self.draft._buffers_bytes(device, 0, num_layers, tokens or ctx_size, options)
            # Every tensor is aligned by itself, so a buffer for both is the sum of two.
            weights, cache, workspace = (a + b for a, b in zip(buffers, more, strict=True))
            buffers, draft_bytes = (weights, cache, workspace), sum(more)
        step = backend_of(device).granularity_bytes
        overhead = budget.overhead_bytes + sum(-nbytes % step for nbytes in buffers)
        # Weights of cards pass through main memory as well; several shares of it do so once.
        if device == self._staged_on or (first == 0 and backend_of(device).is_main_memory):
            overhead += self._staging_bytes
        return Share(budget, first, end, *buffers, overhead, draft_bytes)

    def _buffers_bytes(
        self, device: str, first: int, end: int, ctx_size: int, options: RunOptions
    ) -> tuple[int, int, int]:
        """Return the weights, the cache and the workspace of layers first..end."""
        return (
            self._weights_bytes(device, first, end),
            self._layer_cache_bytes(device, pages_for(ctx_size), options) * (end - first),
            self._part_workspace_bytes(device, first, end, ctx_size, options),
        )

    def _layer_cache_bytes(self, device: str, pages: int, options: RunOptions) -> int:
        """Lay out one layer's cache."""
        key = (backend_of(device).kind, pages, options.cache_type)
        if key not in self._cache_bytes:
            one_layer = replace(self.config, num_hidden_layers=1)
            on_device = DeviceMap.single(device, 1)
            placed = place(cache_specs(one_layer, pages, options.cache_type, on_device))
            self._cache_bytes[key] = placed[device, "cache"].nbytes
        return self._cache_bytes[key]

    def _part_workspace_bytes(
        self, device: str, first: int, end: int, ctx_size: int, options: RunOptions
    ) -> int:
        """Lay out the workspace of a layer range, once for all ranges that look alike to it."""
        has_head = end == self.config.num_hidden_layers
        widths = frozenset(self._widths[first:end])
        num_layers = end - first if self._layers_have_rooms else 0
        key = (backend_of(device).kind, has_head, widths, num_layers, ctx_size, options)
        if key not in self._workspace_bytes:
            stage = self._whole(device).cut(first, end)
            placed = place(_workspace([stage], ctx_size, options))
            self._workspace_bytes[key] = placed[stage.device, "workspace"].nbytes
        return self._workspace_bytes[key]

    def _whole(self, device: str) -> ModelParts:
        """Make the parts with everything on one device of this kind."""
        kind = backend_of(device).kind
        if kind not in self._wholes:
            where = DeviceMap.single(device, self.config.num_hidden_layers)
            self._wholes[kind] = self.parts(where)
        return self._wholes[kind]

    def _weights_bytes(self, device: str, first: int, end: int) -> int:
        """Sum the weights of a layer range and, at either end, of embedding and head."""
        kind = backend_of(device).kind
        if kind not in self._costs:
            self._costs[kind] = self._whole(device).costs()
        return self._costs[kind].of_range(first, end)


def _workspace(
    stages: Sequence[StageParts], ctx_size: int, options: RunOptions
) -> list[TensorSpec]:
    return workspace_specs(
        stages,
        ctx_size=ctx_size,
        cache_type=options.cache_type,
        chunk_size=options.chunk_size,
        max_batch_size=options.max_batch_size,
    )
