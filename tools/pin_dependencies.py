"""Resolve all dependencies for each Python version, and write the versions to tools/pins.txt.

    python tools/pin_dependencies.py python3.10 python3.11 python3.12 python3.13

Each interpreter's own pip resolves what pyproject.toml asks for, without installing it (only
an interpreter of the version itself reads version markers correctly). PyTorch is left out,
because `install.py` chooses its build; what it depends on is not. Needs Python 3.11.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import tomllib

REPO = Path(__file__).resolve().parents[1]
PINS = Path(__file__).with_name("pins.txt")

# Of torch 2.13's CPU build (its metadata, Requires-Dist without extras).
TORCH_NEEDS = (
    "filelock",
    "typing-extensions>=4.10.0",
    "setuptools>=77.0.3",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
)

HEADER = """\
# Versions of everything that install.py puts into .venv, PyTorch excepted.
# Written by tools/pin_dependencies.py.
"""


def requirements() -> list[str]:
    """List what the project asks for: to run, for its extras, and to be built."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    wanted += project["build-system"]["requires"]
    return [line for line in wanted if not line.startswith("torch")] + list(TORCH_NEEDS)


def resolve(interpreter: str, wanted: list[str]) -> tuple[str, dict[str, str]]:
    """Return the interpreter's version (`3.11`) and {package: version} as its pip resolves."""
    command = [interpreter, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--only-binary=:all:", "--report", "-", *wanted]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(answer.stdout)
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in report["install"]
    }
    return report["environment"]["python_version"], found


def pin_lines(by_python: dict[str, dict[str, str]]) -> list[str]:
    """Write one line a package where all agree, else one a Python version."""
    newest = max(by_python, key=lambda version: tuple(map(int, version.split("."))))
    lines = []
    for name in sorted({name for found in by_python.values() for name in found}):
        versions = {python: found.get(name) for python, found in by_python.items()}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={versions[newest]}")
            continue
        for python, version in versions.items():
            if version is not None:
                relation = ">=" if python == newest else "=="
                lines.append(f'{name}=={version}; python_version {relation} "{python}"')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("interpreters", nargs="+", help="one of each Python version")
    wanted = requirements()
    by_python = dict(resolve(name, wanted) for name in parser.parse_args().interpreters)
    PINS.write_text(HEADER + "\n".join(pin_lines(by_python)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
