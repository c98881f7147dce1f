"""Which layers go to which device, and what that takes of each: sums of the true table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from ...backends import backend_of
from ...cache.layout import CacheType, cache_specs, pages_for
from ...model.blueprint import Blueprint
from ...model.workspace import workspace_specs
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

# Number of a device that no plan uses: it holds the head of a model whose first layers are
# measured.
ELSEWHERE = 9999


@dataclass(frozen=True)
class Run:
    """A model on its devices, its open checkpoint, and the tokens that its cache is for."""

    blueprint: Blueprint
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
    blueprint: Blueprint, ctx_size: int, options: RunOptions, draft: Run | None = None
) -> dict[tuple[str, str], Segment]:
    """Lay out the whole table of a run: what the loader allocates and the plan sums."""
    specs = _table(blueprint, ctx_size, options)
    if draft is not None:
        specs += [
            replace(spec, name=DRAFT_PREFIX + spec.name)
            for spec in _table(draft.blueprint, draft.ctx_size, options)
        ]
    return place(specs)


def _table(blueprint: Blueprint, ctx_size: int, options: RunOptions) -> list[TensorSpec]:
    pages = pages_for(ctx_size)
    specs = blueprint.specs()
    specs += cache_specs(blueprint.config, pages, options.cache_type, blueprint.device_map)
    return specs + _workspace(blueprint, ctx_size, options)


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
        self._blueprints: dict[DeviceMap, Blueprint] = {}
        # By kind of device: bytes depend on its alignment, not on which one it is.
        self._wholes: dict[str, Blueprint] = {}
        self._whole_bytes: dict[str, int] = {}
        self._parts: dict[str, tuple[int, list[int], int]] = {}
        self._cache_bytes: dict[tuple[str, int, CacheType], int] = {}
        self._workspace_bytes: dict[tuple[object, ...], int] = {}
        whole = self._whole(budgets[0].device)
        self._widths = [
            frozenset((plan.in_features, plan.out_features) for plan in layer.linears())
            for layer in whole.layers
        ]
        # Tables of experts and key biases have a room for each layer in the workspace.
        self._layers_have_rooms = bool(config.num_local_experts) or any(
            "bias" in layer.k.specs for layer in whole.layers
        )
        self._staging_bytes = staging_bytes(whole, checkpoint)
        if draft is not None:
            self._staging_bytes = max(self._staging_bytes, draft._staging_bytes)
        names = (budget.device for budget in budgets)
        self._staged_on = next((n for n in names if backend_of(n).is_main_memory), None)

    def blueprint(self, device_map: DeviceMap) -> Blueprint:
        """Plan the weights for a device map, once each."""
        found = self._blueprints.get(device_map)
        if found is None:
            found = Blueprint.from_checkpoint(self.config, self._checkpoint, device_map)
            self._blueprints[device_map] = found
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
        blueprint = self.draft.blueprint(on_one)
        return Run(blueprint, self.draft._checkpoint, self._ctx_size_draft or ctx_size)

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
            part = self._part(device, first, end)
            placed = place(_workspace(part, ctx_size, options))
            self._workspace_bytes[key] = placed[part.device_map.embed, "workspace"].nbytes
        return self._workspace_bytes[key]

    def _whole(self, device: str) -> Blueprint:
        """Plan everything on one device of this kind."""
        kind = backend_of(device).kind
        if kind not in self._wholes:
            where = DeviceMap.single(device, self.config.num_hidden_layers)
            self._wholes[kind] = self.blueprint(where)
        return self._wholes[kind]

    def _part(self, device: str, first: int, end: int) -> Blueprint:
        """Cut layers first..end out of a blueprint, as far as the workspace looks.

        It does not look at the embedding.
        """
        whole, num_layers = self._whole(device), self.config.num_hidden_layers
        here, elsewhere = whole.device_map.embed, f"{backend_of(device).kind}:{ELSEWHERE}"
        head = here if end == num_layers else elsewhere
        device_map = DeviceMap(here, (here,) * (end - first), head)
        return replace(whole, device_map=device_map, layers=whole.layers[first:end])

    def _weights_bytes(self, device: str, first: int, end: int) -> int:
        """Sum the weights of a layer range and, at either end, of embedding and head."""
        kind = backend_of(device).kind
        if (first, end) == (0, self.config.num_hidden_layers):
            if kind not in self._whole_bytes:
                whole = self._whole(device)
                placed = place(whole.specs())
                self._whole_bytes[kind] = placed[whole.device_map.embed, "weights"].nbytes
            return self._whole_bytes[kind]
        if kind not in self._parts:
            self._parts[kind] = self._weights_of_parts(kind)
        embed, layers, head = self._parts[kind]
        ends = (embed if first == 0 else 0) + (head if end == len(layers) - 1 else 0)
        return layers[end] - layers[first] + ends

    def _weights_of_parts(self, kind: str) -> tuple[int, list[int], int]:
        """Lay the table out with every part on a device of its own.

        Every tensor is aligned by itself, so a segment is as long as its parts together, and
        any split of the layers is a difference of two sums.

        Returns:
            bytes of the embedding, of the first n layers for every n, and of the head.
        """
        num_layers = self.config.num_hidden_layers
        names = [f"{kind}:{i}" for i in range(num_layers + 2)]
        apart = DeviceMap(names[-2], tuple(names[:num_layers]), names[-1])
        sizes = {
            device: segment.nbytes
            for (device, _), segment in place(self.blueprint(apart).specs()).items()
        }
        layers = accumulate((sizes[name] for name in names[:num_layers]), initial=0)
        return sizes[names[-2]], list(layers), sizes[names[-1]]


def _workspace(blueprint: Blueprint, ctx_size: int, options: RunOptions) -> list[TensorSpec]:
    return workspace_specs(
        blueprint,
        ctx_size=ctx_size,
        cache_type=options.cache_type,
        chunk_size=options.chunk_size,
        max_batch_size=options.max_batch_size,
    )
