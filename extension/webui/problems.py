"""Errors of loads and generations: named, described for the API's client, shown in the page.

The web UI writes the error of a generation into its log and nowhere else. It reads a folder's
JSON files before it calls a loader, and the tokenizer after `ExlLamav2_HF` has loaded; its own
errors then do not name the file.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_loader import (
    CacheFull,
    ExlLoaderError,
    InvalidCall,
    InvalidConfig,
    InvalidSettings,
    InvalidTokenizer,
    LoadOptions,
    ModelNotFound,
    ModelUnloaded,
    PromptTooLong,
    UnsupportedArchitecture,
    UnsupportedFormat,
)
from exl_loader.utils.errors import known_line, modules_of
from exl_loader.utils.json_keys import read_json_object_if_there

from ..panel.panel import error_html
from . import contract
from .contract import say

# The error of the last generation as HTML, for the Model tab; empty after a success.
_last_html = ""

# What was reported last in this thread. The API asks in the thread in which it waits.
_of_thread = threading.local()


@dataclass(frozen=True)
class Problem:
    """An error as a client of the API gets it.

    Args:
        message: one line. status: of HTTP. param: the setting that is refused.
    """

    message: str
    status: int
    param: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the body of an error in the web UI's own form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": None}


# Errors in the request, as opposed to errors of the model or the machine.
_OF_REQUEST = (InvalidSettings, PromptTooLong, InvalidTokenizer, ModelNotFound, ValueError)
_TRY_LATER = (CacheFull, InvalidCall, ModelUnloaded)


def problem(error: BaseException) -> Problem:
    """Describe an error for a client."""
    message = known_line(error) or f"{type(error).__name__}: {error}"
    # Settings are named by one word; other things that can be refused are described in several.
    param = None
    if isinstance(error, InvalidSettings) and error.thing.isidentifier():
        param = error.thing
    status = 400 if isinstance(error, _OF_REQUEST) else 500
    return Problem(message, 503 if isinstance(error, _TRY_LATER) else status, param)


# ---- Reporting ----


def report(error: Exception) -> None:
    """Report what ended a generation, in the page that asked for it and in the log."""
    global _last_html
    if getattr(error, "_exl_is_reported", False):
        return
    error._exl_is_reported = True  # type: ignore[attr-defined]
    _of_thread.problem = problem(error)
    # Only its text is kept: a traceback would keep the generation's tensors alive.
    _last_html = error_html(error, heading="Generation failed")
    known = known_line(error)
    line = known or f"Unexpected {type(error).__name__}: {error}"
    if known is None or getattr(error, "details", None):
        line += " (See the Model tab for details.)"
    say(line, level="error")
    _warn_in_page(line)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Report the error that ends a `with` block, and let it pass."""
    try:
        yield
    except Exception as error:
        report(error)
        raise


def notice(line: str, *, in_page: bool = True) -> None:
    """Tell the user something about an answer that is not an error.

    Args:
        in_page: show it in the page that asked as well, not only in the log.
    """
    say(line)
    if in_page:
        _warn_in_page(line[:1].upper() + line[1:])


def _warn_in_page(line: str) -> None:
    context = getattr(sys.modules.get("gradio.context"), "LocalContext", None)
    # Outside a page's event, for example in the API, there is no page to show it in.
    if context is not None and context.event_id.get(None) is not None:
        sys.modules["gradio"].Warning(line)


def clear() -> None:
    """Forget the last error, because a generation succeeded or the model has changed."""
    global _last_html
    _last_html = ""


def last_html() -> str:
    """Return the error of the last generation, its details folded; empty if it succeeded."""
    return _last_html


def take() -> Problem | None:
    """Return what was reported in this thread since the last call, once."""
    found = getattr(_of_thread, "problem", None)
    _of_thread.problem = None
    return found


def note_ending(reason: str | None) -> None:
    """Keep why an answer ended, for the API: the web UI guesses it from token counts."""
    endings = getattr(_of_thread, "endings", [])
    _of_thread.endings = [*endings, reason]


def take_endings() -> list[str | None]:
    """Return why answers ended in this thread since the last call."""
    found = getattr(_of_thread, "endings", [])
    _of_thread.endings = []
    return found


# ---- Naming the web UI's own errors ----

# The JSON files that the web UI reads, and the error of each.
_JSON_FILES: dict[str, type[ExlLoaderError]] = {
    "config.json": InvalidConfig,
    "chat_template.json": InvalidTokenizer,
    "tokenizer_config.json": InvalidTokenizer,
}

# The web UI raises these for missing keys and for values of an unexpected type.
_OF_CONTENT = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def naming_the_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the web UI's reading of a folder: its error names the file that caused it."""

    @functools.wraps(original)
    def get_model_metadata(model: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(model, *args, **kwargs)
        except ExlLoaderError:
            raise
        except Exception as error:
            _check_files(contract.model_path(model), error)
            raise

    return get_model_metadata


def _check_files(path: Path, error: Exception) -> None:
    """Raise the error of a file that the web UI could not read; return if all are good."""
    for name, kind in _JSON_FILES.items():
        read_json_object_if_there(path / name, error=kind)
    is_gguf = path.suffix.lower() == ".gguf" or any(path.glob("*.gguf"))
    if is_gguf and isinstance(error, (ValueError, struct.error, KeyError)):
        raise UnsupportedFormat(
            str(path), expected="a GGUF file that the web UI can read",
            actual=f"{type(error).__name__}: {error}", remedy="Download it again",
        ) from error
    if isinstance(error, _OF_CONTENT) and (path / "config.json").is_file():
        # Our own reading of config.json names the key.
        with contextlib.suppress(ModelNotFound, UnsupportedArchitecture):
            LoadOptions().stretched_length(path)
        raise InvalidConfig(
            str(path), expected="JSON files with the keys of a model",
            actual=f"content that the web UI cannot read ({type(error).__name__}: {error})",
            remedy="Download config.json and tokenizer_config.json again",
        ) from error


def named_load_error(model_name: str, loader: str | None, error: Exception) -> Exception:
    """Name what made the web UI itself fail during a load; return other errors unchanged.

    Args:
        model_name, loader: what was asked for.
    """
    if isinstance(error, ExlLoaderError):
        return error
    path = contract.model_path(model_name)
    if not path.exists():
        return ModelNotFound(
            f"model {model_name!r}", expected="a file or folder among the web UI's models",
            actual="nothing of that name", remedy="Choose a model from the menu",
        )
    if isinstance(error, KeyError) and error.args == (loader,):
        return InvalidSettings(
            "loader", expected="a loader of the web UI, such as ExLlamav2", actual=repr(loader))
    if any(name.startswith("modules.transformers_loader") for name in modules_of(error)):
        reason = str(error).strip().partition("\n")[0]
        return InvalidTokenizer(
            str(path), expected="a tokenizer that transformers can read", actual=reason,
            remedy="Choose the loader ExLlamav2, which reads tokenizers itself",
        )
    return error


def named_generation_error(error: Exception) -> Exception:
    """Name the setting over which the web UI or transformers failed; return other errors."""
    modules = modules_of(error)
    if any(name.startswith("modules.grammar.") for name in modules):
        return InvalidSettings(
            "grammar_string",
            expected="a GBNF grammar with a rule named root and a rule for every name in it",
            actual=f"a grammar that the web UI cannot read ({type(error).__name__}: {error})")
    checks_settings = modules[-1:] and modules[-1].startswith("transformers.")
    if checks_settings and isinstance(error, (TypeError, ValueError)):
        return InvalidSettings(
            "a setting of this request", expected="a value that transformers' samplers accept",
            actual=str(error))
    return error
