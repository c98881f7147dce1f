"""Plan a model's memory from config, headers and options: no weight is read, no PyTorch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...backends import backend_of, full_name
from ...cache.layout import PAGE_LEN, CacheType, pages_for
from ...checkpoint import Checkpoint
from ...checkpoint.adapter import Adapter
from ...checkpoint.config import ModelConfig
from ...checkpoint.copies import folder_digest, folder_name
from ...checkpoint.model_class import has_unknown_class
from ...machines.connected import connection_of
from ...utils.byte_counts import parse_bytes
from ...utils.errors import InvalidSettings, shown
from ...utils.setting_values import check_path
from ..segments import Segment
from .assignment import Assigner
from .budgets import (
    Budget,
    budgets,
    gpu_split_by_machine,
    main_memory_budget,
    of_machine,
)
from .costs import NO_LORAS, LayerCosts, Loras, PlacedModel, segments_of
from .device_records import device_record
from .length import stretched_length
from .options import DEFAULT_CTX_SIZE, LoadOptions, PlanKeywords, RunOptions
from .questions import Asked, PlanRequest
from .records import DeviceReservation, Reservation
from .remote import Connection, RemotePlanner, begin
from .split import largest_fitting, largest_fitting_each
from .spread import Spread, Spreader

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Numbers of plans over several machines.
_plan_numbers = itertools.count(1)


@dataclass(frozen=True)
class PlannedModel:
    """A plan, and what the loader needs to carry it out.

    Args:
        reservation: the figures, of all machines.
        model: the model on the chosen devices, or this machine's part of it. Its checkpoint is
            closed when the `planned` block ends.
        segments: the buffers to allocate here, with the offset of every tensor.
        draft: the draft model; None without one.
        others: the other machines that hold layers, by place in order: what `PlanAnswers.part`
            needs there to carry out its part of the plan.
    """

    reservation: Reservation
    model: PlacedModel
    segments: tuple[Segment, ...]
    draft: PlacedModel | None = None
    others: Mapping[int, Asked] = field(default_factory=dict)


def plan(
    model_dir: str | os.PathLike[str], **options: Unpack[PlanKeywords]
) -> Reservation:
    """Compute the memory that a model will take, exactly, without loading it.

    `load` with the same options allocates exactly `total_bytes` on each device. No weight is
    read. PyTorch is imported only for a plan over several machines, to connect to them.

    Args:
        model_dir: folder with config.json and *.safetensors.
        options: see `LoadOptions`.

    Returns:
        The reservation. It may not fit: see its `fits`.

    Raises:
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint,
        UnsupportedFormat: the folder cannot be planned.
        InvalidSettings: an option makes no sense or is unknown, or there is no such device.
        MachineRefused, MachineLost: the other machines of `machines` are missing, do not fit
        this one, or were lost.
    """
    chosen = LoadOptions.from_keywords("plan", options)
    # Before it is waited for other machines.
    chosen.check()
    with planned(model_dir, chosen, connection_of(chosen.machines)) as model:
        return model.reservation


@contextmanager
def planned(
    model_dir: str | os.PathLike[str], options: LoadOptions,
    connection: Connection | None = None, connection_bytes: int | None = None,
) -> Iterator[PlannedModel]:
    """Plan as `plan` does, and keep the checkpoints open for the block.

    Args:
        model_dir, options: as those of `plan`.
        connection: to the other machines that may hold layers; None for one machine.
        connection_bytes: main memory that the connection takes on each machine; None for what
            passes under way need.
    """
    check_path("model_dir", model_dir, "folder")
    options.check()
    if options.machines and connection is None:
        raise InvalidSettings(
            "machines", expected="nothing, because this uses one machine",
            actual=shown(options.machines), remedy="Leave it out",
        )
    splits = gpu_split_by_machine(options, connection)
    run = RunOptions(
        CacheType.parse(options.cache_type), options.chunk_size, options.max_batch_size,
        options.cache_window, options.cache_size,
    )
    devices = budgets(of_machine(options, splits[0], is_alone=connection is None))
    embedding_card = _embedding_card(options, devices)
    with ExitStack() as files:
        costs = _open(model_dir, options.as_architecture, files, _open_loras(options, files))
        draft_costs = _open_draft(options, files)
        if connection is None:
            connection_bytes = 0
        elif connection_bytes is None:
            connection_bytes = _connection_bytes(costs.config, run, connection)
        assigner = Assigner(
            costs, devices, _main_memory(options, devices), draft_costs, options.ctx_size_draft,
            embedding_on_card=embedding_card is not None, connection_bytes=connection_bytes,
        )
        others: list[RemotePlanner] = []
        if connection is not None:
            requests = _requests(options, costs, splits, connection, connection_bytes)
            others = begin(connection, requests, costs.num_layers)
        spreader = Spreader(assigner, others, has_limits=any(splits))
        by_type = _by_cache_type(run)
        largest = _largest_ctx_sizes(spreader, costs, by_type)
        ctx_size = _chosen_ctx_size(options, costs.config, largest[str(run.cache_type)])
        _check_positions("ctx_size", ctx_size, costs.config)
        if draft_costs is not None:
            _check_positions(
                "ctx_size_draft", options.ctx_size_draft or ctx_size, draft_costs.config
            )
        run = run.at(ctx_size)
        spreads = spreader.spread_evenly({
            name: (ctx_size, run if other.cache_type == run.cache_type else other)
            for name, other in by_type.items()
        })
        chosen = spreads[str(run.cache_type)]
        shares = chosen.shares
        if embedding_card not in (None, shares[0].budget.device):
            raise _wrong_embedding_device(options, [shares[0].budget])
        model = assigner.placed(shares, ctx_size, run)
        draft = assigner.placed_draft(shares, ctx_size, run)
        segments = segments_of(model, run, draft)
        reservation = Reservation(
            model_dir=os.fspath(model_dir),
            architecture=costs.config.multimodal_class or costs.config.architecture,
            format=costs.checkpoint.format,
            num_layers=costs.num_layers,
            own_length=costs.config.own_length,
            alpha_value=float(options.alpha_value),
            compress_pos_emb=float(options.compress_pos_emb),
            uses_rope=bool(costs.config.ropes),
            ctx_size=ctx_size,
            cache_type=str(run.cache_type),
            chunk_size=run.chunk_size,
            max_batch_size=run.max_batch_size or 0,
            devices=_records(chosen, segments, connection),
            largest_ctx_size=largest,
            bytes_by_cache_type={name: spread.total_bytes for name, spread in spreads.items()},
            model_draft=os.fspath(options.model_draft) if options.model_draft else None,
            ctx_size_draft=draft.ctx_size if draft is not None else 0,
            loras=dict(options.chosen_loras()),
            cache_window=run.cache_window if run.has_open_pages else 0,
            cache_size=model.cache_tokens,
            hosts=_hosts(connection),
        )
        places = {part.planner.machine.place: part.asked for part in chosen.others}
        yield PlannedModel(reservation, model, tuple(segments.values()), draft, places)


def _main_memory(options: LoadOptions, devices: Sequence[Budget]) -> Budget:
    """Return the budget of main memory, which may be that of a device."""
    for budget in devices:
        if backend_of(budget.device).is_main_memory:
            return budget
    return main_memory_budget(options)


def _by_cache_type(run: RunOptions) -> dict[str, RunOptions]:
    """Return a run with each of the cache types that are shown, and with its own."""
    names = (*LoadOptions.OPTIONS["cache_type"].choices, str(run.cache_type))
    return {name: replace(run, cache_type=CacheType.parse(name)) for name in names}


def _connection_bytes(config: ModelConfig, run: RunOptions, connection: Connection) -> int:
    """Return the main memory of each machine that frames under way take."""
    # These import PyTorch, which the connection has done already.
    from ...machines.link import transport_bytes
    from ...model.pass_frames import reserved_frames

    return transport_bytes(
        *reserved_frames(config.hidden_size, run.chunk_size, 1 + len(connection.others))
    )


def _requests(
    options: LoadOptions, costs: LayerCosts, splits: Sequence[Any], connection: Connection,
    connection_bytes: int,
) -> dict[int, PlanRequest]:
    """Return what begins a plan on each of the other machines, by place."""
    limit = options.memory_limit
    request = PlanRequest(
        plan=next(_plan_numbers),
        name=folder_name(costs.checkpoint.model_dir),
        digest=folder_digest(costs.checkpoint),
        as_architecture=options.as_architecture,
        replacing=options.replacing,
        gpu_split="",
        memory_limit=None if limit is None else parse_bytes(limit, "memory_limit"),
        connection_bytes=connection_bytes,
    )
    return {
        machine.place: replace(request, gpu_split=splits[machine.place])
        for machine in connection.others
    }


def _hosts(connection: Connection | None) -> tuple[str, ...]:
    if connection is None:
        return ()
    return tuple(machine.host for machine in (connection.first, *connection.others))


def _records(
    spread: Spread, segments: Mapping[tuple[str, str], Segment], connection: Connection | None
) -> tuple[DeviceReservation, ...]:
    """Return the records of all devices, for which each other machine is asked."""
    records = [device_record(share, segments) for share in spread.shares]
    if connection is not None:
        first = connection.first
        records = [
            replace(record, machine=first.place, rank=first.rank, host=first.host)
            for record in records
        ]
    for part in spread.others:
        records += part.planner.records(part.asked)
    return tuple(records)


def _embedding_card(options: LoadOptions, devices: Sequence[Budget]) -> str | None:
    """Return the card that the embedding has to be on; None for main memory.

    Raises:
        InvalidSettings: `embedding_device` is none of the plan's devices and not main memory.
    """
    if options.embedding_device == "auto":
        return None
    name = full_name(options.embedding_device)
    if backend_of(name).is_main_memory:
        return None
    if all(budget.device != name for budget in devices):
        raise _wrong_embedding_device(options, devices)
    return name


def _wrong_embedding_device(
    options: LoadOptions, devices: Sequence[Budget]
) -> InvalidSettings:
    names = " or ".join(budget.device for budget in devices)
    return InvalidSettings(
        "embedding_device",
        expected=f"auto, cpu or the device of the first layer, which is {names}",
        actual=shown(options.embedding_device),
    )


def _open(
    model_dir: str | os.PathLike[str], as_architecture: str | None, files: ExitStack,
    loras: Loras = NO_LORAS,
) -> LayerCosts:
    """Read a folder's config and headers; the checkpoint is closed with `files`."""
    config = ModelConfig.from_dir(Path(model_dir), as_architecture)
    return LayerCosts(config, files.enter_context(Checkpoint.open(model_dir, config)), loras)


def _open_draft(options: LoadOptions, files: ExitStack) -> LayerCosts | None:
    """Read the draft model's config and headers; None without a draft model."""
    if not options.model_draft:
        return None
    # The option is about the model. A draft model of a known class runs as that class.
    known = not has_unknown_class(options.model_draft)
    return _open(options.model_draft, None if known else options.as_architecture, files)


def _open_loras(options: LoadOptions, files: ExitStack) -> Loras:
    """Read the configs and headers of the adapters, which are closed with `files`."""
    adapters = tuple(
        (files.enter_context(Adapter.open(folder)), scaling)
        for folder, scaling in options.chosen_loras()
    )
    return Loras(adapters, options.lora_room())


def _chosen_ctx_size(options: LoadOptions, config: ModelConfig, largest: int) -> int:
    length = stretched_length(config, options.alpha_value, options.compress_pos_emb)
    length = min(length, config.max_ctx_size)
    if options.cache_size:
        length = min(length, pages_for(options.cache_size) * PAGE_LEN)
    if options.ctx_size is None:
        return min(length, DEFAULT_CTX_SIZE)
    if isinstance(options.ctx_size, str):  # "auto"
        # Where nothing fits, the plan for one page shows how much is missing.
        return min(length, largest or PAGE_LEN)
    return options.ctx_size


def _check_positions(name: str, ctx_size: int, config: ModelConfig) -> None:
    """Refuse a context for which the model has no positions."""
    if ctx_size > config.max_ctx_size:
        raise InvalidSettings(
            name, expected=f"at most {config.max_ctx_size}, the learned positions of "
            f"{config.architecture}", actual=ctx_size,
            remedy="Choose a smaller context, or a model of RoPE, which has positions without end",
        )


def _largest_ctx_sizes(
    spreader: Spreader, costs: LayerCosts, runs: Mapping[str, RunOptions]
) -> dict[str, int]:
    """Return the most tokens that fit for each cache type, in whole pages; 0 for not one page.

    Args:
        runs: by cache type.
    """
    pages = {}
    for name, run in runs.items():
        # More pages than would fit if there were no weights and no workspace.
        most = spreader.free_bytes // costs.page_bytes(run.cache_type) + 1
        if run.cache_size:
            most = min(most, pages_for(run.cache_size))

        def headroom(count: int, run: RunOptions = run) -> int:
            return spreader.own_headroom_bytes(count * PAGE_LEN, run)

        pages[name] = largest_fitting(headroom, most)

    def headrooms(counts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        asked = {
            (name, count): (count * PAGE_LEN, runs[name])
            for name, several in counts.items() for count in several
        }
        spreads = spreader.spread(asked)
        return {
            name: [spreads[name, count].headroom_bytes for count in several]
            for name, several in counts.items()
        }

    if spreader.has_others:
        pages = largest_fitting_each(headrooms, pages)
    return {name: min(costs.config.max_ctx_size, most * PAGE_LEN) for name, most in pages.items()}
