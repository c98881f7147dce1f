"""The web UI's folder and its Python, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exl_loader.utils.errors import ExlLoaderError
from exl_loader.utils.untrusted_files import SETTINGS_BYTES, read_bytes

from .problems import InstallError

# The packages the engine imports and the oldest versions that it runs with; the same as in
# pyproject.toml, which only newer Pythons can read without help.
REQUIREMENTS: dict[str, str] = {
    "torch": "2.6",
    "safetensors": "0.4.3",
    "sentencepiece": "0.2",
    "tokenizers": "0.20",
    "ninja": "1.11",
    "jinja2": "3.1.6",
    "numpy": "1.26",
    "rich": "13.7",
    "filelock": "3.12",
    "platformdirs": "4.0",
}

# What only some requests need, and what they are; without it the loader works all the same.
EXTRAS: dict[str, tuple[str, str]] = {
    "llguidance": ("1.9", "requests with a grammar fail"),
}

# The web UI's own: a missing one is the web UI's to install.
HOST_OWNED = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2")

_PROBE = """
import importlib.metadata, json, sys, sysconfig
found = {}
for dist in importlib.metadata.distributions():
    name = dist.metadata["Name"]
    if name:
        found.setdefault(name.lower().replace("_", "-"), dist.version)
print(json.dumps({"version": list(sys.version_info[:3]), "executable": sys.executable,
                  "site": sysconfig.get_paths()["purelib"], "packages": found}))
"""


@dataclass(frozen=True)
class HostPython:
    """The interpreter that runs the web UI.

    Args:
        executable: its path. version: of Python. site_packages: where .pth files are read.
        packages: name in lower case -> version of everything installed there.
    """

    executable: Path
    version: tuple[int, ...]
    site_packages: Path
    packages: Mapping[str, str]


def check_folder(webui: Path) -> Path:
    """Return the web UI's folder, resolved.

    Raises:
        InstallError: it is no text-generation-webui, or one that has the loader itself.
    """
    root = webui.expanduser().resolve()
    tables = root / "modules" / "loaders.py"
    if not (root / "server.py").is_file() or not tables.is_file():
        raise InstallError(
            f"{root} is not a text-generation-webui folder: it has no server.py with "
            "modules/loaders.py. Give the folder that holds start_linux.sh or start_windows.bat"
        )
    try:
        known = read_bytes(tables, SETTINGS_BYTES, remedy="Update the web UI")
    except ExlLoaderError as error:
        raise InstallError(str(error)) from None
    if b"'ExLlamav2'" in known:
        raise InstallError(
            f"{root} is a version 3 or older, which has ExLlamav2 itself. Use that, or update "
            "the web UI to version 4 or newer and run this again"
        )
    return root


def extension_folder(root: Path) -> Path:
    """Where the web UI looks for a user's extension."""
    base = root / "user_data" if (root / "user_data").is_dir() else root
    return base / "extensions" / "exl_loader"


def find_python(root: Path, given: Path | None = None) -> HostPython:
    """Find the Python that runs a web UI, without starting the web UI.

    Args:
        root: the web UI's folder.
        given: what the user says it is; nothing else is tried then.

    Raises:
        InstallError: none was found, or it does not run.
    """
    if given is not None:
        if not given.is_file():
            raise InstallError(f"--python {given} is not a file. Give the path of a python")
        return examine(given)
    if (root / "portable_env").is_dir():
        raise InstallError(
            f"{root} is a portable build, which has no PyTorch and replaces its Python with "
            "every release. Use the full version of the web UI"
        )
    tried = []
    for executable in _candidates(root):
        if executable.is_file():
            return examine(executable)
        tried.append(str(executable.parent))
    raise InstallError(
        f"the Python of {root} was not found (looked in {', '.join(tried)}). Run the web UI's "
        "start script once, or say which it is with --python"
    )


def examine(executable: Path) -> HostPython:
    """Ask an interpreter about itself.

    Raises:
        InstallError: it does not run.
    """
    try:
        result = subprocess.run([str(executable), "-c", _PROBE], capture_output=True,
                                text=True, errors="replace", timeout=120, env=clean_environment())
        found = json.loads(result.stdout.strip().splitlines()[-1])
        return HostPython(Path(found["executable"]), tuple(found["version"]),
                          Path(found["site"]), found["packages"])
    except (OSError, subprocess.TimeoutExpired) as error:
        why: object = error
    except (ValueError, LookupError, TypeError):
        why = "it answers something else"
    raise InstallError(f"{executable} does not run as a Python: {why}. "
                       "Say which it is with --python")


def clean_environment() -> dict[str, str]:
    """The environment as the web UI's start scripts make it: no paths from outside."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONNOUSERSITE": "1"}


def older(version: str, oldest: str) -> bool:
    """Whether a version comes before another, by their leading numbers."""
    return _numbers(version) < _numbers(oldest)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _candidates(root: Path) -> Iterator[Path]:
    """The one-click installer's environment, environments in the folder, the active one."""
    folders = [root / "installer_files" / "env", *(root / n for n in ("venv", ".venv", "env"))]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]))
    for folder in folders:
        # A venv on Windows has Scripts, a conda environment its python at the top.
        if os.name == "nt":
            scripts = folder / "Scripts" / "python.exe"
            yield scripts if scripts.is_file() else folder / "python.exe"
        else:
            yield folder / "bin" / "python"
