"""A host's folder and its Python, examined from outside, and what is wrong with them.

Hosts are text-generation-webui and TabbyAPI. Where no host is named it is the web UI.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from exl_loader import ExlLoaderError
from exl_loader.utils.untrusted_files import SETTINGS_BYTES, read_bytes

# The packages that the engine imports, with the oldest versions that work. pyproject.toml has
# the same list, but Python can read it without help only from 3.11 on.
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

# Packages that only some requests need, with the oldest version and what fails without them.
EXTRAS: dict[str, tuple[str, str]] = {
    "llguidance": ("1.9", "requests with a grammar fail"),
}

# The web UI's own packages: if one is missing, the web UI has to install it.
WEBUI_OWNED = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2")

# The remedy of a problem that installing solves.
WE_INSTALL = "install.py installs it"


@dataclass(frozen=True)
class Host:
    """A program that the engine is installed into.

    Args:
        name: what a person calls it. option: of install.py.
        owned: the packages that the host itself has to install.
        environments: folders of Python environments inside its folder, the likeliest first.
        start: how it installs its own packages.
    """

    name: str
    option: str
    owned: tuple[str, ...]
    environments: tuple[str, ...]
    start: str


WEBUI = Host(
    "the web UI", "--webui", WEBUI_OWNED, ("installer_files/env", "venv", ".venv", "env"),
    "Run the web UI's start script once",
)
TABBYAPI = Host(
    "TabbyAPI", "--tabbyapi", ("numpy", "tokenizers", "jinja2", "rich"), ("venv", ".venv", "env"),
    "Run TabbyAPI's start script once, or without an NVIDIA GPU `pip install .` in its folder",
)

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


class InstallError(Exception):
    """What went wrong and how to fix it, in one line."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps the loader from working.

    Args:
        problem: what is wrong. remedy: how to fix it.
    """

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"


@dataclass(frozen=True)
class HostPython:
    """The interpreter that runs a host.

    Args:
        executable: its path. version: of Python. site_packages: the folder of its .pth files.
        packages: name in lower case -> version, of everything installed there.
    """

    executable: Path
    version: tuple[int, ...]
    site_packages: Path
    packages: Mapping[str, str]


def check_folder(webui: Path) -> Path:
    """Return the web UI's folder, resolved.

    Raises:
        InstallError: it is not a text-generation-webui, or one that has the loader itself.
    """
    root = webui.expanduser().resolve()
    tables = root / "modules" / "loaders.py"
    if not (root / "server.py").is_file() or not tables.is_file():
        raise InstallError(
            f"{root} is not the folder of a text-generation-webui: server.py or "
            "modules/loaders.py is missing. Give the folder that has start_linux.sh or "
            "start_windows.bat"
        )
    try:
        known = read_bytes(tables, SETTINGS_BYTES, remedy="Update the web UI")
    except ExlLoaderError as error:
        raise InstallError(str(error)) from None
    if b"'ExLlamav2'" in known:
        raise InstallError(
            f"{root} is version 3 or older, which has its own ExLlamav2 loader. Use that, or "
            "update the web UI to version 4 or newer and run this again"
        )
    return root


def extension_folder(root: Path) -> Path:
    """Return the folder in which the web UI looks for this extension."""
    base = root / "user_data" if (root / "user_data").is_dir() else root
    return base / "extensions" / "exl_loader"


def find_python(root: Path, given: Path | None = None, host: Host = WEBUI) -> HostPython:
    """Find the Python that runs a host, without starting the host.

    Args:
        root: the host's folder.
        given: the path that the user gave; nothing else is tried then.
        host: which one it is.

    Raises:
        InstallError: none was found, or it does not run.
    """
    if given is not None:
        if not given.is_file():
            raise InstallError(
                f"--python {given} is not a file. Give the path of a Python executable")
        return examine(given, host)
    if (root / "portable_env").is_dir():
        raise InstallError(
            f"{root} is a portable build, which has no PyTorch and replaces its Python with "
            "every release. Use the full version of the web UI"
        )
    tried = []
    for executable in _candidates(root, host):
        if executable.is_file():
            return examine(executable, host)
        tried.append(str(executable.parent))
    raise InstallError(
        f"the Python of {root} was not found (looked in {', '.join(tried)}). {host.start}, or give "
        "its path with --python"
    )


def examine(executable: Path, host: Host = WEBUI) -> HostPython:
    """Ask an interpreter for its version, its folders and its packages.

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
        why = "its answer could not be read"
    raise InstallError(f"{executable} does not run as a Python: {why}. "
                       f"Give the path of {host.name}'s Python with --python")


def package_problems(python: HostPython, host: Host = WEBUI) -> list[Problem]:
    """Return what is missing or too old in a host's Python."""
    found = []
    if python.version < (3, 10):
        found.append(Problem(f"its Python is {dotted(python.version)}, but exl_loader needs 3.10 "
                             "or newer", f"Update {host.name}"))
    for name, oldest in REQUIREMENTS.items():
        version = python.packages.get(name)
        if version is None:
            remedy = host.start if name in host.owned else WE_INSTALL
            found.append(Problem(f"the package {name} is missing", remedy))
        elif older(version, oldest):
            found.append(Problem(f"{name} is {version}, but exl_loader needs {oldest} or "
                                 "newer", f"Update {host.name}"))
    return found


def extra_problems(python: HostPython) -> list[Problem]:
    """Return the optional packages that are missing, with the requests that fail without them."""
    found = []
    for name, (oldest, loss) in EXTRAS.items():
        version = python.packages.get(name)
        if version is None or older(version, oldest):
            state = "missing" if version is None else f"{version}, older than {oldest}"
            found.append(Problem(f"the package {name} is {state}: {loss}", WE_INSTALL))
    return found


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def clean_environment() -> dict[str, str]:
    """Return the environment that hosts' start scripts set: no paths from outside."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"PYTHONNOUSERSITE": "1"}


def older(version: str, oldest: str) -> bool:
    """Return whether a version is older than another, by their leading numbers."""
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


def _candidates(root: Path, host: Host) -> Iterator[Path]:
    """Yield the environments in the folder, and the active one."""
    folders = [root / name for name in host.environments]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]))
    for folder in folders:
        # On Windows a venv has Scripts, and a conda environment has python.exe at the top.
        if os.name == "nt":
            scripts = folder / "Scripts" / "python.exe"
            yield scripts if scripts.is_file() else folder / "python.exe"
        else:
            yield folder / "bin" / "python"
