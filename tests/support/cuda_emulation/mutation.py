"""Builds kernels with one wrong expression, which the comparisons of a test must notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from .launcher import FOLDER, REPO, EmulatedLauncher, emulation_spec


def built_from(folder: Path, names: Sequence[str],
               change: tuple[str, str, str] | None = None) -> EmulatedLauncher:
    """Build kernels from a copy of the sources.

    Args:
        folder: of the copy.
        names: of the sources in csrc/cuda.
        change: (file under csrc/cuda, text that is in it exactly once, its replacement).
    """
    for name in ("csrc", FOLDER):
        shutil.copytree(REPO / name, folder / name, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__", "cpu"))
    if change is not None:
        file, old, new = change
        path = folder / "csrc" / "cuda" / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new))
    sources = [folder / "csrc" / "cuda" / f"{name}.cu" for name in names]
    return EmulatedLauncher(emulation_spec(sources, root=folder))


def assert_noticed(launcher: EmulatedLauncher, is_changed: bool,
                   check: Callable[[EmulatedLauncher], None]) -> None:
    """Run a check in three orders of lanes and blocks. It must fail if a kernel was changed."""

    def run() -> None:
        for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 5)):
            launcher.set_order(order, seed)
            check(launcher)

    if not is_changed:
        run()
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 - a comparison, or the emulation's own
        run()
