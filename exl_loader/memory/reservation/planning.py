"""Plan a model's memory from config, headers and options: no weight is read, no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...backends import backend_of, full_name
from ...cache.layout import PAGE_LEN, CacheType, pages_for
from ...checkpoint import Checkpoint
from ...checkpoint.adapter import Adapter
from ...checkpoint.config import ModelConfig
from ...checkpoint.model_class import has_unknown_class
from ...utils.errors import InvalidSettings, shown
from ...utils.setting_values import check_path
from ...utils.table import SEGMENTS
from ..segments import Segment, align
from .assignment import Assigner, DeviceShare
from .budgets import Budget, budgets, main_memory_budget
from .costs import DRAFT_PREFIX, NO_LORAS, LayerCosts, Loras, PlacedModel, segments_of
from .length import stretched_length
from .options import DEFAULT_CTX_SIZE, LoadOptions, PlanKeywords, RunOptions
from .records import DeviceReservation, Reservation
from .split import largest_fitting

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class PlannedModel:
    """A plan, and what the loader needs to carry it out.

    Args:
        reservation: the figures.
        model: the model on the chosen devices. Its checkpoint is closed when the `planned`
            block ends.
        segments: the buffers to allocate, with the offset of every tensor.
        draft: the draft model; None without one.
    """

    reservation: Reservation
    model: PlacedModel
    segments: tuple[Segment, ...]
    draft: PlacedModel | None = None


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
    """Plan as `plan` does, and keep the checkpoints open for the block."""
    check_path("model_dir", model_dir, "folder")
    options.check()
    run = RunOptions(
        CacheType.parse(options.cache_type), options.chunk_size, options.max_batch_size,
        options.cache_window, options.cache_size,
    )
    devices = budgets(options)
    in_main_memory = [one for one in devices if backend_of(one.device).is_main_memory]
    main_memory = in_main_memory[0] if in_main_memory else main_memory_budget(options)
    embedding_card = _embedding_card(options, devices)
    with ExitStack() as files:
        loras = _open_loras(options, files)
        costs = _open(model_dir, options.as_architecture, files, loras)
        draft_costs = None
        if options.model_draft:
            # The option is about the model. A draft model of a known class runs as that class.
            known = not has_unknown_class(options.model_draft)
            draft_architecture = None if known else options.as_architecture
            draft_costs = _open(options.model_draft, draft_architecture, files)
        assigner = Assigner(
            costs, devices, main_memory, draft_costs, options.ctx_size_draft,
            embedding_on_card=embedding_card is not None,
        )
        shown_types = LoadOptions.OPTIONS["cache_type"].choices
        by_type = {
            name: replace(run, cache_type=CacheType.parse(name))
            for name in dict.fromkeys((*shown_types, str(run.cache_type)))
        }
        most = costs.config.max_ctx_size
        largest = {
            name: min(most, _largest_ctx_size(assigner, other)) for name, other in by_type.items()
        }
        ctx_size = _chosen_ctx_size(options, costs.config, largest[str(run.cache_type)])
        _check_positions("ctx_size", ctx_size, costs.config)
        if draft_costs is not None:
            _check_positions(
                "ctx_size_draft", options.ctx_size_draft or ctx_size, draft_costs.config
            )
        run = run.at(ctx_size)
        shares = assigner.assign(ctx_size, run)
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
            devices=tuple(_record(share, segments) for share in shares),
            largest_ctx_size=largest,
            bytes_by_cache_type={
                name: sum(
                    share.total_bytes
                    for share in (
                        shares if other.cache_type == run.cache_type
                        else assigner.assign(ctx_size, other)
                    )
                )
                for name, other in by_type.items()
            },
            model_draft=os.fspath(options.model_draft) if options.model_draft else None,
            ctx_size_draft=draft.ctx_size if draft is not None else 0,
            loras=dict(options.chosen_loras()),
            cache_window=run.cache_window if run.has_open_pages else 0,
            cache_size=model.cache_tokens,
        )
        yield PlannedModel(reservation, model, tuple(segments.values()), draft)


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


def _largest_ctx_size(assigner: Assigner, run: RunOptions) -> int:
    """Return the most tokens that fit, in whole pages; 0 where not one page fits."""

    def headroom(pages: int) -> int:
        found = [share.headroom_bytes for share in assigner.assign(pages * PAGE_LEN, run)]
        # The sum where all fit, because one device's headroom jumps when a layer moves.
        return min(found) if min(found) < 0 else sum(found)

    most = assigner.most_pages(run)
    if run.cache_size:
        most = min(most, pages_for(run.cache_size))
    return largest_fitting(headroom, most) * PAGE_LEN


def _record(
    share: DeviceShare, segments: dict[tuple[str, str], Segment]
) -> DeviceReservation:
    """Make the public record of a share, which must equal the tensors as they are laid out."""
    budget = share.budget
    keys = [(budget.device, name) for name in SEGMENTS]
    laid_out = tuple(segments[key].nbytes if key in segments else 0 for key in keys)
    summed = (
        share.weights_bytes, share.cache_bytes, share.workspace_bytes, share.embedding_bytes,
        share.lora_bytes,
    )
    assert summed == laid_out, (summed, laid_out)
    lent = budget.limited()
    workspace = segments.get((budget.device, "workspace"))
    return DeviceReservation(
        device=budget.device,
        first_layer=share.layers.start,
        end_layer=share.layers.stop,
        weights_bytes=share.weights_bytes,
        cache_bytes=share.cache_bytes,
        workspace_bytes=share.workspace_bytes,
        overhead_bytes=share.overhead_bytes,
        overhead_measured=budget.overhead_measured,
        capacity_bytes=lent.capacity_bytes,
        free_bytes=lent.free_bytes,
        other_bytes=lent.other_bytes,
        limit_bytes=budget.limit_bytes,
        headroom_bytes=share.headroom_bytes,
        draft_bytes=share.draft_bytes,
        embedding_bytes=share.embedding_bytes,
        lora_bytes=share.lora_bytes,
        open_page_bytes=_bytes_of("open.", workspace),
        key_feedback_bytes=_bytes_of(("key_feedback", "key_mean"), workspace),
    )


def _bytes_of(prefix: str | tuple[str, ...], workspace: Segment | None) -> int:
    """Return the bytes of a workspace's tensors by the start of their names, drafts included."""
    if workspace is None:
        return 0
    specs = (offset.spec for offset in workspace.offsets)
    return sum(
        align(spec.nbytes, spec.device) for spec in specs
        if spec.name.removeprefix(DRAFT_PREFIX).startswith(prefix)
    )
