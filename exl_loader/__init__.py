"""EXL2 and GPTQ models for text-generation-webui, with a memory reservation to trust.

    import exl_loader

    print(exl_loader.plan("model", ctx_size=8192, cache_type="q4").total_bytes)
    with exl_loader.load("model", ctx_size=8192, cache_type="q4") as model:
        print("".join(model.generate("Once upon a time", max_new_tokens=40)))

Everything public is in `__all__`; what the package holds besides may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import LoadedModel as LoadedModel
    from .generation.settings import SamplingSettings as SamplingSettings
    from .loader import load as load
    from .memory.reservation.options import LoadOptions as LoadOptions
    from .memory.reservation.planning import plan as plan
    from .memory.reservation.records import Reservation as Reservation
    from .utils.errors import CacheFull as CacheFull
    from .utils.errors import DeviceError as DeviceError
    from .utils.errors import DownloadError as DownloadError
    from .utils.errors import ExlLoaderError as ExlLoaderError
    from .utils.errors import InsufficientMemory as InsufficientMemory
    from .utils.errors import InvalidCall as InvalidCall
    from .utils.errors import InvalidCheckpoint as InvalidCheckpoint
    from .utils.errors import InvalidConfig as InvalidConfig
    from .utils.errors import InvalidSettings as InvalidSettings
    from .utils.errors import InvalidTokenizer as InvalidTokenizer
    from .utils.errors import KernelBuildError as KernelBuildError
    from .utils.errors import MachineFailed as MachineFailed
    from .utils.errors import MachineLost as MachineLost
    from .utils.errors import MachineRefused as MachineRefused
    from .utils.errors import ModelForked as ModelForked
    from .utils.errors import ModelNotFound as ModelNotFound
    from .utils.errors import ModelUnloaded as ModelUnloaded
    from .utils.errors import PromptTooLong as PromptTooLong
    from .utils.errors import UnsupportedArchitecture as UnsupportedArchitecture
    from .utils.errors import UnsupportedFormat as UnsupportedFormat

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "DeviceError",
    "DownloadError",
    "ExlLoaderError",
    "InsufficientMemory",
    "InvalidCall",
    "InvalidCheckpoint",
    "InvalidConfig",
    "InvalidSettings",
    "InvalidTokenizer",
    "KernelBuildError",
    "LoadOptions",
    "LoadedModel",
    "MachineFailed",
    "MachineLost",
    "MachineRefused",
    "ModelForked",
    "ModelNotFound",
    "ModelUnloaded",
    "PromptTooLong",
    "Reservation",
    "SamplingSettings",
    "UnsupportedArchitecture",
    "UnsupportedFormat",
    "load",
    "plan",
]

# The modules of the names that are no errors. Each is imported when its name is first asked
# for, because `import exl_loader` must cost nothing and `plan` must not import PyTorch.
_MODULES = {
    "LoadOptions": "memory.reservation.options",
    "LoadedModel": "engine",
    "Reservation": "memory.reservation.records",
    "SamplingSettings": "generation.settings",
    "load": "loader",
    "plan": "memory.reservation.planning",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES.get(name, 'utils.errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
