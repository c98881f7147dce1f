"""Extends the web UI's API: errors with their reason, log probabilities, biases, loader names.

Without this the web UI logs what ended a load or a generation, and tells the client only `Failed
to load the model.`, or sends an empty text. With it the client gets the reason: `{"detail": ...}`
for a load and `{"error": {"message": ...}}` for a request, the form of the web UI's own errors. A
stream has already begun when its generation fails, so its last chunk before `[DONE]` is the
error, as in OpenAI's API.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from exl_loader import ExlLoaderError, InvalidSettings, ModelNotFound

from ..patching import Patches
from . import contract, loading, patching, problems
from .contract import LOADERS, say
from .problems import Problem

_ANSWERS = ("completions", "chat_completions")
# Why our generations end -> the API's `finish_reason`; others stay as the web UI has them.
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "loop": "stop", "length": "length",
                   "context": "length"}
_STREAMS = ("stream_completions", "stream_chat_completions")

# The loaders that the API asks for log probabilities and passes biases to.
_NATIVE_GATE = ("llama.cpp", "ExLlamav3")


def extend_script(patches: Patches, module: ModuleType) -> None:
    """Answer failed loads with their reason, and refused requests with a status.

    Args:
        module: `modules.api.script`, or `extensions.openai.script` up to v4.1, before it serves.
    """
    patches.set(module, "HTTPException", _with_reason(module.HTTPException))
    errors = _errors_of(module)
    handlers = {
        ExlLoaderError: lambda request, error: _response(problems.problem(error)),
        # v4.0 raises this error and has no handler for it.
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
    """Answer a failed generation with its reason, and offer log probabilities and biases.

    Since v4.1 the API asks for these two by the loader's name.

    Args:
        module: `modules.api.completions`, or `extensions.openai.completions` up to v4.1.
    """
    patching.extend_constant(patches, module, _NATIVE_GATE, (*_NATIVE_GATE, LOADERS[0]))
    errors = _errors_of(module)
    for name in _ANSWERS:
        patches.set(module, name, _raising(getattr(module, name), errors))
    for name in _STREAMS:
        patches.set(module, name, _ending_in_error(getattr(module, name), errors))


def extend_models(patches: Patches, module: ModuleType) -> None:
    """Accept spellings of a loader as the command line does, and return a model's warnings.

    Args:
        module: `modules.api.models`, or `extensions.openai.models` up to v4.1.
    """
    load, info = module._load_model, module.get_current_model_info

    def load_model(data: dict[str, Any]) -> Any:
        args = data.get("args")
        if isinstance(args, dict):
            if isinstance(args.get("loader"), str):
                args["loader"] = contract.loader_name(args["loader"]) or args["loader"]
            known = contract.elements_module().list_model_elements()
            unknown = [name for name in args if str(name).replace("-", "_") not in known]
            if unknown:
                say(f"load over the API: unknown options were ignored: {', '.join(unknown)}")
        options = contract.module("modules.shared").args
        before = dict(vars(options))
        try:
            return load(data)
        except Exception as error:
            loading.release_unclaimed()
            named = problems.named_load_error(str(data.get("model_name")), options.loader, error)
            if options.loader in LOADERS and not isinstance(named, ExlLoaderError):
                named = ExlLoaderError(problems.problem(named).message)
            # Up to v4.3 the next load would get the options that this one was refused for.
            vars(options).update(before)
            if named is error:
                raise
            raise named from error

    def get_current_model_info() -> dict[str, Any]:
        warnings = loading.warnings()
        return info() | ({"warnings": warnings} if warnings else {})

    patches.set(module, "_load_model", load_model)
    patches.set(module, "get_current_model_info", get_current_model_info)


def keep_logprobs(patches: Patches, module: ModuleType) -> None:
    """Let log probabilities survive the copy that the web UI makes of a request (v4.0).

    Args:
        module: `modules.transformers_loader`.
    """
    processor = module.LogprobProcessor
    patches.set(processor, "__deepcopy__", lambda self, memo: self)


def _with_reason(original: Callable[..., Exception]) -> Callable[..., Exception]:
    """Add the reason to what a route answers after an exception."""

    def http_exception(status_code: int, detail: Any = None, **options: Any) -> Exception:
        error = sys.exc_info()[1]
        ours = isinstance(error, ExlLoaderError) or (
            error is not None and contract.module("modules.shared").args.loader in LOADERS)
        if ours and isinstance(detail, str) and str(error):
            detail = f"{detail.rstrip('.')}: {problems.problem(error).message}"
            # The request is wrong, not the folder.
            if isinstance(error, (InvalidSettings, ModelNotFound)):
                status_code = 400
        return original(status_code=status_code, detail=detail, **options)

    return http_exception


def _raising(function: Callable[..., Any], errors: Any) -> Callable[..., Any]:
    """Raise the web UI's own error if a generation inside a function failed."""

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
    """End a stream with the error if its generation failed."""

    @functools.wraps(function)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        chunks = function(*args, **kwargs)
        endings: list[str | None] = []
        try:
            while True:
                # Each chunk may be fetched in another thread, so an error is reported in the
                # thread that called `next`.
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
    """Drop what an earlier request has left in this thread."""
    problems.take()
    problems.take_endings()


def _correct_endings(answer: Any, endings: list[str | None]) -> None:
    """Replace the reasons that the web UI guessed from token counts with ours."""
    choices = answer.get("choices", []) if isinstance(answer, dict) else []
    if len(choices) == len(endings):
        for choice, reason in zip(choices, endings, strict=True):
            if reason in _FINISH_REASONS and choice.get("finish_reason") in ("stop", "length"):
                choice["finish_reason"] = _FINISH_REASONS[reason]


def _raising_chunk(function: Callable[..., Any], errors: Any) -> Callable[..., Any]:
    """Raise the error of a chunk in the Anthropic route, which can end a stream with it."""

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
        errors: the web UI's module of errors.
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
    """Return the module of the API's errors, which is in the package of the given one."""
    return contract.module(module.__name__.rpartition(".")[0] + ".errors")


def _response(found: Problem) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(status_code=found.status, content={"error": found.to_dict()})
