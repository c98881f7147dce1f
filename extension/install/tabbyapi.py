"""`install.py --tabbyapi PATH`: install the backend into TabbyAPI, verify or uninstall it.

TabbyAPI has no folder for extensions, so everything is in its Python's site-packages: a link to the
extension (or a copy of it and of the engine), the start hook, and a record of what was installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from exl_loader.utils.untrusted_files import SETTINGS_BYTES, is_there, read_text

from .environment import TABBYAPI, HostPython, InstallError, Problem, dotted, find_python
from .plugin_files import TABBYAPI_HOOK, remove_extension
from .steps import (
    import_in,
    install_extras,
    install_missing,
    install_plugin,
    pip,
    plugin_problems,
    refuse_missing,
    remove_packages_and_hook,
    run,
    say,
    verification_problems,
)

# Without exllamav3 TabbyAPI ends at its start, unless this is set.
UNSAFE_LAUNCH = (
    "set `unsafe_launch: true` under `developer:` in its config.yml, or start it with "
    "`--unsafe-launch true`"
)
_IS_UNSAFE = re.compile(r"^\s*unsafe_launch\s*:\s*true\s*(#.*)?$", re.MULTILINE | re.IGNORECASE)

# What TabbyAPI's start script installs on a machine with a card.
_EXL3 = "exllamav3"

_MODULES = ("early", "registration", "container", "launcher")

# Python -> pip's arguments for a PyTorch that fits this machine; none where TabbyAPI itself has to
# choose one.
TorchArguments = Callable[[Path], "list[str] | None"]


def main(tabbyapi: Path, arguments: list[str], torch: TorchArguments) -> int:
    """Install, update or uninstall, according to the arguments.

    Args:
        tabbyapi: TabbyAPI's folder.
        arguments: `--python P`, `--update`, `--copy` or `--uninstall`.
        torch: chooses a PyTorch if there is none.

    Returns:
        the exit code.
    """
    return run(TABBYAPI, arguments, partial(install, tabbyapi, torch=torch),
               partial(uninstall, tabbyapi))


def check_folder(tabbyapi: Path) -> Path:
    """Return TabbyAPI's folder, resolved.

    Raises:
        InstallError: it is not TabbyAPI's.
    """
    root = tabbyapi.expanduser().resolve()
    if not all((root / name).is_file() for name in ("main.py", "common/model.py")):
        raise InstallError(
            f"{root} is not the folder of TabbyAPI: main.py or common/model.py is missing. Give "
            "the folder that has start.sh and start.bat"
        )
    return root


def extension_folder(python: HostPython) -> Path:
    """Return where the start hook looks for the extension."""
    return python.site_packages / TABBYAPI_HOOK.name


def install(
    tabbyapi: Path, given: Path | None, torch: TorchArguments, *, copy: bool = False,
    update: bool = False,
) -> None:
    """Install the backend; if it is installed completely, nothing is written.

    Args:
        tabbyapi: TabbyAPI's folder. given: its Python, if it cannot be found.
        torch: chooses a PyTorch if there is none.
        copy: copy the extension instead of linking it.
        update: renew the extension even if it seems current.

    Raises:
        InstallError: a package of TabbyAPI's own is missing, or the check failed.
    """
    root = check_folder(tabbyapi)
    python = find_python(root, given, TABBYAPI)
    say(f"TabbyAPI: {root}\nits Python: {python.executable} ({dotted(python.version)})")
    refuse_missing(python, TABBYAPI)
    installed = []
    if "torch" not in python.packages:
        installed += _install_torch(python, torch)
        python = find_python(root, given, TABBYAPI)
    installed += [*install_missing(python, TABBYAPI), *install_extras(python)]
    install_plugin(python, TABBYAPI_HOOK, extension_folder(python), installed, copy=copy,
                   update=update)
    say(f"verified: exl_loader {verify(root, python)} can be imported in TabbyAPI's Python. Start "
        "TabbyAPI as usual; EXL2 and GPTQ models choose this backend by themselves")
    if _EXL3 not in python.packages:
        say(f"{_EXL3} is not installed, and TabbyAPI does not start without it unless it is told "
            f"to: {UNSAFE_LAUNCH}")


def uninstall(tabbyapi: Path, given: Path | None = None) -> None:
    """Remove everything: extension, start hook, packages that we installed.

    Raises:
        InstallError: TabbyAPI's Python does not exist.
    """
    root = tabbyapi.expanduser().resolve()
    python = find_python(root, given, TABBYAPI)
    target = extension_folder(python)
    if remove_extension(target):
        say(f"removed {target}")
    remove_packages_and_hook(python, TABBYAPI_HOOK)


def problems(tabbyapi: Path, given: Path | None = None) -> list[Problem]:
    """Return what keeps the backend from working in TabbyAPI, each with its remedy."""
    again = f"Run install.py --tabbyapi {tabbyapi} again"
    try:
        root = check_folder(tabbyapi)
        python = find_python(root, given, TABBYAPI)
    except InstallError as error:
        line, _, remedy = str(error).partition(". ")
        return [Problem(line, remedy)]
    found = plugin_problems(python, TABBYAPI, TABBYAPI_HOOK, extension_folder(python), again,
                            "TabbyAPI does not find the backend")
    if _EXL3 not in python.packages and not _is_launched_without(root):
        found.append(Problem(f"{_EXL3} is not installed, so TabbyAPI ends at its start",
                             UNSAFE_LAUNCH[:1].upper() + UNSAFE_LAUNCH[1:]))
    return found or verification_problems(partial(verify, root, python), again)


def verify(root: Path, python: HostPython) -> str:
    """Import the backend and the engine in TabbyAPI's Python; return the engine's version.

    Raises:
        InstallError: with the last line of Python's output.
    """
    return import_in(python, extension_folder(python), "tabby", _MODULES, root)


def _is_launched_without(root: Path) -> bool:
    """Return whether TabbyAPI's configuration lets it start without exllamav3."""
    config = root / "config.yml"
    if not is_there(config):
        return False
    return bool(_IS_UNSAFE.search(read_text(config, SETTINGS_BYTES, remedy="Move it away")))


def _install_torch(python: HostPython, torch: TorchArguments) -> list[str]:
    arguments = torch(python.executable)
    if arguments is None:
        raise InstallError(
            "PyTorch is missing, and on a machine with an NVIDIA GPU TabbyAPI chooses its version. "
            + TABBYAPI.start)
    say("installing PyTorch for the CPU")
    pip(python, ["install", *arguments])
    return ["torch"]
