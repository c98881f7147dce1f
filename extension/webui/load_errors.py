"""Errors of the web UI's own while it loads a model for us, named: thing, cause and remedy.

Before a loader is asked, the web UI reads the folder's JSON files; after it, for `ExLlamav2_HF`,
the tokenizer. What it says of a file that it cannot read does not name the file.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exl_loader.checkpoint.config import ModelConfig
from exl_loader.utils.errors import (
    ExlLoaderError,
    InvalidConfig,
    InvalidSettings,
    InvalidTokenizer,
    ModelNotFound,
    UnsupportedArchitecture,
    UnsupportedFormat,
    modules_of,
)
from exl_loader.utils.json_keys import read_json_object_if_there

from . import host

# What the web UI reads of a folder, and what is wrong where it cannot.
_JSON_FILES: dict[str, type[ExlLoaderError]] = {
    "config.json": InvalidConfig,
    "chat_template.json": InvalidTokenizer,
    "tokenizer_config.json": InvalidTokenizer,
}


# Keys that are missing, or whose values are of another kind than the web UI takes for granted.
_OF_CONTENT = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def naming_the_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Have the web UI's reading of a folder fail with the name of the file that it failed over."""

    @functools.wraps(original)
    def get_model_metadata(model: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(model, *args, **kwargs)
        except ExlLoaderError:
            raise
        except Exception as error:
            _check_files(host.model_path(model), error)
            raise

    return get_model_metadata


def _check_files(path: Path, error: Exception) -> None:
    """Raise the error of a file that the web UI cannot have read; return where all are good."""
    for name, kind in _JSON_FILES.items():
        read_json_object_if_there(path / name, error=kind)
    is_gguf = path.suffix.lower() == ".gguf" or any(path.glob("*.gguf"))
    if is_gguf and isinstance(error, (ValueError, struct.error, KeyError)):
        raise UnsupportedFormat(
            str(path), expected="a GGUF file that the web UI can read",
            actual=f"{type(error).__name__}: {error}", remedy="Download it again",
        ) from error
    if isinstance(error, _OF_CONTENT) and (path / "config.json").is_file():
        # Our own reading of the file knows which key it is.
        with contextlib.suppress(ModelNotFound, UnsupportedArchitecture):
            ModelConfig.from_dir(path)
        raise InvalidConfig(
            str(path), expected="JSON files with the keys of a model",
            actual=f"what the web UI cannot read ({type(error).__name__}: {error})",
            remedy="Download config.json and tokenizer_config.json again",
        ) from error


def named(model_name: str, loader: str | None, error: Exception) -> Exception:
    """Name what the web UI itself could not do with a load; other errors are returned.

    Args:
        model_name, loader: what was asked for.
    """
    if isinstance(error, ExlLoaderError):
        return error
    path = host.model_path(model_name)
    if not path.exists():
        return ModelNotFound(
            f"model {model_name!r}", expected="a folder or file of the web UI's models",
            actual="nothing of that name", remedy="Choose one that is there",
        )
    if isinstance(error, KeyError) and error.args == (loader,):
        return InvalidSettings(
            "loader", expected="a loader of the web UI, such as ExLlamav2", actual=repr(loader))
    if any(name.startswith("modules.transformers_loader") for name in modules_of(error)):
        reason = str(error).strip().partition("\n")[0]
        return InvalidTokenizer(
            str(path), expected="a tokenizer that transformers can read", actual=reason,
            remedy="Choose ExLlamav2, which reads tokenizers itself",
        )
    return error
