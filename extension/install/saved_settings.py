"""The web UI's saved model settings that name our loaders."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

from exl_loader import ExlLoaderError
from exl_loader.utils.untrusted_files import SETTINGS_BYTES, is_there, read_text

CONFIG = "config-user.yaml"
BACKUP = "config-user.before-exl_loader.yaml"

# The plugin's flags; without the plugin the web UI does not start with any of them.
FLAGS = ("--cache-8bit", "--cache-4bit", "--alpha-value", "--compress-pos-emb", "--as-llama",
         "--cache-size", "--chunk-size", "--embedding-device", "--machines")

# After a key of more than 128 characters YAML writes a colon and the value on the next line.
_OURS = re.compile(r"^:?\s+loader:\s*['\"]?ExLlamav2(_HF)?['\"]?\s*(#.*)?$")


def config_files(root: Path) -> list[Path]:
    """Return the files with saved model settings that a web UI may read."""
    folders = [root / "user_data" / "models", root / "models"]
    for flags in _flag_files(root):
        folders += _model_dirs(flags, root)
    return [path for folder in dict.fromkeys(folders) if is_there(path := folder / CONFIG)]


def named_flags(root: Path) -> dict[Path, list[str]]:
    """Return the plugin's flags in the files from which the web UI reads its options."""
    found = {path: [argument for argument in _arguments(path)
                    if argument.split("=", 1)[0].replace("_", "-") in FLAGS]
             for path in _flag_files(root)}
    return {path: flags for path, flags in found.items() if flags}


def entries(path: Path) -> list[str]:
    """Return the models whose saved settings name our loaders."""
    blocks = _blocks(_read(path))
    return [b[0].removeprefix("? ").rstrip().rstrip(":") for b in blocks
            if any(_OURS.match(x) for x in b[1:])]


def remove_entries(path: Path) -> list[str]:
    """Remove the loader from saved settings that name ours; keep a copy of the previous file.

    Without the plugin such a line makes the web UI fail at start-up and at its Load button.
    All other lines stay as they are. A model without any setting left is removed, because the
    web UI fails on an empty entry.

    Returns:
        the models whose settings were changed.
    """
    text = _read(path)
    found = entries(path)
    if not found:
        return []
    path.with_name(BACKUP).write_text(text, encoding="utf-8")
    kept = []
    for block in _blocks(text):
        lines = _without_loader(block)
        emptied = len(lines) < len(block) and not any(x.strip() for x in lines[1:])
        kept += [] if emptied else lines
    temporary = path.with_name(f"{CONFIG}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return found


def _read(path: Path) -> str:
    return read_text(path, SETTINGS_BYTES, remedy="Move it out of the way")


def _without_loader(block: list[str]) -> list[str]:
    index = next((i for i, line in enumerate(block) if _OURS.match(line)), len(block))
    kept = [line for line in block if not _OURS.match(line)]
    if index < len(kept) and block[index].startswith(":"):
        # The next setting becomes the first one, after the colon.
        kept[index] = ":" + kept[index][1:]
    return kept


def _blocks(text: str) -> list[list[str]]:
    """Split YAML as the web UI writes it at its top-level keys."""
    blocks: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        if not blocks or not (line[0].isspace() or line.startswith(": ")):
            blocks.append([])
        blocks[-1].append(line)
    return blocks


def _flag_files(root: Path) -> tuple[Path, ...]:
    return root / "user_data" / "CMD_FLAGS.txt", root / "CMD_FLAGS.txt"


def _arguments(flags: Path) -> list[str]:
    """Return the arguments in a file of options; none if it cannot be read."""
    try:
        lines = _read(flags).splitlines()
        return [argument for line in lines if not line.lstrip().startswith("#")
                for argument in shlex.split(line)]
    except (ExlLoaderError, ValueError):
        return []


def _model_dirs(flags: Path, root: Path) -> list[Path]:
    arguments = _arguments(flags)
    found = [value for name, value in pairwise(arguments) if name == "--model-dir"]
    found += [text.split("=", 1)[1] for text in arguments if text.startswith("--model-dir=")]
    return [root / folder for folder in found]
