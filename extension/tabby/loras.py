"""LoRA adapters, as TabbyAPI's configuration and its API ask for them.

They are loaded into the room that the model has for them. Where that is too small, the model is
loaded again with exactly the room that they need; a plan of that load is made first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import exl_loader
from exl_loader import ExlLoaderError
from exl_loader.memory.reservation.text import refusal

from .contract import say

if TYPE_CHECKING:
    from exl_loader import LoadedModel

    from .container import ExlLoaderContainer


@dataclass(frozen=True)
class ListedLora:
    """A loaded LoRA as TabbyAPI lists it.

    TabbyAPI shows the name of the folder of `lora_path`, and `lora_scaling * lora_r / lora_alpha`
    as the scaling that the user chose.
    """

    lora_path: Path
    lora_scaling: float
    lora_r: int = 1
    lora_alpha: int = 1


def listed(loaded: LoadedModel | None) -> list[ListedLora]:
    """Return the LoRAs of a model; none without one."""
    if loaded is None:
        return []
    return [ListedLora(Path(lora.path) / "adapter_model.safetensors", lora.scaling)
            for lora in loaded.loras]


async def unload(container: ExlLoaderContainer, skip_wait: bool) -> None:
    """Unload all LoRAs; the model stays."""
    async with container.changing():
        await container.wait_for_jobs(skip_wait)
        if container.model is not None:
            await container.in_thread(container.model.unload_loras)


async def load(
    container: ExlLoaderContainer, folder: Path, asked: Sequence[dict[str, Any]], skip_wait: bool
) -> dict[str, list[str]]:
    """Load LoRAs in addition to those that are loaded.

    Args:
        container: the model.
        folder: the folder of all LoRAs.
        asked: `name` and `scaling` of each.
        skip_wait: cancel running requests instead of waiting for them.

    Returns:
        the names that could be loaded (`success`) and the others (`failure`); the log has the
        reason of each failure.
    """
    result: dict[str, list[str]] = {"success": [], "failure": []}
    async with container.changing():
        await container.wait_for_jobs(skip_wait)
        for entry in asked:
            name = str(entry.get("name"))
            scaling = entry.get("scaling")
            try:
                await _add(container, str(folder / name), 1.0 if scaling is None else scaling)
                result["success"].append(name)
            except ExlLoaderError as error:
                say(f"LoRA {name}: {error}", level="error")
                result["failure"].append(name)
    return result


async def _add(container: ExlLoaderContainer, path: str, scaling: float) -> None:
    loaded = container.model
    if loaded is None:
        raise container.unloaded_error()
    wanted = [*((lora.path, lora.scaling) for lora in loaded.loras), (path, scaling)]
    options = container.choice.load | {"loras": wanted, "ctx_size": loaded.ctx_size}
    planned = await container.in_thread(_plan, container.model_dir, options)
    rooms = {device.device: device.lora_bytes for device in loaded.reservation.devices}
    if all(device.lora_bytes <= rooms.get(device.device, 0) for device in planned.devices):
        await container.in_thread(loaded.load_lora, path, scaling)
        return
    if not planned.fits:
        raise refusal(planned)
    say(f"the model is loaded again with room for the LoRA {Path(path).name}")
    await container.reload(options)


def _plan(model_dir: Path, options: dict[str, Any]) -> Any:
    chosen = exl_loader.LoadOptions(**options)
    return exl_loader.plan(model_dir, **chosen.for_plan(), replacing=True)
