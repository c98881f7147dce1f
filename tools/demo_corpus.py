"""The demo model's training text: CPython's standard library sources as installed.

The files, their order and the held-out share depend only on the installed Python, so that a
perplexity measured later (after quantising, on another day) is measured on the same text.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests, generated tables, vendored code and the interpreter's own build: text whose shape is
# not that of a hand-written module and which would drown the rest.
_SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "_bundled",
        "encodings",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_SKIPPED_FILES = frozenset({"msilib/schema.py", "msilib/sequence.py", "html/entities.py"})

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path below the standard library, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out files, each in the order of their names' hashes."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def _is_wanted(relative: Path) -> bool:
    if relative.as_posix() in _SKIPPED_FILES:
        return False
    return not any(
        part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts
    )


def _hash_of_name(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def collect(root: Path | None = None) -> Corpus:
    """Read the standard library and split it by a hash of each file's name.

    Args:
        root: folder to read; the running interpreter's standard library if None.

    Returns:
        The corpus. Files that are empty or not UTF-8 are left out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    relatives = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted((p.as_posix() for p in relatives if _is_wanted(p)), key=_hash_of_name)
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        is_held_out = _hash_of_name("held out/" + name) < HELD_OUT_SHARE * 2**64
        (held_out if is_held_out else train).append(SourceFile(name, text))
    return Corpus(tuple(train), tuple(held_out))
