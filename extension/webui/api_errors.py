"""Errors of our models as answers of the web UI's API: a status and a reason, in its own form.

The web UI logs what ends a load or a generation, and tells the client `Failed to load the model.`
or an empty text. Here the client gets the reason as well: `{"detail": ...}` for a load, and
`{"error": {"message": ...}}` for a request, as the web UI answers its own refusals. A stream has
begun when a generation fails, so its last chunk before `[DONE]` is the error, as OpenAI's is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from exl_loader.utils.errors import ExlLoaderError, InvalidSettings, ModelNotFound

from . import host, load_errors, loading, problems, recognise
from .host import LOADERS, Patches
from .problems import Problem

_ANSWERS = ("completions", "chat_completions")
# Why our generations end -> what the API says; the rest is as the web UI has it.
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
_STREAMS = ("stream_completions", "stream_chat_completions")


def extend_script(patches: Patches, module: ModuleType) -> None:
    """Give failed loads their reason, and refusals of other requests a status.

    Args:
        module: `modules.api.script`, or `extensions.openai.script` up to v4.1, before it serves.
    """
    patches.set(module, "HTTPException", _with_reason(module.HTTPException))
    errors = _errors_of(module)
    handlers = {
        ExlLoaderError: lambda request, error: _response(problems.problem(error)),
        # v4.0 has the error and nothing that answers it.
        errors.OpenAIError: lambda request, error: _response(
            Problem(error.message, error.code, getattr(error, "param", None))),
    }
    for kind, handler in handlers.items():
        if kind not in module.app.exception_handlers:
            module.app.add_exception_handler(kind, handler)
            patches.later(functools.partial(module.app.exception_handlers.pop, kind, None))
    logits = getattr(module, "OAIlogits", None)
    if logits is not None:
        patches.set(logits, "_get_next_logits", _raising(logits._get_next_logits, errors))
    anthropic = getattr(module, "Anthropic", None)
    if anthropic is not None:
        converter = anthropic.StreamConverter
        patches.set(converter, "process_chunk", _raising_chunk(converter.process_chunk, errors))


def extend_completions(patches: Patches, module: ModuleType) -> None:
    """Answer a generation that failed with its reason.

    Args:
        module: `modules.api.completions`, or `extensions.openai.completions` up to v4.1.
    """
    errors = _errors_of(module)
    for name in _ANSWERS:
        patches.set(module, name, _raising(getattr(module, name), errors))
    for name in _STREAMS:
        patches.set(module, name, _ending_in_error(getattr(module, name), errors))


def extend_models(patches: Patches, module: ModuleType) -> None:
    """Read the loader's name as the command line does, and tell of a model's warnings.

    Args:
        module: `modules.api.models`, or `extensions.openai.models` up to v4.1.
    """
    load, info = module._load_model, module.get_current_model_info

    def load_model(data: dict[str, Any]) -> Any:
        args = data.get("args")
        if isinstance(args, dict):
            if isinstance(args.get("loader"), str):
                args["loader"] = recognise.loader_name(args["loader"]) or args["loader"]
            known = host.elements_module().list_model_elements()
            unknown = [name for name in args if str(name).replace("-", "_") not in known]
            if unknown:
                host.say(f"a load over the API: options that are unknown: {', '.join(unknown)}")
        options = host.module("modules.shared").args
        before = dict(vars(options))
        try:
            return load(data)
        except Exception as error:
            loading.release_unclaimed()
            named = load_errors.named(str(data.get("model_name")), options.loader, error)
            if options.loader in LOADERS and not isinstance(named, ExlLoaderError):
                named = ExlLoaderError(problems.problem(named).message)
            # Up to v4.3 the next load would have what this one was refused for.
            vars(options).update(before)
            if named is error:
                raise
            raise named from error

    def get_current_model_info() -> dict[str, Any]:
        warnings = loading.warnings()
        return info() | ({"warnings": warnings} if warnings else {})

    patches.set(module, "_load_model", load_model)
    patches.set(module, "get_current_model_info", get_current_model_info)


def _with_reason(original: Callable[..., Exception]) -> Callable[..., Exception]:
    """Add the reason to what a route answers because of an exception."""

    def http_exception(status_code: int, detail: Any = None, **options: Any) -> Exception:
        error = sys.exc_info()[1]
        ours = isinstance(error, ExlLoaderError) or (
            error is not None and host.module("modules.shared").args.loader in LOADERS)
        if ours and isinstance(detail, str) and str(error):
            detail = f"{detail.rstrip('.')}: {problems.problem(error).message}"
            # What was asked for, and not what the folder holds.
            if isinstance(error, (InvalidSettings, ModelNotFound)):
                status_code = 400
        return original(status_code=status_code, detail=detail, **options)

    return http_exception


def _raising(function: Callable[..., Any], errors: Any) -> Callable[..., Any]:
    """Raise the web UI's own error where a generation inside a function failed."""

    @functools.wraps(function)
    def raising(*args: Any, **kwargs: Any) -> Any:
        _forget()
        with _translated(errors):
            result = function(*args, **kwargs)
        found = problems.take()
        if found is not None:
            raise _openai_error(found, errors)
        _correct_endings(result, problems.take_endings())
        return result

    return raising


def _ending_in_error(
    function: Callable[..., Iterator[Any]], errors: Any
) -> Callable[..., Iterator[Any]]:
    """Let a stream whose generation failed end with the error."""

    @functools.wraps(function)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        chunks = function(*args, **kwargs)
        endings: list[str | None] = []
        try:
            while True:
                # Each chunk may be fetched in another thread; what one call of `next` reports,
                # it reports in its own.
                _forget()
                try:
                    with _translated(errors):
                        chunk = next(chunks, None)
                    found = problems.take()
                except errors.OpenAIError as error:
                    found = Problem(error.message, error.code, getattr(error, "param", None))
                if found is not None:
                    yield {"choices": [], "error": found.to_dict()}
                    return
                if chunk is None:
                    return
                endings += problems.take_endings()
                _correct_endings(chunk, endings)
                yield chunk
        finally:
            chunks.close()  # type: ignore[attr-defined]

    return stream


def _forget() -> None:
    """Drop what an earlier request left in this thread."""
    problems.take()
    problems.take_endings()


def _correct_endings(answer: Any, endings: list[str | None]) -> None:
    """Put our reasons in the place of those that the web UI took from token counts."""
    choices = answer.get("choices", []) if isinstance(answer, dict) else []
    if len(choices) == len(endings):
        for choice, reason in zip(choices, endings, strict=True):
            if reason in _FINISH_REASONS and choice.get("finish_reason") in ("stop", "length"):
                choice["finish_reason"] = _FINISH_REASONS[reason]


def _raising_chunk(function: Callable[..., Any], errors: Any) -> Callable[..., Any]:
    """Have the Anthropic route, which knows how to end in an error, find it in a chunk."""

    @functools.wraps(function)
    def process_chunk(self: Any, chunk: dict[str, Any]) -> Any:
        if "error" in chunk:
            found = chunk["error"]
            status = 400 if found["type"] == "invalid_request_error" else 500
            raise errors.OpenAIError(found["message"], code=status)
        return function(self, chunk)

    return process_chunk


class _translated:
    """Turn errors of our models inside a `with` block into the web UI's own.

    Args:
        errors: the web UI's module of them.
    """

    def __init__(self, errors: Any) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, self._errors.OpenAIError):
            return
        if isinstance(error, ExlLoaderError) or (loading.current() is not None and str(error)):
            raise _openai_error(problems.problem(error), self._errors) from error


def _openai_error(found: Problem, errors: Any) -> Exception:
    if found.status == 400:
        return errors.InvalidRequestError(found.message, param=found.param)
    return errors.OpenAIError(found.message, code=found.status)


def _errors_of(module: ModuleType) -> Any:
    """The module of the API's errors, which lies beside its others."""
    return host.module(module.__name__.rpartition(".")[0] + ".errors")


def _response(found: Problem) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(status_code=found.status, content={"error": found.to_dict()})
