"""The LoRAs of the web UI's menu, its `--lora` flag and its API, for our models.

The web UI names all LoRAs that a model should have. They are loaded into the room that the model
has for them. Where that is too small, the model is loaded again with exactly the room that they
need. A plan of that load is made first, so that a LoRA that cannot be used, or that does not fit,
is refused while the model stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import exl_loader
from exl_loader import ExlLoaderError, InsufficientMemory, InvalidCall

from ..patching import Patches
from . import contract, loading
from .contract import LOADERS, say

if TYPE_CHECKING:
    from exl_loader import LoadedModel


def extend(patches: Patches, module: ModuleType) -> None:
    """Let the web UI's function for LoRAs serve our models as well.

    Args:
        module: `modules.LoRA`.
    """
    original = module.add_lora_transformers

    def add_lora_transformers(lora_names: list[str]) -> None:
        shared = contract.module("modules.shared")
        if not is_ours(shared.model):
            original(lora_names)
            return
        paths = [str(module.get_lora_path(name)) for name in lora_names if name != "None"]
        try:
            apply(paths)
        except ExlLoaderError as error:
            if shared.generation_lock is not None:
                raise
            # `--lora`: the web UI is still starting, and an error would end it.
            say(f"no LoRA was applied: {error}", level="error")

    patches.replace(original, add_lora_transformers)


def is_ours(model: Any) -> bool:
    """Return whether this is the model that this plugin has loaded."""
    loaded = getattr(model, "loaded", None)
    return loaded is not None and loaded is loading.current()


def apply(paths: Sequence[str]) -> None:
    """Give the loaded model these LoRAs and no others.

    Args:
        paths: their folders; each counts once.

    Raises:
        ExlLoaderError: what is wrong, in one line. The model has the LoRAs that it had.
    """
    by_folder: dict[str, str] = {}
    for path in paths:
        by_folder.setdefault(os.path.realpath(path), path)
    paths = list(by_folder.values())
    with loading.lock, _no_text_of_transformers():
        loaded = loading.current()
        assert loaded is not None
        before = [lora.path for lora in loaded.loras]
        if {os.path.realpath(path) for path in before} != set(by_folder):
            _change(loaded, before, paths)
        loading.note_loras(paths)


def _change(loaded: LoadedModel, before: Sequence[str], paths: Sequence[str]) -> None:
    if not paths:
        loaded.unload_loras()
        return
    choice = loading.loaded_as()
    plan = exl_loader.plan(
        choice.model_dir, replacing=True, **choice.for_plan() | {"loras": paths}
    )
    rooms = {device.device: device.lora_bytes for device in loaded.reservation.devices}
    fits = all(device.lora_bytes <= rooms.get(device.device, 0) for device in plan.devices)
    if not fits and not plan.fits:
        (short, *_) = [device for device in plan.devices if not device.fits]
        raise InsufficientMemory(
            f"the LoRAs on {short.device}", expected=f"{short.lora_bytes} bytes besides the model",
            actual=f"{short.missing_bytes} bytes too few",
            remedy="Load the model with a smaller context or a cache of fewer bits",
        )
    # Refused while a text is being generated.
    loaded.unload_loras()
    try:
        if fits:
            _load_all(loaded, paths)
        else:
            loading.reload(paths)
    except BaseException:
        _restore(before)
        raise
    say(f"LoRAs: {', '.join(Path(path).name for path in paths)}", level="info")


def _load_all(loaded: LoadedModel, paths: Sequence[str]) -> None:
    for path in paths:
        loaded.load_lora(path)


def _restore(before: Sequence[str]) -> None:
    """Give the model the LoRAs that it had, after others could not be loaded."""
    loaded = loading.current()
    if loaded is None:
        loading.reload(before)
        return
    loaded.unload_loras()
    _load_all(loaded, before)


@contextmanager
def _no_text_of_transformers() -> Iterator[None]:
    """Refuse a change while transformers generates, which holds the engine between tokens only."""
    shared = contract.module("modules.shared")
    lock = shared.generation_lock
    if lock is None or shared.args.loader != LOADERS[1]:
        yield
        return
    if not lock.acquire(blocking=False):
        raise InvalidCall(
            "the LoRAs of a model", expected="no text that is being generated", actual="one",
            remedy="Wait for its end, or stop it",
        )
    try:
        yield
    finally:
        lock.release()
