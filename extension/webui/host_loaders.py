"""The loaders as the web UI calls them; what a load needs is imported when there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exl_loader.utils.errors import InvalidTokenizer

from . import loading
from .host import LOADERS

if TYPE_CHECKING:
    from exl_loader.engine import LoadedModel


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
        ExlLoaderError: what is wrong, in one line; nothing is held. InvalidTokenizer: the
            folder has no tokenizer.
    """
    from .webui_model_hf import Exllamav3HF

    def with_tokenizer(loaded: LoadedModel) -> Exllamav3HF:
        if not loaded.has_tokenizer:
            raise InvalidTokenizer(
                f"{LOADERS[1]} with {model_name}", expected="a folder with a tokenizer",
                actual="one without tokenizer files",
                remedy="Copy the tokenizer files of the original model into the folder",
            )
        return Exllamav3HF(loaded)

    return loading.load(model_name, LOADERS[1], with_tokenizer)
