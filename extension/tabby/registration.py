"""Adds the backend to TabbyAPI, in memory: no file of it is changed.

TabbyAPI has no list of backends that could be extended. `common.model` looks up two of its own
globals whenever a model is loaded, the check of the backend's name and the container's class, so
replacing these two is enough. The branch `exl2-checkpoint` has a table of containers instead.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from exl_loader.checkpoint import is_quantised

from ..patching import Patches
from . import problems
from .container import ExlLoaderContainer
from .contract import BACKENDS, TabbyDiffers, module, say

patches = Patches()

# The methods of quantisation in a config.json that name a folder of this backend's.
_QUANT_METHODS = ("exl2", "gptq")

_REGISTRY = "_BACKEND_REGISTRY"


def extend_model(model: ModuleType) -> None:
    """Add the backend.

    Args:
        model: TabbyAPI's `common.model`.

    Raises:
        TabbyDiffers: TabbyAPI chooses its backend in a way that is not known.
    """
    if isinstance(getattr(model, _REGISTRY, None), dict):
        registry = getattr(model, _REGISTRY)
        if BACKENDS[1] in registry:
            say(f"the backend {BACKENDS[1]} of this TabbyAPI is replaced by exl_loader")
        patches.set(model, _REGISTRY, registry | dict.fromkeys(BACKENDS, ExlLoaderContainer))
    elif callable(getattr(model, "validate_backend", None)):
        chooser = _Chooser(model.validate_backend, getattr(model, "ExllamaV3Container", None))
        patches.set(model, "validate_backend", lambda backend, hf_model: None)
        patches.set(model, "ExllamaV3Container", chooser)
    else:
        raise TabbyDiffers("it has neither a table of backends nor validate_backend")
    _log_warnings()
    say(f"the backends {' and '.join(BACKENDS)} are available, for EXL2 and GPTQ models")


def extend_sampling(sampling: ModuleType) -> None:
    """Do not report samplers as ignored while a model of this backend is loaded.

    Args:
        sampling: TabbyAPI's `common.sampling`, which names what EXL3 ignores.
    """
    original = getattr(sampling.BaseSamplerRequest, "warn_unsupported_params", None)
    if original is None:
        return

    def warn_unsupported_params(self: Any) -> None:
        if not isinstance(module("common.model").container, ExlLoaderContainer):
            original(self)

    patches.set(sampling.BaseSamplerRequest, "warn_unsupported_params", warn_unsupported_params)


def extend_answers(answers: ModuleType) -> None:
    """Tell a client why its request failed; see `problems`."""
    problems.extend(patches, answers)


class _Chooser:
    """Stands where TabbyAPI has the class of its only container, and creates one or the other.

    Args:
        validate: TabbyAPI's own check of a backend's name.
        exl3: TabbyAPI's own container; None where exllamav3 is not installed.
    """

    def __init__(self, validate: Any, exl3: Any) -> None:
        self._validate = validate
        self._exl3 = exl3

    async def create(self, model_directory: Path, hf_model: Any, **values: Any) -> Any:
        """Create the container that a configuration asks for."""
        backend = values.get("backend")
        if is_ours(backend, model_directory, hf_model, exl3=self._exl3 is not None):
            return await ExlLoaderContainer.create(model_directory, hf_model, **values)
        if backend is not None and backend != "exllamav3":
            raise ValueError(
                f"the backend {backend!r} is not known. There are exllamav3, "
                f"{' and '.join(BACKENDS)}"
            )
        self._validate(backend, hf_model)
        return await self._exl3.create(model_directory, hf_model, **values)


def is_ours(backend: Any, model_directory: Path, hf_model: Any, *, exl3: bool) -> bool:
    """Return whether a folder is to be loaded by this backend.

    Args:
        backend: as configured; None for a choice by the folder.
        exl3: whether TabbyAPI's own backend is installed. Without it this backend loads
            unquantised folders as well.
    """
    if backend is not None:
        return backend in BACKENDS
    method = hf_model.quant_method()
    if method is None:
        return not exl3 or is_quantised(model_directory)
    return method in _QUANT_METHODS


class _Log(logging.Handler):
    """Writes records of the engine into TabbyAPI's log."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), level="error" if record.levelno >= logging.ERROR else "warning")


def _log_warnings() -> None:
    """Write the engine's warnings into TabbyAPI's log; without a handler Python prints them."""
    handler, logger = _Log(logging.WARNING), logging.getLogger("exl_loader")
    logger.addHandler(handler)
    patches.later(lambda: logger.removeHandler(handler))
    patches.set(logger, "propagate", False)
