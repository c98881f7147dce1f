"""Plan a model's memory from config, headers and options: no weight read, no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...cache.layout import PAGE_LEN, CacheType
from ...checkpoint import Checkpoint
from ...checkpoint.config import ModelConfig
from ...checkpoint.rope import MAX_POSITIONS, check_scaling
from ...model.blueprint import Blueprint
from ...model.workspace import DEFAULT_CHUNK_SIZE, DEFAULT_MAX_BATCH_SIZE
from ...utils.setting_values import check_flag
from ...utils.table import Segment
from .length import stretched_length
from .options import (
    DEFAULT_CTX_SIZE,
    Budget,
    CtxSize,
    RunOptions,
    budgets,
    check_count,
    check_ctx_size,
    check_folder,
    refuse_unknown,
    run_options,
)
from .placement import Placer, Run, Share, segments_of
from .records import DeviceReservation, Reservation
from .search import largest_fitting

# The types a plan always answers for: 16, 8, 6 and 4 bits.
SHOWN_CACHE_TYPES = ("fp16", "q8", "q6", "q4")


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of `planned`; the fields are the arguments of `plan`."""

    model_dir: str | os.PathLike[str]
    ctx_size: CtxSize = None
    cache_type: str | CacheType = "fp16"
    device: str | Sequence[str] = "auto"
    gpu_split: str | Sequence[float] | None = None
    vram: int | str | Sequence[int | str] | None = None
    memory_limit: int | str | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    alpha_value: float = 1.0
    compress_pos_emb: float = 1.0
    replacing: bool = False
    model_draft: str | os.PathLike[str] | None = None
    ctx_size_draft: int = 0


@dataclass(frozen=True)
class PlannedModel:
    """A plan with what the loader goes on with.

    Args:
        reservation: the figures. blueprint: the weights on the chosen devices.
        segments: the table laid out: the buffers to take, one each.
        checkpoint: open; closed when the `planned` block ends.
        draft: the draft model; None without one.
    """

    reservation: Reservation
    blueprint: Blueprint
    segments: tuple[Segment, ...]
    checkpoint: Checkpoint
    draft: Run | None = None


def plan(
    model_dir: str | os.PathLike[str],
    ctx_size: CtxSize = None,
    cache_type: str | CacheType = "fp16",
    *,
    device: str | Sequence[str] = "auto",
    gpu_split: str | Sequence[float] | None = None,
    vram: int | str | Sequence[int | str] | None = None,
    memory_limit: int | str | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    alpha_value: float = 1.0,
    compress_pos_emb: float = 1.0,
    replacing: bool = False,
    model_draft: str | os.PathLike[str] | None = None,
    ctx_size_draft: int = 0,
    **unknown: Any,
) -> Reservation:
    """Compute the memory a model will take, exactly, without loading it.

    `load()` with the same arguments allocates exactly `total_bytes` on each device.

    Args:
        model_dir: folder with config.json and *.safetensors.
        ctx_size: tokens of context; None for the model's own length capped at 8192, `auto`
            for the largest that fits, capped by the model's own length.
        cache_type: `fp16`, `q8`, `q6`, `q4`, or keys and values apart such as `q8_q4`.
        device: `auto` (as many of the cards that can run models as it takes, else the CPU), a
            device's name, or several, over which layers are split in order.
        gpu_split: GiB that our buffers may take of each device, such as `20,24`.
        vram: plan for cards of this size that need not be here, such as `24GiB`.
        memory_limit: most bytes that our buffers may take of each device, or `24GiB`.
        chunk_size: most tokens in one forward pass.
        max_batch_size: most sequences in one forward pass.
        alpha_value, compress_pos_emb: stretch the model's own length for `auto` and None.
        replacing: plan as if every model that this process has loaded had been unloaded.
        model_draft: folder of a smaller model with the same vocabulary, which guesses how
            texts go on; as a whole on the first device. None or empty for none.
        ctx_size_draft: its tokens of context; 0 for as many as the model's.
        unknown: none; any other keyword is an error that names a similar one.

    Returns:
        the reservation, which may not fit: see its `fits`.

    Raises:
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint,
        UnsupportedFormat: the folder cannot be planned.
        InvalidSettings: an option makes no sense, or there is no such device.
    """
    refuse_unknown(plan, unknown)
    request = PlanRequest(
        model_dir,
        ctx_size,
        cache_type,
        device=device,
        gpu_split=gpu_split,
        vram=vram,
        memory_limit=memory_limit,
        chunk_size=chunk_size,
        max_batch_size=max_batch_size,
        alpha_value=alpha_value,
        compress_pos_emb=compress_pos_emb,
        replacing=replacing,
        model_draft=model_draft,
        ctx_size_draft=ctx_size_draft,
    )
    with planned(request) as model:
        return model.reservation


@contextmanager
def planned(request: PlanRequest) -> Iterator[PlannedModel]:
    """Plan as `plan` does, and keep the checkpoint open for the block."""
    check_folder("model_dir", request.model_dir)
    if request.model_draft is not None:
        check_folder("model_draft", request.model_draft)
    check_flag("replacing", request.replacing)
    check_ctx_size(request.ctx_size)
    check_scaling(request.alpha_value, request.compress_pos_emb)
    options = run_options(request.cache_type, request.chunk_size, request.max_batch_size)
    devices = budgets(
        request.device,
        request.gpu_split,
        request.vram,
        request.memory_limit,
        replacing=request.replacing,
    )
    config = ModelConfig.from_dir(Path(request.model_dir))
    with ExitStack() as files:
        checkpoint = files.enter_context(Checkpoint.open(request.model_dir))
        draft_placer = _draft_placer(request, devices, files)
        placer = Placer(config, checkpoint, devices, draft_placer, request.ctx_size_draft)
        by_type = {
            name: replace(options, cache_type=CacheType.parse(name))
            for name in dict.fromkeys((*SHOWN_CACHE_TYPES, str(options.cache_type)))
        }
        largest = {name: _largest_ctx_size(placer, run) for name, run in by_type.items()}
        ctx_size = _chosen_ctx_size(request, config, largest[str(options.cache_type)])
        shares = placer.place(ctx_size, options)
        blueprint = placer.blueprint(placer.device_map(shares))
        draft = placer.draft_run(shares, ctx_size)
        segments = segments_of(blueprint, ctx_size, options, draft)
        reservation = Reservation(
            model_dir=os.fspath(request.model_dir),
            architecture=config.architecture,
            format=checkpoint.format,
            num_layers=config.num_hidden_layers,
            own_length=config.own_length,
            alpha_value=float(request.alpha_value),
            compress_pos_emb=float(request.compress_pos_emb),
            ctx_size=ctx_size,
            cache_type=str(options.cache_type),
            chunk_size=options.chunk_size,
            max_batch_size=options.max_batch_size,
            devices=tuple(_record(share, segments) for share in shares),
            largest_ctx_size=largest,
            bytes_by_cache_type={
                name: sum(
                    share.total_bytes
                    for share in (shares if run == options else placer.place(ctx_size, run))
                )
                for name, run in by_type.items()
            },
            model_draft=os.fspath(request.model_draft) if request.model_draft else None,
            ctx_size_draft=draft.ctx_size if draft is not None else 0,
        )
        yield PlannedModel(reservation, blueprint, tuple(segments.values()), checkpoint, draft)


def _draft_placer(
    request: PlanRequest, devices: Sequence[Budget], files: ExitStack
) -> Placer | None:
    """Open the draft model, if any, for as long as `files` stay open."""
    check_count("ctx_size_draft", request.ctx_size_draft, 0, MAX_POSITIONS)
    if not request.model_draft:
        return None
    config = ModelConfig.from_dir(Path(request.model_draft))
    checkpoint = files.enter_context(Checkpoint.open(request.model_draft))
    return Placer(config, checkpoint, devices)


def _chosen_ctx_size(request: PlanRequest, config: ModelConfig, largest: int) -> int:
    length = stretched_length(config, request.alpha_value, request.compress_pos_emb)
    if request.ctx_size is None:
        return min(length, DEFAULT_CTX_SIZE)
    if isinstance(request.ctx_size, str):  # auto; where nothing fits, one page shows by how much
        return min(length, largest or PAGE_LEN)
    return request.ctx_size


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
