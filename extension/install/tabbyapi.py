"""`install.py --tabbyapi PATH`: install the backend into TabbyAPI, verify or uninstall it.

TabbyAPI has no folder for extensions, so everything is in its Python's site-packages: a link to the
extension (or a copy of it and of the engine), the start hook, and a record of what was installed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from exl_loader import ExlLoaderError
from exl_loader.utils.untrusted_files import SETTINGS_BYTES, is_there, read_text

from .command import import_in, install_extras, install_missing, pip, say
from .environment import (
    TABBYAPI,
    WE_INSTALL,
    HostPython,
    InstallError,
    Problem,
    dotted,
    extra_problems,
    find_python,
    package_problems,
)
from .plugin_files import (
    TABBYAPI_HOOK,
    extension_is_current,
    hook_is_current,
    install_extension,
    install_hook,
    is_link,
    read_record,
    remove_extension,
    remove_hook,
    write_record,
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
    parser = argparse.ArgumentParser(prog="install.py --tabbyapi PATH")
    parser.add_argument("--python", type=Path, help="the Python that runs TabbyAPI")
    parser.add_argument("--copy", action="store_true", help="copy the plugin instead of linking it")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--update", action="store_true", help="renew a copied plugin")
    task.add_argument("--uninstall", action="store_true", help="remove everything again")
    args = parser.parse_args(arguments)
    try:
        if args.uninstall:
            uninstall(tabbyapi, args.python)
        else:
            install(tabbyapi, args.python, torch, copy=args.copy, update=args.update)
    except (InstallError, ExlLoaderError) as error:
        say(f"error: {error}")
        return 1
    return 0


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
    refusals = [p for p in package_problems(python, TABBYAPI) if p.remedy != WE_INSTALL]
    if refusals:
        raise InstallError("; ".join(map(str, refusals)))
    installed = []
    if "torch" not in python.packages:
        installed += _install_torch(python, torch)
        python = find_python(root, given, TABBYAPI)
    installed += [*install_missing(python, TABBYAPI), *install_extras(python)]
    target = extension_folder(python)
    copied = target.exists() and not is_link(target)
    if update or not extension_is_current(target) or (copy and not copied):
        kind = install_extension(target, copy=copy or copied)
        say(f"extension: {target} ({kind})")
    else:
        say(f"extension: {target} (unchanged)")
    if hook_is_current(python.site_packages, TABBYAPI_HOOK):
        say(f"start hook: {python.site_packages} (unchanged)")
    else:
        install_hook(python.site_packages, TABBYAPI_HOOK)
        say(f"start hook: {python.site_packages}")
    record = read_record(python.site_packages, TABBYAPI_HOOK)
    packages = sorted({*record.get("packages", []), *installed})
    if record.get("packages") != packages:
        write_record(python.site_packages, {"packages": packages}, TABBYAPI_HOOK)
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
    packages = read_record(python.site_packages, TABBYAPI_HOOK).get("packages", [])
    if packages:
        pip(python, ["uninstall", "--yes", *packages])
        say(f"removed the packages {', '.join(packages)}")
    if remove_hook(python.site_packages, TABBYAPI_HOOK):
        say(f"removed the start hook from {python.site_packages}")


def problems(tabbyapi: Path, given: Path | None = None) -> list[Problem]:
    """Return what keeps the backend from working in TabbyAPI, each with its remedy."""
    again = f"Run install.py --tabbyapi {tabbyapi} again"
    try:
        root = check_folder(tabbyapi)
        python = find_python(root, given, TABBYAPI)
    except InstallError as error:
        line, _, remedy = str(error).partition(". ")
        return [Problem(line, remedy)]
    found = [Problem(p.problem, again if p.remedy == WE_INSTALL else p.remedy)
             for p in package_problems(python, TABBYAPI)]
    found += [Problem(p.problem, again) for p in extra_problems(python)]
    target = extension_folder(python)
    if not target.exists():
        gone = "links to a folder that no longer exists" if is_link(target) else "does not exist"
        found.append(Problem(f"{target} {gone}", again))
    elif not extension_is_current(target):
        found.append(Problem(f"{target} is not up to date", f"{again}, with --update"))
    if not hook_is_current(python.site_packages, TABBYAPI_HOOK):
        found.append(Problem(
            f"the start hook in {python.site_packages} is missing or outdated, so TabbyAPI does "
            "not find the backend", again))
    if _EXL3 not in python.packages and not _is_launched_without(root):
        found.append(Problem(f"{_EXL3} is not installed, so TabbyAPI ends at its start",
                             UNSAFE_LAUNCH[:1].upper() + UNSAFE_LAUNCH[1:]))
    if not found:
        try:
            verify(root, python)
        except InstallError as error:
            found.append(Problem(str(error), again))
    return found


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
