"""Assign layers to the devices of a plan, with the bytes that each device has to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...backends import backend_of
from ...cache.layout import cache_specs
from ...utils.table import DeviceMap
from ..segments import lay_out
from .budgets import Budget
from .costs import LayerCosts, PlacedModel
from .options import RunOptions
from .split import split


@dataclass(frozen=True)
class DeviceShare:
    """The layers on one device, and the bytes that they take there.

    Args:
        budget: the device and what it lends.
        layers: the layers. The embedding is with the first, the output head with the last.
        weights_bytes, cache_bytes, workspace_bytes: the three buffers.
        overhead_bytes: memory outside the buffers.
        draft_bytes: the part of the buffers that a draft model takes.
    """

    budget: Budget
    layers: range
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
    def headroom_bytes(self) -> int:
        """The bytes that stay free; negative where the layers do not fit."""
        return self.budget.headroom_bytes(self.total_bytes, self.overhead_bytes)


class Assigner:
    """Assigns a model's layers to devices, and a draft model to the first device used.

    Args:
        model: the costs of the model's layers.
        budgets: the devices that may be used, in order.
        draft: the costs of a draft model, which is on one device as a whole; None without one.
        ctx_size_draft: tokens of context of the draft model; 0 for as many as the model's.
    """

    def __init__(
        self, model: LayerCosts, budgets: Sequence[Budget], draft: LayerCosts | None = None,
        ctx_size_draft: int = 0,
    ) -> None:
        self._model = model
        self._budgets = list(budgets)
        self._draft = draft
        self._ctx_size_draft = ctx_size_draft
        models = [model] if draft is None else [model, draft]
        self._upload_bytes = max(one.upload_bytes(budgets[0].device) for one in models)
        names = [budget.device for budget in budgets]
        # Weights of cards pass through main memory as well.
        self._uploads_on = next((n for n in names if backend_of(n).is_main_memory), None)

    def assign(self, ctx_size: int, run: RunOptions) -> list[DeviceShare]:
        """Split the layers as `split` does.

        Args:
            ctx_size: tokens of context.
            run: the other options that decide the bytes.

        Returns:
            A share for each device that holds a layer, in the order of the layers. The last one
            may not fit.
        """
        costs = [partial(self._cost, budget, ctx_size, run) for budget in self._budgets]
        lent = [budget.lent_bytes for budget in self._budgets]
        ranges = split(costs, lent, self._model.num_layers)
        return [
            self._share(budget, layers, ctx_size, run)
            for budget, layers in zip(self._budgets, ranges, strict=True)
            if layers
        ]

    def most_pages(self, run: RunOptions) -> int:
        """Return more cache pages than would fit if there were no weights and no workspace."""
        free = sum(budget.capacity.free_bytes for budget in self._budgets)
        (page,) = lay_out(cache_specs(self._model.config, 1, run.cache_type)).values()
        return free // page.nbytes + 1

    def placed(self, shares: Sequence[DeviceShare], ctx_size: int) -> PlacedModel:
        """Return the model on the devices of these shares."""
        layers = [share.budget.device for share in shares for _ in share.layers]
        device_map = DeviceMap(layers[0], tuple(layers), layers[-1])
        return PlacedModel(self._model.parts(device_map), self._model.checkpoint, ctx_size)

    def placed_draft(
        self, shares: Sequence[DeviceShare], ctx_size: int
    ) -> PlacedModel | None:
        """Return the draft model on the first device of these shares; None without one."""
        if self._draft is None:
            return None
        on_first = DeviceMap.single(shares[0].budget.device, self._draft.num_layers)
        tokens = self._ctx_size_draft or ctx_size
        return PlacedModel(self._draft.parts(on_first), self._draft.checkpoint, tokens)

    def _cost(
        self, budget: Budget, ctx_size: int, run: RunOptions, first: int, end: int
    ) -> int:
        """Return the bytes that layers first..end need of those that a device lends."""
        share = self._share(budget, range(first, end), ctx_size, run)
        return budget.lent_bytes - share.headroom_bytes

    def _share(
        self, budget: Budget, layers: range, ctx_size: int, run: RunOptions
    ) -> DeviceShare:
        device, is_first = budget.device, layers.start == 0
        buffers, draft_bytes = self._model.buffers(device, layers, ctx_size, run), 0
        if self._draft is not None and is_first:
            every = range(self._draft.num_layers)
            draft = self._draft.buffers(device, every, self._ctx_size_draft or ctx_size, run)
            # Each tensor is aligned separately, so the buffer of both is the sum of two.
            buffers, draft_bytes = buffers + draft, draft.total
        backend = backend_of(device)
        overhead = budget.overhead_bytes + buffers.rounding(backend.granularity_bytes)
        # Uploads need main memory once, also where several shares are in main memory.
        if device == self._uploads_on or (is_first and backend.is_main_memory):
            overhead += self._upload_bytes
        return DeviceShare(
            budget, layers, buffers.weights, buffers.cache, buffers.workspace, overhead,
            draft_bytes,
        )
