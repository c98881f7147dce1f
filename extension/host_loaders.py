"""The loaders as the web UI calls them; what a load needs is imported when there is one."""

from __future__ import annotations

from typing import Any

from . import loading
from .host import LOADERS


def load_native(model_name: str) -> tuple[Any, Any]:
    """Load for `ExLlamav2`: this engine's own generation. Returns model and tokenizer.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing is held.
    """
    from .webui_model import Exllamav3Model

    model = loading.load(model_name, LOADERS[0], Exllamav3Model)
    return model, model


def load_hf(model_name: str) -> Any:
    """Load for `ExLlamav2_HF`: transformers' generation. The web UI adds a tokenizer.

    Raises:
        ExlLoaderError: what is wrong, in one line; nothing is held.
    """
    from .webui_model_hf import Exllamav3HF

    return loading.load(model_name, LOADERS[1], Exllamav3HF)
