"""Load a model: plan it, open its devices, allocate its buffers and read its weights.

No weight is read before the plan fits. A load that fails frees all its memory.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .backends import backend_of, get_ops
from .cache.layout import CacheType
from .cache.paging import PageCopier, PagedCache
from .generation.draft_model import DraftModel, check_vocabularies
from .machines.connected import connection_of
from .memory.buffers import Buffers, allocate, trim_heap
from .memory.reservation import LoadOptions, PlannedModel, planned
from .memory.reservation.budgets import chosen_devices, gpu_split_by_machine, of_machine
from .memory.reservation.costs import DRAFT_PREFIX
from .memory.reservation.text import refusal
from .other_machines import OtherMachines
from .utils.errors import DeviceError, InsufficientMemory, drop_locals, is_out_of_memory
from .utils.output import warn
from .utils.progress import (
    LOADING,
    LOADING_DRAFT,
    LockedProgress,
    Progress,
    checked_progress,
    task,
)
from .utils.system.processors import torch_on_one_thread

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from .backends.base import DeviceOps
    from .engine import LoadedModel
    from .machines.connection import Machines
    from .memory.reservation.answers import PlannedPart
    from .memory.reservation.costs import PlacedModel
    from .memory.reservation.options import LoadKeywords
    from .model.forward import Model
    from .model.local_layers import LocalLayers
    from .text.tokenizer import Tokenizer

    Workspaces = Mapping[str, Mapping[str, torch.Tensor]]


def load(
    model_dir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Unpack[LoadKeywords],
) -> LoadedModel:
    """Load a model folder (EXL2, GPTQ or unquantised safetensors).

    It allocates exactly the bytes that `plan` returns for the same options, and nothing later. The
    kernels are compiled on the first load.

    The logger `exl_loader` warns of a context beyond the model's own length and of RoPE options
    without an effect (see `Reservation.warnings`), and of a folder without a tokenizer (see
    `LoadedModel.tokenizer_warning`).

    Args:
        model_dir: folder with config.json and *.safetensors.
        progress: gets the tasks of the load: importing PyTorch, compiling, reserving memory,
            and for the draft model, if there is one, and then for the model: reading weights, and
            sampling keys where they have fewer than 8 bits.
        options: see `LoadOptions`.

    Raises:
        InsufficientMemory: the model does not fit. Nothing was read and no memory was taken.
        ExlLoaderError: the folder or an option is wrong; see `plan`. InvalidTokenizer: the
            folder has a tokenizer that cannot be used. KernelBuildError: the kernels do not
            compile. In every case all memory has been freed.
    """
    progress = checked_progress(progress)
    chosen = LoadOptions.from_keywords("load", options)
    try:
        # Before it is waited for other machines.
        chosen.check()
        _import_torch(progress)
        machines = connection_of(chosen.machines, progress)
        _open_devices(model_dir, chosen, machines)
        return _plan_and_load(model_dir, chosen, progress, machines)
    except BaseException as error:
        drop_locals(error)
        gc.collect()
        raise
    finally:
        trim_heap()


def _plan_and_load(
    model_dir: str | os.PathLike[str], options: LoadOptions, progress: Progress,
    machines: Machines | None,
) -> LoadedModel:
    """Plan, and load the model if it fits.

    This is a function of its own because the plan's parts hold views of the buffers. After an
    error, `load` drops the locals of all frames but its own, which is still running.
    """
    with planned(model_dir, options, machines) as plan, torch_on_one_thread():
        return _load_planned(plan, options, progress, machines)


def _import_torch(progress: Progress) -> None:
    """Import PyTorch before the plan, so that the free memory is measured with its libraries."""
    if "torch" not in sys.modules:
        with task(progress, "importing PyTorch", None, ""):
            import torch  # noqa: F401


def _load_planned(
    plan: PlannedModel, options: LoadOptions, progress: Progress, machines: Machines | None
) -> LoadedModel:
    """Do the steps that need PyTorch. Cheap steps that can fail come first."""
    if not plan.reservation.fits:
        raise refusal(plan.reservation)
    for warning in plan.reservation.warnings:
        warn(warning)
    from .engine import LoadedModel

    tokenizer = _tokenizer(Path(plan.reservation.model_dir))
    if plan.draft is not None:
        check_vocabularies(
            (tokenizer, _tokenizer(Path(plan.reservation.model_draft or ""))),
            (plan.model.parts.config.vocab_size, plan.draft.parts.config.vocab_size),
        )
    ops = _open_ops(plan.model.parts.device_map.devices, progress)
    with ExitStack() as kept:
        others = None
        if machines is not None and plan.others:
            progress = LockedProgress(progress)
            others = kept.enter_context(OtherMachines(machines, plan, options, progress))
        buffers = allocate(plan.segments, progress)
        kept.callback(buffers.release)
        cache_type = CacheType.parse(plan.reservation.cache_type)
        reader = _WeightReader(buffers, ops, cache_type, options, tokenizer, progress)
        # First, because TabbyAPI shows the progress of a draft model before that of the model.
        drafting = None if plan.draft is None else reader.model(plan.draft, DRAFT_PREFIX)
        model, cache = reader.model(plan.model, others=others)
        draft_model = None
        if drafting is not None:
            draft, draft_cache = drafting
            vocab_size = min(model.config.vocab_size, draft.config.vocab_size)
            draft_model = DraftModel(draft, draft_cache, options.draft_max, vocab_size)
        loaded = LoadedModel(
            model, cache, tokenizer, plan.reservation, buffers, draft_model, others
        )
        if loaded.tokenizer_warning:
            warn(f"{plan.reservation.model_dir}: {loaded.tokenizer_warning}")
        kept.pop_all()
    return loaded


@dataclass(frozen=True)
class LoadedPart:
    """Layers of a model that another machine runs for the first one.

    Args:
        layers: ready to run.
        cache: of these layers.
        buffers: the allocated memory.
    """

    layers: LocalLayers
    cache: PagedCache
    buffers: Buffers


def load_part(plan: PlannedPart, options: LoadOptions, progress: Progress) -> LoadedPart:
    """Load a machine's part of a model.

    Args:
        plan: the part, whose checkpoint is open.
        options: those of the first machine that decide how layers compute.
        progress: gets the tasks of the load.

    Raises:
        As `load`.
    """
    from .model.local_layers import LocalLayers

    with torch_on_one_thread(), ExitStack() as kept:
        ops = _open_ops(plan.model.parts.device_map.devices, progress)
        buffers = allocate(plan.segments, progress)
        kept.callback(buffers.release)
        reader = _WeightReader(buffers, ops, plan.run.cache_type, options, None, progress)
        workspaces = reader.read(plan.model)
        cache = reader.cache(plan.model, workspaces)
        layers = LocalLayers(
            plan.model.parts, workspaces, cache.layers, ops, alpha_value=options.alpha_value,
            compress_pos_emb=options.compress_pos_emb,
        )
        kept.pop_all()
    return LoadedPart(layers, cache, buffers)


def _open_devices(
    model_dir: str | os.PathLike[str], options: LoadOptions, machines: Machines | None
) -> None:
    """Initialize this machine's devices, so that the plan can measure their overhead.

    Only devices that hold layers of the plan are initialized.

    Raises:
        InsufficientMemory: the model does not fit, even with the overhead that is assumed for
            devices that are not initialized.
    """
    own_split = gpu_split_by_machine(options, machines)[0]
    names = chosen_devices(of_machine(options, own_split, is_alone=machines is None))
    # A device with more overhead than was assumed may hold fewer layers, so that the next plan
    # needs another device.
    while any(not backend_of(name).is_initialized(name) for name in names):
        with planned(model_dir, options, machines) as plan:
            if not plan.reservation.fits:
                raise refusal(plan.reservation)
            used = [
                device.device for device in plan.reservation.devices if device.machine == 0
            ]
        closed = [name for name in used if not backend_of(name).is_initialized(name)]
        if not closed:
            return
        for name in closed:
            backend_of(name).initialize(name)


def _open_ops(names: Sequence[str], progress: Progress) -> dict[str, DeviceOps]:
    """Return the operations of each device, and compile the kernels that are missing.

    Raises:
        As `Backend.open`. Errors of a device name it.
    """
    opened: dict[str, DeviceOps] = {}
    for name in names:
        try:
            opened[name] = get_ops(name, progress)
        except (DeviceError, InsufficientMemory) as error:
            if name in error.thing:
                raise
            raise type(error)(
                f"{name}: {error.thing}", expected=error.expected, actual=error.actual,
                remedy=error.remedy, details=error.details,
            ) from error
    return opened


@contextmanager
def upload_buffers(ops: Mapping[str, DeviceOps], buffers: Buffers) -> Iterator[None]:
    """Lend operations that need one a buffer through which raw weights reach their device.

    It is memory that nothing uses yet: the device's cache, or its scratch where that is larger.
    It is zero again afterwards.

    Args:
        ops: by device.
    """
    with ExitStack() as lent:
        for device, operations in ops.items():
            if operations.needs_upload_buffer:
                lent.enter_context(_lend(operations, device, buffers))
        yield


@contextmanager
def _lend(ops: DeviceOps, device: str, buffers: Buffers) -> Iterator[None]:
    views = buffers.views("workspace", device)
    scratch = [view for name, view in views.items() if name.endswith("scratch")]
    memory = max(buffers.whole("cache", device), *scratch, key=lambda tensor: tensor.nbytes)
    ops.upload_buffer = memory
    try:
        yield
    finally:
        ops.upload_buffer = None
    # Not after an error, because a card that failed runs nothing more.
    memory.zero_()


@contextmanager
def _refused_memory_is_named() -> Iterator[None]:
    """Raise a typed error where the system refuses memory outside the buffers."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemory(
            "main memory for loading, outside the buffers",
            expected="memory that the plan saw free",
            actual="the system refused it",
            remedy="All memory was given back. Close the program that took the memory.",
        ) from error


def _tokenizer(model_dir: Path) -> Tokenizer | None:
    """Open the folder's tokenizer; None where it has none."""
    from .text.tokenizer import Tokenizer, has_tokenizer

    return Tokenizer.from_dir(model_dir) if has_tokenizer(model_dir) else None


@dataclass
class _WeightReader:
    """Makes models from buffers that have been allocated, and reads their weights."""

    buffers: Buffers
    ops: Mapping[str, DeviceOps]
    cache_type: CacheType
    options: LoadOptions
    tokenizer: Tokenizer | None
    progress: Progress

    def model(
        self, placed: PlacedModel, prefix: str = "", others: OtherMachines | None = None
    ) -> tuple[Model, PagedCache]:
        """Read a model's weights into their views.

        Args:
            placed: the model, or the first machine's part of it.
            prefix: before the names of its tensors in the buffers.
            others: the machines that load the other parts meanwhile.
        """
        from .model.forward import Model
        from .model.key_sample import SAMPLE_TEXT

        workspaces = self.read(placed, prefix)
        remote = None if others is None else others.layers()
        cache = self.cache(placed, workspaces, prefix, remote)
        rooms = {
            device: self.buffers.whole("loras", device)
            for device, nbytes in placed.rooms.items() if nbytes
        }
        with _refused_memory_is_named():
            model = Model(
                placed.parts, workspaces, cache, self.ops, remote=remote, rooms=rooms,
                alpha_value=self.options.alpha_value,
                compress_pos_emb=self.options.compress_pos_emb,
                sample_text_ids=self.tokenizer.encode(SAMPLE_TEXT) if self.tokenizer else (),
                progress=self.progress,
                sample_task=f"sampling {'draft ' if prefix else ''}keys",
            )
            for adapter, scaling in placed.loras.adapters:
                model.load_lora(adapter, scaling)
        return model, cache

    def read(self, placed: PlacedModel, prefix: str = "") -> Workspaces:
        """Read the weights; return the workspace of each device."""
        parts = placed.parts
        views = self._views("weights", prefix) | self._views("embedding", prefix)
        total = sum(spec.nbytes for spec in parts.specs())
        name = LOADING_DRAFT if prefix else LOADING
        with (
            _refused_memory_is_named(),
            task(self.progress, name, total, "bytes") as advance,
            upload_buffers(self.ops, self.buffers),
        ):
            parts.load(placed.checkpoint, views, self.ops, advance)
        return {
            device: self._views("workspace", prefix, device)
            for device in parts.device_map.devices
        }

    def cache(
        self, placed: PlacedModel, workspaces: Workspaces, prefix: str = "",
        elsewhere: PageCopier | None = None,
    ) -> PagedCache:
        """Make the cache of these layers; `elsewhere` as for `PagedCache`."""
        places = placed.parts.layer_places()
        return PagedCache.from_views(
            self._views("cache", prefix), "cache", self.cache_type,
            [(workspaces[device], index) for device, index in places],
            placed.cache_tokens, placed.parts.device_map.first_layer, elsewhere,
        )

    def _views(
        self, segment: str, prefix: str, device: str | None = None
    ) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(prefix): view
            for name, view in self.buffers.views(segment, device).items()
            if name.startswith(DRAFT_PREFIX) == bool(prefix)
        }
