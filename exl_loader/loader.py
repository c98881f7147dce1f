"""Load a model: plan, refuse what does not fit, build, take memory, fill it.

Nothing is read before the plan fits, and whatever fails gives everything back: a load that
raises leaves the memory as it found it.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import CacheLayer, CacheType, pages_for
from .errors import InsufficientMemory, InvalidSettings
from .memory import Buffers, allocate, is_out_of_memory, trim_heap
from .paging import PagedCache
from .progress import NullProgress, Progress, task
from .reservation import PlannedModel, PlanRequest, Reservation, planned
from .reservation.options import CtxSize
from .reservation.text import refusal
from .workspace import DEFAULT_CHUNK_SIZE, DEFAULT_MAX_BATCH_SIZE

if TYPE_CHECKING:
    from .engine import LoadedModel
    from .kernels.interface import Ops
    from .model import Model
    from .tokenizer import Tokenizer


def load(
    model_dir: str | os.PathLike[str],
    *,
    ctx_size: CtxSize = None,
    cache_type: str | CacheType = "fp16",
    device: str | Sequence[str] = "auto",
    gpu_split: str | Sequence[float] | None = None,
    memory_limit: int | str | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    alpha_value: float = 1.0,
    compress_pos_emb: float = 1.0,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model folder (EXL2, GPTQ or unquantised safetensors).

    What it allocates is what `plan()` says with the same arguments, to the byte, and nothing
    more is allocated later. The kernels are compiled on the first load.

    Args:
        model_dir, ctx_size, cache_type, device, gpu_split, memory_limit, chunk_size,
        max_batch_size, alpha_value, compress_pos_emb: see `plan`.
        progress: told what takes long: compiling, reserving memory, reading weights.

    Raises:
        InsufficientMemory: it does not fit; nothing was read and nothing taken.
        ExlLoaderError: the folder or an option is wrong; see `plan`. InvalidTokenizer: the
            folder has a tokenizer that cannot be used. KernelBuildError: the kernels do not
            compile. In every case all memory has been given back.
    """
    request = PlanRequest(
        model_dir,
        ctx_size,
        cache_type,
        device=device,
        gpu_split=gpu_split,
        memory_limit=memory_limit,
        chunk_size=chunk_size,
        max_batch_size=max_batch_size,
        alpha_value=alpha_value,
        compress_pos_emb=compress_pos_emb,
    )
    try:
        import torch  # noqa: F401  (its libraries are in memory before what is free is measured)

        with planned(request) as plan:
            return _load_planned(plan, alpha_value, compress_pos_emb, progress or NullProgress())
    except BaseException as error:
        _drop_locals(error)
        raise
    finally:
        trim_heap()


def _load_planned(
    plan: PlannedModel, alpha_value: float, compress_pos_emb: float, progress: Progress
) -> LoadedModel:
    """Go through the steps that need PyTorch, the cheap ones that can fail first."""
    if not plan.reservation.fits:
        raise refusal(plan.reservation)
    device = _runnable_device(plan.reservation)
    from .engine import LoadedModel
    from .kernels import get_ops

    tokenizer = _tokenizer(Path(plan.reservation.model_dir))
    ops = get_ops(device, progress)
    with ExitStack() as unwind:
        buffers = allocate(plan.segments, progress)
        unwind.callback(buffers.release)
        cache = _paged_cache(buffers, plan)
        model = _model(plan, buffers, cache, ops, alpha_value, compress_pos_emb, progress)
        loaded = LoadedModel(model, cache, tokenizer, plan.reservation, buffers)
        unwind.pop_all()
    return loaded


def _runnable_device(reservation: Reservation) -> str:
    """Return the one device to run on.

    Raises:
        InvalidSettings: the plan is for several devices, or for a kind without kernels.
    """
    names = [device.device for device in reservation.devices]
    if len(names) > 1 or not names[0].startswith("cpu"):
        raise InvalidSettings(
            "device",
            expected="cpu: this version plans for cards and for several devices, "
            "and runs on the CPU",
            actual=", ".join(names),
            remedy="Leave device at auto and gpu_split empty",
        )
    return "cpu"


def _tokenizer(model_dir: Path) -> Tokenizer | None:
    """Open the folder's tokenizer; a folder without one runs on token ids alone."""
    from .tokenizer import Tokenizer

    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return Tokenizer.from_dir(model_dir)


def _paged_cache(buffers: Buffers, plan: PlannedModel) -> PagedCache:
    views = buffers.views("cache")
    cache_type = CacheType.parse(plan.reservation.cache_type)
    layers = [
        CacheLayer(
            k_codes=views[f"cache.{i}.k_codes"],
            k_scales=views.get(f"cache.{i}.k_scales"),
            v_codes=views[f"cache.{i}.v_codes"],
            v_scales=views.get(f"cache.{i}.v_scales"),
            cache_type=cache_type,
        )
        for i in range(plan.reservation.num_layers)
    ]
    return PagedCache(layers, pages_for(plan.reservation.ctx_size))


def _model(
    plan: PlannedModel,
    buffers: Buffers,
    cache: PagedCache,
    ops: Ops,
    alpha_value: float,
    compress_pos_emb: float,
    progress: Progress,
) -> Model:
    """Read the weights into their views and put the model together."""
    from .model import Model
    from .weights import load_weights

    total = sum(spec.nbytes for spec in plan.blueprint.specs())
    try:
        with task(progress, "loading weights", total, "bytes") as advance:
            weights = load_weights(
                plan.blueprint, plan.checkpoint, buffers.views("weights"), ops, advance
            )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemory(
            "main memory for weights on their way into the buffers",
            expected="what the plan saw free beside them",
            actual="the system refused it",
            remedy="Everything taken was given back. Close what took the memory meanwhile.",
        ) from error
    return Model(
        plan.blueprint,
        weights,
        buffers.views("workspace"),
        cache,
        ops,
        alpha_value=alpha_value,
        compress_pos_emb=compress_pos_emb,
    )


def _drop_locals(error: BaseException) -> None:
    """Empty the frames that an error went through.

    A host that keeps the error to show it would otherwise keep, through its traceback, every
    buffer and view that the load had in a local variable.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            pending += [current.__cause__, current.__context__]
    gc.collect()
