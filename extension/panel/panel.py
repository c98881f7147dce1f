"""The rules of the loader's panel: toggles, chosen options, and the plan that the gauge shows.

The Model tab of the web UI and the standalone page call the same functions, so that both show
and load the same. No weight is read here and PyTorch is not imported.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from exl_loader import ExlLoaderError, LoadOptions, Reservation, plan
from exl_loader.checkpoint.model_class import has_unknown_class
from exl_loader.utils.errors import known_line
from exl_loader.utils.setting_values import invalid, is_finite, plain

from .gauge import PAGE_LEN, gauge_html, message_html, problem_html

DEFAULT_CACHE_TYPE: str = LoadOptions.OPTIONS["cache_type"].default
CACHE_TYPES = LoadOptions.OPTIONS["cache_type"].choices

# The cache type of each toggle.
TOGGLE_TYPES = {"cache_8bit": "q8", "cache_4bit": "q4"}

# The toggle of `as_architecture`, and the architecture that it stands for.
AS_LLAMA, LLAMA = "as_llama", "LlamaForCausalLM"

# Names of the web UI's other loaders -> the names of this engine.
CACHE_TYPE_ALIASES = {"q8_0": "q8", "q4_0": "q4", "fp8": "q8"}


class Toggles(NamedTuple):
    """The toggles, and the cache type that they agree with."""

    cache_8bit: bool
    cache_4bit: bool
    cache_type: str


def toggles_for(cache_type: str) -> Toggles:
    """Return the toggles for a cache type: both off for a type without a toggle."""
    return Toggles(cache_type == "q8", cache_type == "q4", cache_type)


def plain_cache_type(name: str) -> str:
    """Return this engine's name of a cache type of the web UI."""
    plain = name.strip().lower()
    return CACHE_TYPE_ALIASES.get(plain, plain)


def resolve_cache_type(
    cache_type: str | None, cache_8bit: bool = False, cache_4bit: bool = False
) -> str:
    """Decide the cache type of a load from values that may contradict each other.

    Settings that older versions saved have toggles alone, and the API and the command line may
    set any of the three. A cache type other than the default wins, because the user chose it. Of
    two toggles the 8-bit one wins, as it did in the web UI when it had them.
    """
    chosen = plain_cache_type(str(cache_type or DEFAULT_CACHE_TYPE))
    if chosen != DEFAULT_CACHE_TYPE:
        return chosen
    if cache_8bit:
        return "q8"
    return "q4" if cache_4bit else DEFAULT_CACHE_TYPE


def field_arguments(name: str, label: str = "") -> dict[str, Any]:
    """Return label, help and, for a number, the step of a page's field for an option.

    Args:
        name: of the option.
        label: a name for people, after whose help the option's own name is written; empty to
            show the option's own name, as the web UI does.
    """
    option = LoadOptions.OPTIONS[name]
    info = option.help[:1].upper() + option.help[1:]
    arguments: dict[str, Any] = {"label": name, "info": info}
    if label:
        arguments = named(label, name, info)
    return arguments if option.step is None else arguments | {"step": option.step}


def named(label: str, name: str, info: str = "") -> dict[str, Any]:
    """Return label and help of a field that has a name for people, and one in the engine."""
    return {"label": label, "info": f"{info} ({name})" if info else name}


def as_llama_arguments(label: str = "") -> dict[str, Any]:
    """Return label and help of a page's checkbox for running an unknown architecture as Llama.

    Args:
        label: as that of `field_arguments`.
    """
    info = "Run an unknown architecture as Llama; its output may be wrong"
    return named(label, AS_LLAMA, info) if label else {"label": AS_LLAMA, "info": info}


# The options that a page, a host or saved settings may set.
PANEL_OPTIONS = (
    "ctx_size", "cache_size", "cache_type", "gpu_split", "chunk_size", "embedding_device",
    "alpha_value", "compress_pos_emb", "as_architecture", "model_draft", "ctx_size_draft",
    "draft_max", "machines",
)

_NAMES = ("model_dir", *PANEL_OPTIONS, *TOGGLE_TYPES, AS_LLAMA)


@dataclass(frozen=True)
class ModelChoice(LoadOptions):
    """A model folder, and the options that a person has chosen for loading it.

    Args:
        model_dir: the folder; empty where none is chosen.
    """

    model_dir: str = ""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ModelChoice:
        """Read the fields of a page, a host's state or saved settings.

        Empty fields are None, numbers may be floats or text, and other names are ignored. What
        is no number stays as it is, so that `plan` and `load` refuse it by name.

        Raises:
            InvalidSettings: a toggle is neither on nor off, or a value is a list or an object.
        """
        values = {name: _single(name, values.get(name)) for name in _NAMES}
        toggles = {name: _flag(name, values.get(name)) for name in TOGGLE_TYPES}
        as_llama = _flag(AS_LLAMA, values.get(AS_LLAMA))
        read = {name: _option(name, values.get(name)) for name in PANEL_OPTIONS}
        if as_llama and read["as_architecture"] is None:
            read["as_architecture"] = LLAMA
        read["cache_type"] = resolve_cache_type(values.get("cache_type"), **toggles)
        if read["model_draft"]:
            read["model_draft"] = os.path.expanduser(read["model_draft"])
        else:
            # Without a draft model its options change nothing, whatever their fields hold.
            for name in ("ctx_size_draft", "draft_max"):
                read[name] = cls.OPTIONS[name].default
        # No shell has expanded the tilde of a page's field.
        folder = os.path.expanduser(str(values.get("model_dir") or "").strip())
        return cls(folder, **read)


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


def _option(name: str, value: Any) -> Any:
    """Read an option by the type of its default, which an empty field or 0 means."""
    default = LoadOptions.OPTIONS[name].default
    if isinstance(default, float):
        return _number(value, default)
    if isinstance(default, int) or name == "ctx_size":
        return _whole(value) or default
    return str(value or "").strip() or default


def _number(value: Any, default: float) -> Any:
    """Read a number, `default` for an empty field. Anything else stays as it is."""
    if value is None or value == "":
        return default
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _whole(value: Any) -> Any:
    """Read a whole number, 0 for an empty field. Anything else stays as it is."""
    number = _number(value, 0)
    if isinstance(number, (int, float)) and not isinstance(number, bool) and number % 1 == 0:
        return int(number)
    return value


def _flag(name: str, value: Any) -> bool:
    """Read a toggle, off for an empty field.

    Raises:
        InvalidSettings: it is neither on nor off.
    """
    values = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    found = values.get(str("false" if value is None or value == "" else value).strip().lower())
    if found is None:
        raise invalid(name, "true or false", value)
    return found


def reserve(choice: ModelChoice) -> Reservation:
    """Plan a load in place of the model that is loaded now, if there is one.

    No weight is read. Raises what `exl_loader.plan` raises.
    """
    return plan(choice.model_dir, replacing=True, **choice.for_plan())


def plan_html(choice: ModelChoice) -> str:
    """Draw the gauge for a model that is not loaded, or a line that explains why it has none."""
    if not choice.model_dir:
        return message_html("No model", "Choose a model folder.", good=False)
    try:
        return gauge_html(reserve(choice))
    except (ExlLoaderError, OSError) as error:
        # The folder may vanish, or lose its permissions, while it is read.
        return error_html(error)


def offers_llama(choice: ModelChoice) -> bool:
    """Return whether a page shows the toggle that runs an unknown architecture as Llama.

    It does where the folder's architecture is unknown, and where the toggle is on, so that it
    can be switched off.
    """
    is_on = choice.as_architecture is not None
    return is_on or bool(choice.model_dir) and has_unknown_class(choice.model_dir)


def slider_end(choice: ModelChoice) -> int | None:
    """Return the end of a slider of the context: the stretched length, but at least one page.

    None where the folder has no length of its model.
    """
    try:
        return max(PAGE_LEN, choice.stretched_length(choice.model_dir))
    except (ExlLoaderError, OSError):
        return None


def warnings_html(warnings: Sequence[str]) -> str:
    """Show the warnings of a load, a line each."""
    lines = (warning[:1].upper() + warning[1:] for warning in warnings)
    return "".join(message_html("Warning", line, good=False) for line in lines)


def error_html(error: BaseException, *, heading: str = "Cannot be loaded") -> str:
    """Show any error as one line. The traceback of an unexpected error is folded below it."""
    if isinstance(error, ExlLoaderError):
        return problem_html(error, heading=heading)
    line = known_line(error)
    if line is not None:
        return problem_html(line, heading=heading)
    unexpected = ExlLoaderError(
        f"Unexpected {type(error).__name__}: {error}",
        remedy="The details have the traceback; please report them",
        details="".join(traceback.format_exception(error)),
    )
    return problem_html(unexpected, heading=heading)
