"""Plan a model's memory from config, headers and options: no weight read, no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...cache.layout import PAGE_LEN, CacheType
from ...checkpoint import Checkpoint
from ...checkpoint.config import ModelConfig
from ...model.builder import ModelParts
from ...utils.setting_values import check_path
from ..segments import Segment
from .budgets import Budget, budgets
from .length import stretched_length
from .options import DEFAULT_CTX_SIZE, LoadOptions, PlanKeywords, RunOptions
from .placement import Placer, Run, Share, segments_of
from .records import DeviceReservation, Reservation
from .split import largest_fitting

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class PlannedModel:
    """A plan with what the loader goes on with.

    Args:
        reservation: the figures. parts: the model on the chosen devices.
        segments: the table laid out: the buffers to take, one each.
        checkpoint: open; closed when the `planned` block ends.
        draft: the draft model; None without one.
    """

    reservation: Reservation
    parts: ModelParts
    segments: tuple[Segment, ...]
    checkpoint: Checkpoint
    draft: Run | None = None


def plan(
    model_dir: str | os.PathLike[str], **options: Unpack[PlanKeywords]
) -> Reservation:
    """Compute the memory that a model will take, exactly, without loading it.

    `load` with the same options allocates exactly `total_bytes` on each device. No weight is
    read and PyTorch is not imported.

    Args:
        model_dir: folder with config.json and *.safetensors.
        options: see `LoadOptions`.

    Returns:
        The reservation. It may not fit: see its `fits`.

    Raises:
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint,
        UnsupportedFormat: the folder cannot be planned.
        InvalidSettings: an option makes no sense or is unknown, or there is no such device.
    """
    with planned(model_dir, LoadOptions.from_keywords("plan", options)) as model:
        return model.reservation


@contextmanager
def planned(
    model_dir: str | os.PathLike[str], options: LoadOptions
) -> Iterator[PlannedModel]:
    """Plan as `plan` does, and keep the checkpoint open for the block."""
    check_path("model_dir", model_dir, "folder")
    options.check()
    run = RunOptions(
        CacheType.parse(options.cache_type), options.chunk_size, options.max_batch_size
    )
    devices = budgets(
        options.device, options.gpu_split, options.vram, options.memory_limit,
        replacing=options.replacing,
    )
    config = ModelConfig.from_dir(Path(model_dir))
    with ExitStack() as files:
        checkpoint = files.enter_context(Checkpoint.open(model_dir, config))
        draft_placer = _draft_placer(options, devices, files)
        placer = Placer(config, checkpoint, devices, draft_placer, options.ctx_size_draft)
        shown_types = LoadOptions.OPTIONS["cache_type"].choices
        by_type = {
            name: replace(run, cache_type=CacheType.parse(name))
            for name in dict.fromkeys((*shown_types, str(run.cache_type)))
        }
        largest = {name: _largest_ctx_size(placer, other) for name, other in by_type.items()}
        ctx_size = _chosen_ctx_size(options, config, largest[str(run.cache_type)])
        shares = placer.place(ctx_size, run)
        parts = placer.parts(placer.device_map(shares))
        draft = placer.draft_run(shares, ctx_size)
        segments = segments_of(parts, ctx_size, run, draft)
        reservation = Reservation(
            model_dir=os.fspath(model_dir),
            architecture=config.architecture,
            format=checkpoint.format,
            num_layers=config.num_hidden_layers,
            own_length=config.own_length,
            alpha_value=float(options.alpha_value),
            compress_pos_emb=float(options.compress_pos_emb),
            ctx_size=ctx_size,
            cache_type=str(run.cache_type),
            chunk_size=run.chunk_size,
            max_batch_size=run.max_batch_size,
            devices=tuple(_record(share, segments) for share in shares),
            largest_ctx_size=largest,
            bytes_by_cache_type={
                name: sum(
                    share.total_bytes
                    for share in (shares if other == run else placer.place(ctx_size, other))
                )
                for name, other in by_type.items()
            },
            model_draft=os.fspath(options.model_draft) if options.model_draft else None,
            ctx_size_draft=draft.ctx_size if draft is not None else 0,
        )
        yield PlannedModel(reservation, parts, tuple(segments.values()), checkpoint, draft)


def _draft_placer(
    options: LoadOptions, devices: Sequence[Budget], files: ExitStack
) -> Placer | None:
    """Open the draft model, if any, for as long as `files` stay open."""
    if not options.model_draft:
        return None
    config = ModelConfig.from_dir(Path(options.model_draft))
    checkpoint = files.enter_context(Checkpoint.open(options.model_draft, config))
    return Placer(config, checkpoint, devices)


def _chosen_ctx_size(options: LoadOptions, config: ModelConfig, largest: int) -> int:
    length = stretched_length(config, options.alpha_value, options.compress_pos_emb)
    if options.ctx_size is None:
        return min(length, DEFAULT_CTX_SIZE)
    if isinstance(options.ctx_size, str):  # auto; where nothing fits, one page shows by how much
        return min(length, largest or PAGE_LEN)
    return options.ctx_size


def _largest_ctx_size(placer: Placer, options: RunOptions) -> int:
    """Find the most tokens that fit the devices now, in whole pages; 0 if not one page does."""

    def spare(pages: int) -> int:
        spares = [share.spare_bytes for share in placer.place(pages * PAGE_LEN, options)]
        # Where all fit, together: what one of them has left jumps with every layer that moves.
        return min(spares) if min(spares) < 0 else sum(spares)

    return largest_fitting(spare, placer.most_pages(options)) * PAGE_LEN


def _record(share: Share, segments: dict[tuple[str, str], Segment]) -> DeviceReservation:
    budget = share.budget
    sizes = {
        name: segments[budget.device, name].nbytes for name in ("weights", "cache", "workspace")
    }
    found = (share.weights_bytes, share.cache_bytes, share.workspace_bytes)
    assert found == tuple(sizes.values()), (found, sizes)
    lent = budget.limited()
    return DeviceReservation(
        device=budget.device,
        first_layer=share.first_layer,
        end_layer=share.end_layer,
        weights_bytes=share.weights_bytes,
        cache_bytes=share.cache_bytes,
        workspace_bytes=share.workspace_bytes,
        overhead_bytes=share.overhead_bytes,
        overhead_measured=budget.overhead_measured,
        capacity_bytes=lent.capacity_bytes,
        free_bytes=lent.free_bytes,
        other_bytes=lent.other_bytes,
        limit_bytes=budget.limit_bytes,
        spare_bytes=share.spare_bytes,
        draft_bytes=share.draft_bytes,
    )
