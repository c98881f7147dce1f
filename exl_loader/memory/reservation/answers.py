"""The side of every machine but the first: its answers about the layers that it could hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...backends import backend_of
from ...checkpoint import Checkpoint
from ...checkpoint.config import ModelConfig
from ...checkpoint.copies import check_copy, find_folder
from ...utils.byte_counts import parse_bytes
from ...utils.errors import InvalidSettings, MachineRefused, shown
from ..segments import Segment
from .assignment import Assigner, DeviceShare
from .budgets import budgets, chosen_devices, main_memory_budget, of_machine
from .costs import LayerCosts, PlacedModel, segments_of
from .device_records import device_record
from .options import LoadOptions, RunOptions
from .questions import (
    ASSIGN,
    PLAN,
    RECORDS,
    Asked,
    Assigned,
    PlanReply,
    PlanRequest,
    from_json,
    items_from_json,
    to_json,
)
from .records import DeviceReservation

SENDER = "the first machine"

# Plans that may be under way at once. One takes as much memory as the headers of its model.
PLANS_KEPT = 8


@dataclass(frozen=True)
class PlannedPart:
    """A machine's part of a model, and what its loader needs to carry the plan out.

    Args:
        records: the figures of this machine's devices.
        model: the layers on the chosen devices. Its checkpoint stays open for `PLANS_KEPT` plans,
            and until `PlanAnswers.close` at most. A closed one opens its files again to read.
        segments: the buffers to allocate, with the offset of every tensor.
        run: the options that decide the bytes.
    """

    records: tuple[DeviceReservation, ...]
    model: PlacedModel
    segments: tuple[Segment, ...]
    run: RunOptions


@dataclass(frozen=True)
class _Plan:
    """A plan that has begun: the folder is open, and it is known what the devices lend."""

    assigner: Assigner
    num_layers: int
    files: ExitStack


class PlanAnswers:
    """Answers a first machine's questions about plans, one after the other.

    The machine is there for layers: the first plan initializes all devices that may hold some.

    Plans that are made at once, such as those of a page while a model is loaded, may take turns.

    Args:
        models: a model's folder, or a folder of models' folders.
        options: `device` and `memory_limit` of this machine; the other options are the first
            machine's.

    Raises:
        InvalidSettings: an option makes no sense, or there is no such device.
    """

    def __init__(
        self, models: str | os.PathLike[str], options: LoadOptions | None = None
    ) -> None:
        self._models = Path(models)
        self._options = options or LoadOptions()
        self._options.check()
        budgets(self._options)
        self._plans: dict[int, _Plan] = {}

    def answer(self, question: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Answer a question; return None for one that is not about a plan.

        Raises:
            ExlLoaderError: there is no copy of the model's folder here, it cannot be planned, or
                an option makes no sense on this machine. MachineRefused: the question has other
                fields than this version's.
        """
        if question == PLAN:
            return to_json(self._plan(from_json(PlanRequest, fields, SENDER)))
        if question == ASSIGN:
            asked = items_from_json(Asked, fields, "asked", None, SENDER)
            return {"assigned": [to_json(self._assign(one)) for one in asked]}
        if question == RECORDS:
            return {"records": [to_json(one) for one in self.part(fields).records]}
        return None

    def part(self, fields: Mapping[str, Any]) -> PlannedPart:
        """Return this machine's part of the model for a run.

        Args:
            fields: the question, as `to_json` writes one of `PlannedModel.others`.

        Raises:
            As `answer`. MachineRefused: no layer fits here.
        """
        asked = from_json(Asked, fields, SENDER)
        plan, shares, run = self._shares(asked)
        if not shares:
            raise MachineRefused(
                f"the layers from {asked.first_layer} on", expected="a device that holds one",
                actual="none fits any more",
            )
        model = plan.assigner.placed(shares, asked.ctx_size, run)
        segments = segments_of(model, run)
        records = tuple(device_record(share, segments) for share in shares)
        return PlannedPart(records, model, tuple(segments.values()), run)

    def close(self) -> None:
        """Close the models' files and forget the plans."""
        while self._plans:
            self._plans.popitem()[1].files.close()

    def _plan(self, request: PlanRequest) -> PlanReply:
        """Open the folder and see what the devices lend."""
        options = self._chosen(request)
        if options.vram is None:
            # A plan measures the overhead of cards that this process has a context on.
            for name in chosen_devices(options):
                backend_of(name).initialize(name)
        devices = budgets(options)
        in_main_memory = [one for one in devices if backend_of(one.device).is_main_memory]
        main_memory = in_main_memory[0] if in_main_memory else main_memory_budget(options)
        folder = find_folder(self._models, request.name)
        config = ModelConfig.from_dir(folder, request.as_architecture)
        with ExitStack() as files:
            checkpoint = files.enter_context(Checkpoint.open(folder, config))
            check_copy(checkpoint, request.digest)
            assigner = Assigner(
                LayerCosts(config, checkpoint), devices, main_memory, has_ends=False,
                connection_bytes=request.connection_bytes,
            )
            self._keep(request.plan, _Plan(assigner, config.num_hidden_layers, files.pop_all()))
        return PlanReply(assigner.free_bytes, assigner.kind, assigner.speed)

    def _keep(self, number: int, plan: _Plan) -> None:
        """Keep a plan in place of the oldest one."""
        replaced = [number, *list(self._plans)[: 1 - PLANS_KEPT]]
        for old in replaced:
            if old in self._plans:
                self._plans.pop(old).files.close()
        self._plans[number] = plan

    def _chosen(self, request: PlanRequest) -> LoadOptions:
        """Return this machine's options with those of the request. The lower limit holds."""
        limits = [request.memory_limit]
        if self._options.memory_limit is not None:
            limits.append(parse_bytes(self._options.memory_limit, "memory_limit"))
        limit = min((one for one in limits if one is not None), default=None)
        own = of_machine(self._options, request.gpu_split, is_alone=False)
        return replace(own, memory_limit=limit, replacing=request.replacing)

    def _assign(self, asked: Asked) -> Assigned:
        _, shares, _ = self._shares(asked)
        return Assigned(
            max((share.layers.stop for share in shares), default=asked.first_layer),
            tuple(share.headroom_bytes for share in shares),
            sum(share.total_bytes for share in shares),
        )

    def _shares(self, asked: Asked) -> tuple[_Plan, list[DeviceShare], RunOptions]:
        """Return the plan that a question is about, the shares of devices, and their run."""
        plan = self._plans.get(asked.plan)
        if plan is None:
            raise MachineRefused(
                "a question about a plan", expected=f"one of the last {PLANS_KEPT} that began",
                actual=f"the plan of number {asked.plan}", remedy="Plan again",
            )
        # The first machine has layer 0.
        if not 0 < asked.first_layer < plan.num_layers:
            raise InvalidSettings(
                "first_layer", expected=f"1 to {plan.num_layers - 1}",
                actual=shown(asked.first_layer),
            )
        end = asked.end_layer
        if end is not None and not asked.first_layer < end <= plan.num_layers:
            raise InvalidSettings(
                "end_layer", expected=f"{asked.first_layer + 1} to {plan.num_layers}",
                actual=shown(end),
            )
        run = asked.run().at(asked.ctx_size)
        shares = plan.assigner.assign(asked.ctx_size, run, asked.first_layer, end)
        return plan, shares, run
