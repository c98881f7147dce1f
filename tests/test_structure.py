"""The structure of the package: imports run downwards; only backends know kinds of devices."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from support import REPO

PACKAGE = REPO / "exl_loader"

# A wing imports from itself and from wings further down. `loader` and `engine` are files; the
# package's own `__init__.py` is above all of them.
WINGS = (
    "commands", "loader", "engine", "convert", "memory", "model", "generation", "backends",
    "cache", "formats", "text", "checkpoint", "machines", "utils",
)
# (importing file, imported wing) -> why this arrow runs up.
UPWARD = {
    ("backends/cuda/self_check.py", "memory"): "kernels are checked in a buffer that is counted",
}
KIND = re.compile(r"(cpu|cuda)(:.*)?")
# Files outside `backends/` with such a string -> its purpose, which is not to compare kinds.
NAMED_KINDS = {
    "utils/table.py": "the default device, in one place",
    "commands/doctor.py": "keys of the JSON report",
}


@functools.cache
def sources() -> list[tuple[Path, ast.Module]]:
    return [
        (path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def wing_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_wings(path: Path, tree: ast.Module) -> Iterator[str]:
    """Name the wings that a file imports from, at its top or later, for types or to run."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        # `level` 1 is the file's own folder.
        above = path.parts[: len(path.parts) - node.level]
        module = [*above, *(node.module.split(".") if node.module else [])]
        yield from [module[0]] if module else [alias.name for alias in node.names]


def test_imports_run_downwards():
    upward = {
        (path.as_posix(), wing)
        for path, tree in sources()
        if wing_of(path) in WINGS
        for wing in imported_wings(path, tree)
        if wing in WINGS and WINGS.index(wing) < WINGS.index(wing_of(path))
    }
    assert upward == set(UPWARD)


def kinds_compared(tree: ast.Module) -> Iterator[str]:
    """Find the strings of a file that name a kind of device."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if KIND.fullmatch(node.value):
                yield node.value


def test_no_file_outside_backends_compares_kinds_of_devices():
    named = {
        path.as_posix() for path, tree in sources()
        if wing_of(path) != "backends" and any(kinds_compared(tree))
    }
    assert named == set(NAMED_KINDS)


# Files outside `utils/system/` that ask which operating system this is, and why.
ASK_FOR_SYSTEM = {
    "backends/build/supervise.py": "runs as a script with the standard library alone",
    "text/chat/sandbox.py": "runs as a script without the package",
}
# Files that ask `utils.system` for the operating system, because they differ by it.
DEPEND_ON_SYSTEM = {
    "backends/build/toolchain.py": "each system's compilers, and how to install one",
    "backends/build/spec.py": "flags of compilers and linkers",
    "backends/cuda/compilers.py": "where NVRTC and nvcc are installed",
}


def asks_for_system(tree: ast.Module) -> bool:
    questions = {
        (node.value.id, node.attr) for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        and node.value.id in ("sys", "os", "platform")
    }
    return any(
        question in (("sys", "platform"), ("os", "name"), ("os", "uname"))
        or question[0] == "platform" and question[1] != "python_version"
        for question in questions
    )


def test_only_utils_system_asks_for_the_operating_system():
    asking = {
        path.as_posix() for path, tree in sources()
        if path.parts[:2] != ("utils", "system") and asks_for_system(tree)
    }
    assert asking == set(ASK_FOR_SYSTEM)


def test_only_compilers_depend_on_the_systems_name():
    asking = {
        path.as_posix() for path, tree in sources()
        if any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and node.func.id in ("is_windows", "is_mac", "system_kind")
            for node in ast.walk(tree)
        )
    }
    assert asking == set(DEPEND_ON_SYSTEM)
