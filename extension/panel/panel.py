"""What the loader's panel does, apart from any page: toggles, choices, the plan behind the gauge.

The host's model tab and the standalone page call the same functions, so that both show and load
the same. Nothing here reads a weight or imports PyTorch.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from exl_loader.cache.layout import PAGE_LEN
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.checkpoint.rope import check_scaling
from exl_loader.memory.reservation import Reservation, plan
from exl_loader.memory.reservation.length import stretched_length
from exl_loader.utils.errors import ExlLoaderError, known_line
from exl_loader.utils.setting_values import invalid, is_finite, plain

from .gauge import gauge_html, message_html, problem_html

DEFAULT_CACHE_TYPE = "fp16"
CACHE_TYPES = ("fp16", "q8", "q6", "q4")

# The cache type that each toggle stands for.
TOGGLE_TYPES = {"cache_8bit": "q8", "cache_4bit": "q4"}

# What the web UI's other loaders call what this engine calls q8 and q4.
CACHE_TYPE_ALIASES = {"q8_0": "q8", "q4_0": "q4", "fp8": "q8"}


class Toggles(NamedTuple):
    """The toggles and the cache type, in step with each other."""

    cache_8bit: bool
    cache_4bit: bool
    cache_type: str


def toggles_for(cache_type: str) -> Toggles:
    """Set the toggles as a cache type asks for: neither for what they do not stand for."""
    return Toggles(cache_type == "q8", cache_type == "q4", cache_type)


def plain_cache_type(name: str) -> str:
    """Return this engine's name of a cache type of the web UI."""
    plain = name.strip().lower()
    return CACHE_TYPE_ALIASES.get(plain, plain)


def resolve_cache_type(
    cache_type: str | None, cache_8bit: bool = False, cache_4bit: bool = False
) -> str:
    """Decide the cache type of a load from values that may not be in step.

    Settings saved by older versions have only toggles, and the API and the command line may
    set any of the three. A cache type other than the default was chosen on purpose and wins;
    of two toggles the 8-bit one does, as it did in the web UI when it had them.
    """
    chosen = plain_cache_type(str(cache_type or DEFAULT_CACHE_TYPE))
    if chosen != DEFAULT_CACHE_TYPE:
        return chosen
    if cache_8bit:
        return "q8"
    return "q4" if cache_4bit else DEFAULT_CACHE_TYPE


@dataclass(frozen=True)
class LoadOptions:
    """What a person can set before loading.

    Args:
        model_dir: the folder. ctx_size: tokens, or `auto`; 0 leaves it to the plan.
        cache_type, gpu_split, alpha_value, compress_pos_emb, model_draft, ctx_size_draft: see
            `exl_loader.plan`.
        draft_max: see `exl_loader.load`; 0 leaves it to that.
    """

    model_dir: str
    ctx_size: Any = 0
    cache_type: str = DEFAULT_CACHE_TYPE
    alpha_value: Any = 1.0
    compress_pos_emb: Any = 1.0
    gpu_split: str = ""
    model_draft: str = ""
    ctx_size_draft: Any = 0
    draft_max: Any = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> LoadOptions:
        """Read a page's components, a host's state or its saved settings.

        Empty fields are None, numbers may be floats or text, and other names are ignored.
        What is no number stays as it is, for `plan` and `load` to refuse in their own words.

        Raises:
            InvalidSettings: a toggle is neither on nor off, or a value is a list or an object.
        """
        values = {name: _single(name, values.get(name)) for name in _NAMES}
        toggles = {name: _flag(name, values.get(name)) for name in TOGGLE_TYPES}
        cache_type = resolve_cache_type(values.get("cache_type"), **toggles)
        draft = os.path.expanduser(str(values.get("model_draft") or "").strip())
        return cls(
            # No shell has seen a page's field, so a tilde is still one.
            model_dir=os.path.expanduser(str(values.get("model_dir") or "").strip()),
            ctx_size=_whole(values.get("ctx_size")),
            cache_type=cache_type,
            alpha_value=_number(values.get("alpha_value"), 1.0),
            compress_pos_emb=_number(values.get("compress_pos_emb"), 1.0),
            gpu_split=str(values.get("gpu_split") or "").strip(),
            model_draft=draft,
            # Without a draft model they change nothing, whatever their fields hold.
            ctx_size_draft=_whole(values.get("ctx_size_draft")) if draft else 0,
            draft_max=_whole(values.get("draft_max")) if draft else 0,
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `exl_loader.plan`."""
        arguments: dict[str, Any] = {
            "ctx_size": self.ctx_size or None,
            "cache_type": self.cache_type,
            "alpha_value": self.alpha_value,
            "compress_pos_emb": self.compress_pos_emb,
            "gpu_split": self.gpu_split or None,
        }
        if self.model_draft:
            arguments |= {"model_draft": self.model_draft, "ctx_size_draft": self.ctx_size_draft}
        return arguments

    def load_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `exl_loader.load`."""
        return self.arguments() | ({"draft_max": self.draft_max} if self.draft_max else {})


# What a page, a host or saved settings may set.
_NAMES = (*(field.name for field in fields(LoadOptions)), *TOGGLE_TYPES)


def _single(name: str, value: Any) -> str | int | float | None:
    """Return a value that a form or JSON can hold in one field.

    Raises:
        InvalidSettings: it is something else, or a number that no float can hold.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else plain(value)
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int) and is_finite(value):
        return value
    raise invalid(name, "one number or text", value)


def _number(value: Any, default: float) -> Any:
    """Read a number, `default` for an empty field; anything else stays as it is."""
    if value is None or value == "":
        return default
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _whole(value: Any) -> Any:
    """Read a whole number, 0 for an empty field; anything else stays as it is."""
    number = _number(value, 0)
    if isinstance(number, (int, float)) and not isinstance(number, bool) and number % 1 == 0:
        return int(number)
    return value


def _flag(name: str, value: Any) -> bool:
    """Read a toggle, off for an empty field.

    Raises:
        InvalidSettings: it is neither on nor off.
    """
    words = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    found = words.get(str("false" if value is None or value == "" else value).strip().lower())
    if found is None:
        raise invalid(name, "true or false", value)
    return found


def reserve(options: LoadOptions) -> Reservation:
    """Plan a load that takes the place of the model in memory, if there is one.

    Reads headers, never a weight; raises what `exl_loader.plan` does.
    """
    return plan(options.model_dir, replacing=True, **options.arguments())


def plan_html(options: LoadOptions, *, unfolded: bool = False) -> str:
    """Draw the gauge for a model that is not loaded, or say in a line why there is none.

    Args:
        unfolded: see `gauge_html`.
    """
    if not options.model_dir:
        return message_html("No model", "Choose a model folder.", good=False)
    try:
        return gauge_html(reserve(options), unfolded=unfolded)
    except (ExlLoaderError, OSError) as error:
        # A folder may vanish, or lose its permissions, between two looks at it.
        return error_html(error)


def reachable_length(options: LoadOptions) -> int:
    """Return the model's own length in tokens, as far as the RoPE settings stretch it.

    Raises:
        ExlLoaderError: config.json cannot be read, or a RoPE setting makes no sense.
    """
    check_scaling(options.alpha_value, options.compress_pos_emb)
    config = ModelConfig.from_dir(Path(options.model_dir))
    return stretched_length(config, options.alpha_value, options.compress_pos_emb)


def slider_end(options: LoadOptions) -> int | None:
    """Return where a slider of the context ends: at the reachable length, or after one page.

    None where the folder does not say how long its model is.
    """
    try:
        return max(PAGE_LEN, reachable_length(options))
    except (ExlLoaderError, OSError):
        return None


def warnings_html(warnings: Sequence[str]) -> str:
    """Show what was said of a model while it was loaded, a line each."""
    lines = (warning[:1].upper() + warning[1:] for warning in warnings)
    return "".join(message_html("Warning", line, good=False) for line in lines)


def error_html(error: BaseException, *, heading: str = "Cannot be loaded") -> str:
    """Show any error as one line; one that nobody expected folds where it came from."""
    if isinstance(error, ExlLoaderError):
        return problem_html(error, heading=heading)
    line = known_line(error)
    if line is not None:
        return problem_html(line, heading=heading)
    unexpected = ExlLoaderError(
        f"Unexpected {type(error).__name__}: {error}",
        remedy="The details say where; please report them",
        details="".join(traceback.format_exception(error)),
    )
    return problem_html(unexpected, heading=heading)
