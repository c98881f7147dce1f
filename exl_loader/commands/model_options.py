"""Arguments that several subcommands share: the model, the options of loading, the sampling."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..generation.settings import SamplingSettings
from ..memory.reservation.options import LoadOptions
from ..utils import untrusted_files
from ..utils.errors import InvalidSettings
from ..utils.json_keys import InvalidJson, parse_json
from ..utils.progress import Progress
from ..utils.untrusted_files import TEXT_BYTES

if TYPE_CHECKING:
    from ..engine import LoadedModel

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"

# Some editors write a byte order mark at the start of a file. It is no part of the text.
UTF8 = "utf-8-sig"

# The defaults of `SamplingSettings`, which are the web UI's, keep every token. In a terminal
# the likelier tokens give better text.
TERMINAL_DEFAULTS = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add the model folder."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default=str(DEMO_MODEL), type=folder,
        help="model folder; without one the small model that comes with exl_loader",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model folder and all options of `load`."""
    add_model_argument(parser)
    add_options(parser, LoadOptions.names("load"))


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add options of `LoadOptions` as flags, such as `--ctx-size` for `ctx_size`."""
    for name in names:
        option = LoadOptions.OPTIONS[name]
        default = "" if option.default is None else f" (default {option.default})"
        parser.add_argument(
            "--" + name.replace("_", "-"), metavar=option.metavar, default=option.default,
            type=_READERS.get(name) or _NUMBERS.get(type(option.default), str),
            help=option.help + default,
        )


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that `add_options` added, as keywords of `plan` or `load`."""
    return {name: value for name, value in vars(args).items() if name in LoadOptions.OPTIONS}


def refuse_machines(address: str | None, what: str, remedy: str) -> None:
    """Refuse several machines where a model has to be on one.

    Args:
        address: the option.
        what: needs the model there.
        remedy: what the user can do instead.

    Raises:
        InvalidSettings: there is an address.
    """
    if address:
        raise InvalidSettings(
            "--machines", expected=f"nothing, because {what} needs a model on one machine",
            actual=address, remedy=remedy,
        )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sampling options."""
    defaults = SamplingSettings(**TERMINAL_DEFAULTS)  # type: ignore[arg-type]
    options: tuple[tuple[str, type, str], ...] = (
        ("max_new_tokens", int, "most tokens to write"),
        ("temperature", float, "0 always chooses the likeliest token"),
        ("top_k", int, "keep the k likeliest tokens; 0 keeps all"),
        ("top_p", float, "keep the likeliest tokens up to this probability"),
        ("min_p", float, "keep tokens with this share of the largest probability or more"),
        ("repetition_penalty", float, "above 1 makes tokens that occurred before less likely"),
        ("repetition_penalty_range", int, "tokens that the penalty looks back; 0 is all"),
        ("seed", int, "the same seed gives the same text; -1 for a random seed"),
    )
    for name, kind, meaning in options:
        default = getattr(defaults, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, default=default, metavar="N",
            help=f"{meaning} (default {default})",
        )
    parser.add_argument(
        "--ban-eos-token", action="store_true", help="continue where the model would end the text"
    )
    parser.add_argument(
        "--stop", dest="stop_strings", action="append", default=[], metavar="TEXT",
        help="end before this text; may be repeated",
    )
    parser.add_argument(
        "--set", dest="further_settings", action="append", default=[], type=_setting,
        metavar="NAME=VALUE",
        help="any other setting of SamplingSettings, such as skew=0.5; may be repeated",
    )


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """Return the settings that the arguments ask for.

    Raises:
        InvalidSettings: a value makes no sense.
    """
    names = {field.name for field in fields(SamplingSettings)}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    return SamplingSettings.from_dict(chosen | dict(args.further_settings))


def _setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE. The value of a setting that is no text may be JSON, such as a list."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    texts = {field.name for field in fields(SamplingSettings) if field.type == "str"}
    if name not in texts:
        try:
            return name, parse_json(value)
        except InvalidJson:
            pass
    return name, value


def open_model(args: argparse.Namespace, progress: Progress) -> LoadedModel:
    """Load the model that the arguments name."""
    from ..loader import load

    return load(args.model, progress=progress, **chosen_options(args))


def read_text(path: str, what: str) -> str:
    """Read a UTF-8 text file, or stdin for `-`.

    Args:
        path: as the user typed it.
        what: the option, for errors.

    Raises:
        InvalidSettings: it cannot be read, is no regular file, or is larger than 64 MiB.
    """
    if path != "-":
        return untrusted_files.read_text(
            os.path.expanduser(path), TEXT_BYTES, error=InvalidSettings, missing=InvalidSettings,
            remedy=f"Give {what} a UTF-8 text file, or - to read a pipe",
        )
    try:
        use_utf8(sys.stdin)
        text = sys.stdin.read(TEXT_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidSettings(what, expected="UTF-8 text on standard input",
                              actual=found) from None
    if len(text) > TEXT_BYTES:
        raise InvalidSettings(what, expected=f"at most {TEXT_BYTES} characters on standard input",
                              actual="more")
    return text


def use_utf8(stream: TextIO) -> None:
    """Have a standard stream read as UTF-8, with an error for any other bytes.

    Otherwise its encoding follows the locale, and without a locale any bytes are accepted.
    """
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding=UTF8)


def folder(text: str) -> str:
    """Read a folder's name. The shell leaves the tilde of `--option=~/name` to us."""
    return os.path.expanduser(text)


def ctx_size(text: str) -> int | str:
    """Read a number of tokens, or `auto`. `plan` checks the number."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens such as 32768, or auto, found {text!r}"
        ) from None


# How the command line reads an option's text; by the type of its default where not listed.
_READERS: dict[str, Callable[[str], Any]] = {
    "ctx_size": ctx_size, "model_draft": folder, "max_batch_size": int,
}
_NUMBERS: dict[type, Callable[[str], Any]] = {int: int, float: float}
