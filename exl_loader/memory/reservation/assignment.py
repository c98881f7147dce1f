"""Assign layers to a machine's devices, with the bytes that each device has to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ...backends import backend_of
from ...utils.table import DeviceMap
from .budgets import Budget
from .costs import BufferBytes, LayerCosts, PlacedModel
from .options import RunOptions
from .split import Work, split


@dataclass(frozen=True)
class DeviceShare:
    """The layers on one device, and the bytes that they take there.

    Args:
        budget: the device and what it lends.
        layers: the layers. Empty for main memory that has only embeddings of models on cards,
            or only what the connection to other machines takes.
        weights_bytes, cache_bytes, workspace_bytes: the three buffers of the layers.
        overhead_bytes: memory outside the buffers.
        draft_bytes: the part of the buffers that a draft model takes.
        embedding_bytes: the buffer of embeddings that a card reads in main memory.
        lora_bytes: the buffer with the room for adapters.
    """

    budget: Budget
    layers: range
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    draft_bytes: int = 0
    embedding_bytes: int = 0
    lora_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All buffers."""
        return (
            self.weights_bytes + self.cache_bytes + self.workspace_bytes + self.embedding_bytes
            + self.lora_bytes
        )

    @property
    def headroom_bytes(self) -> int:
        """The bytes that stay free; negative where the layers do not fit."""
        return self.budget.headroom_bytes(self.total_bytes, self.overhead_bytes)


class Assigner:
    """Assigns layers to a machine's devices, and a draft model to the first device used.

    Args:
        model: the costs of the model's layers.
        budgets: the devices that may be used, in order.
        main_memory: what main memory lends for embeddings; one of the budgets where one of
            them is main memory.
        draft: the costs of a draft model, which is on one device as a whole; None without one.
        ctx_size_draft: tokens of context of the draft model; 0 for as many as the model's.
        embedding_on_card: embeddings are with the first layer on cards too, and not in main
            memory.
        has_ends: embedding and head are on this machine; False for all but the first machine.
        connection_bytes: main memory that the connection to other machines takes.
    """

    def __init__(
        self, model: LayerCosts, budgets: Sequence[Budget], main_memory: Budget,
        draft: LayerCosts | None = None, ctx_size_draft: int = 0,
        embedding_on_card: bool = False, has_ends: bool = True, connection_bytes: int = 0,
    ) -> None:
        self._model = model
        self._budgets = list(budgets)
        self._main_memory = main_memory
        self._draft = draft
        self._ctx_size_draft = ctx_size_draft
        self._embedding_on_card = embedding_on_card
        self._has_ends = has_ends
        self._connection_bytes = connection_bytes
        models = [model] if draft is None else [model, draft]
        self._upload_bytes = max(one.upload_bytes(budgets[0].device) for one in models)

    def assign(
        self, ctx_size: int, run: RunOptions, first_layer: int = 0, end_layer: int | None = None
    ) -> list[DeviceShare]:
        """Split a range of layers as `split` does.

        Args:
            ctx_size: tokens of context.
            run: the other options that decide the bytes.
            first_layer: the first of the layers; 0 on the machine of the embedding.
            end_layer: the end of the layers, which are assigned whether they fit or not. None
                where other machines follow and hold the rest: as many as fit, but at least one
                on the machine of the embedding.

        Returns:
            A share for each device that holds a layer, in the order of the layers, of which the
            last may not fit. Then a share of main memory where it holds embeddings alone, or
            only the connection to other machines. Nothing where no layer fits.
        """
        run = run.at(ctx_size)
        if end_layer is None:
            rest = range(first_layer, self._model.num_layers)
            shares = self._most_shares(rest, ctx_size, run)
        else:
            layers = range(first_layer, end_layer)
            shares = self._split(layers, ctx_size, run, self._has_ends, True)
        if not shares:
            return []
        first, last = shares[0], shares[-1]
        if not any(share.budget is self._main_memory for share in shares):
            embeddings, of_draft = 0, 0
            if self._has_ends:
                embeddings, of_draft = self._embeddings(first.budget.device, first is last)
            if embeddings or self._connection_bytes:
                end = last.layers.stop
                shares.append(self._embedding_share(end, embeddings, of_draft))
        return shares

    def _most_shares(self, rest: range, ctx_size: int, run: RunOptions) -> list[DeviceShare]:
        """Return the shares of as many layers of `rest` as fit, from its first on."""
        # The head is with the last layer on this machine, so which device has it depends on how
        # many layers there are. No more fit with a head than without.
        shares = self._split(rest, ctx_size, run, False, False)
        if not self._has_ends:
            return shares
        most = shares[-1].layers.stop if shares else 0
        for end in range(max(1, most), 0, -1):
            shares = self._split(range(end), ctx_size, run, True, True)
            if all(share.headroom_bytes >= 0 for share in shares):
                break
        return shares

    def _split(
        self, layers: range, ctx_size: int, run: RunOptions, has_head: bool, takes_all: bool
    ) -> list[DeviceShare]:
        """Split layers over the devices.

        Args:
            layers: those to assign.
            has_head: the head is with the last of them.
            takes_all: as in `split`.
        """
        make = partial(self._share, ctx_size=ctx_size, run=run, layers=layers, has_head=has_head)
        costs = [partial(_cost, make, budget) for budget in self._budgets]
        lent = [budget.lent_bytes for budget in self._budgets]
        ranges = split(costs, lent, layers, takes_all)
        return [
            make(budget, part)
            for budget, part in zip(self._budgets, ranges, strict=True) if part
        ]

    @property
    def num_layers(self) -> int:
        """Number of the model's layers, on all machines."""
        return self._model.num_layers

    @property
    def kind(self) -> str:
        """The kind of the devices; empty where they are of several."""
        kinds = {backend_of(budget.device).kind for budget in self._budgets}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def speed(self) -> int:
        """How fast layers run beside other machines with devices of the same kind."""
        device = self._budgets[0].device
        return backend_of(device).relative_speed(device)

    def work(self, ctx_size: int, run: RunOptions) -> Work:
        """Return what a step reads of the model and, once, of the draft model."""
        device = self._budgets[0].device
        work = self._model.work(device, ctx_size, run)
        if self._draft is None:
            return work
        draft = self._draft.work(device, *self._of_draft(ctx_size, run))
        return Work(work.layers, work.ends + draft.ends + draft.layers[-1])

    @property
    def free_bytes(self) -> int:
        """The free memory of all devices that layers may be on."""
        return sum(budget.capacity.free_bytes for budget in self._budgets)

    def placed(
        self, shares: Sequence[DeviceShare], ctx_size: int, run: RunOptions
    ) -> PlacedModel:
        """Return the model, or this machine's part of it, on the devices of these shares."""
        layers = [share.budget.device for share in shares for _ in share.layers]
        device_map = DeviceMap(
            self._embedding_device(layers[0]) if self._has_ends else None, tuple(layers),
            layers[-1] if self._has_ends else None, shares[0].layers.start,
        )
        rooms = {share.budget.device: share.lora_bytes for share in shares}
        parts, checkpoint = self._model.parts(device_map), self._model.checkpoint
        return PlacedModel(
            parts, checkpoint, ctx_size, run.cache_tokens(ctx_size), self._model.loras, rooms
        )

    def placed_draft(
        self, shares: Sequence[DeviceShare], ctx_size: int, run: RunOptions
    ) -> PlacedModel | None:
        """Return the draft model on the first device of these shares; None without one."""
        if self._draft is None:
            return None
        first = shares[0].budget.device
        layers = (first,) * self._draft.num_layers
        device_map = DeviceMap(self._embedding_device(first), layers, first)
        tokens, run = self._of_draft(ctx_size, run)
        return PlacedModel(
            self._draft.parts(device_map), self._draft.checkpoint, tokens,
            run.cache_tokens(tokens),
        )

    def _of_draft(self, ctx_size: int, run: RunOptions) -> tuple[int, RunOptions]:
        """Return the draft model's tokens of context, and its options.

        A context of its own is the size of its cache as well.
        """
        if not self._ctx_size_draft:
            return ctx_size, run
        return self._ctx_size_draft, replace(run, cache_size=0)

    def _embedding_device(self, first: str) -> str:
        """Return the device whose memory embeddings are in, for the first layer's device."""
        if self._embedding_on_card or backend_of(first).is_main_memory:
            return first
        return self._main_memory.device

    def _embeddings(self, first: str, has_head: bool) -> tuple[int, int]:
        """Return the bytes of all embeddings in main memory, and of those of the draft model.

        Args:
            first: the device of the first layer.
            has_head: the model's head is on it too.
        """
        if self._embedding_device(first) == first:
            return 0, 0
        of_draft = 0
        if self._draft is not None:
            of_draft = self._draft.main_memory_embedding_bytes(first, True)
        return self._model.main_memory_embedding_bytes(first, has_head) + of_draft, of_draft

    def _share(
        self, budget: Budget, part: range, *, ctx_size: int, run: RunOptions, layers: range,
        has_head: bool,
    ) -> DeviceShare:
        """Return the share of a device.

        Args:
            part: its layers, of those in `layers`, which are all that this machine has.
            has_head: the head is with the last of `layers`.
        """
        device, is_first, draft_bytes = budget.device, part.start == layers.start, 0
        here = self._embedding_device(device) == device
        buffers = self._model.buffers(
            device, part, ctx_size, run, here, has_head and part.stop == layers.stop
        )
        if self._draft is not None and is_first:
            every = range(self._draft.num_layers)
            of_draft = self._of_draft(ctx_size, run)
            draft = self._draft.buffers(device, every, *of_draft, here, True)
            # Each tensor is aligned separately, so the buffer of both is the sum of two.
            buffers, draft_bytes = buffers + draft, draft.total
        embedding_bytes = 0
        if budget is self._main_memory and not is_first and self._has_ends:
            # It is the first budget in main memory, so the layers before are on a card.
            embedding_bytes, drafts = self._embeddings(self._budgets[0].device, False)
            draft_bytes += drafts
        return DeviceShare(
            budget, part, buffers.weights, buffers.cache, buffers.workspace,
            self._overhead_bytes(budget, buffers, embedding_bytes, is_first), draft_bytes,
            embedding_bytes, buffers.loras,
        )

    def _embedding_share(
        self, end: int, embedding_bytes: int, draft_bytes: int
    ) -> DeviceShare:
        """Return the share of main memory that has no layers.

        Args:
            end: the end of the layers on this machine.
        """
        nothing = BufferBytes(0, 0, 0)
        return DeviceShare(
            self._main_memory, range(end, end), 0, 0, 0,
            self._overhead_bytes(self._main_memory, nothing, embedding_bytes, False), draft_bytes,
            embedding_bytes,
        )

    def _overhead_bytes(
        self, budget: Budget, buffers: BufferBytes, embedding_bytes: int, is_first: bool
    ) -> int:
        """Return the memory of a device outside the buffers."""
        backend = backend_of(budget.device)
        page_bytes = backend.granularity_bytes
        overhead = budget.overhead_bytes + buffers.rounding(page_bytes)
        overhead += -embedding_bytes % page_bytes
        # Uploads need main memory once, also where several shares are in main memory. Weights of
        # cards pass through main memory as well.
        if budget is self._main_memory or (is_first and backend.is_main_memory):
            overhead += self._upload_bytes + self._connection_bytes
        return overhead


def _cost(
    make: Callable[[Budget, range], DeviceShare], budget: Budget, first: int, end: int
) -> int:
    """Return the bytes that layers first..end need of those that a device lends."""
    return budget.lent_bytes - make(budget, range(first, end)).headroom_bytes
