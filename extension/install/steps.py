"""The steps of an installation, which are the same for every host; each reports what it did."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from exl_loader import ExlLoaderError

from . import children
from .environment import (
    EXTRAS,
    REQUIREMENTS,
    WE_INSTALL,
    WEBUI,
    Host,
    HostPython,
    InstallError,
    Problem,
    clean_environment,
    extra_problems,
    package_problems,
)
from .plugin_files import (
    Hook,
    extension_is_current,
    hook_is_current,
    install_extension,
    install_hook,
    is_link,
    read_record,
    remove_hook,
    write_record,
)

# Imports everything that a load imports, in the host's Python but without the host.
_VERIFY = """
import sys, importlib.util
path = sys.argv[1] + "/bootstrap.py"
spec = importlib.util.spec_from_file_location("exl_loader_bootstrap", path)
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
for name in sys.argv[3:]:
    bootstrap.activate(name, sys.argv[2])
import exl_loader.loader, exl_loader.engine, exl_loader.backends
print(exl_loader.__version__)
"""


def run(
    host: Host, arguments: list[str], install: Callable[..., None],
    uninstall: Callable[[Path | None], None],
) -> int:
    """Do what the arguments of `install.py` ask for a host.

    Args:
        host: the host.
        arguments: `--python P`, `--update`, `--copy` or `--uninstall`.
        install: takes the Python, or None, and `copy` and `update`.
        uninstall: takes the Python, or None.

    Returns:
        the exit code.
    """
    parser = argparse.ArgumentParser(prog=f"install.py {host.option} PATH")
    parser.add_argument("--python", type=Path, help=f"the Python that runs {host.name}")
    parser.add_argument("--copy", action="store_true", help="copy the plugin instead of linking it")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--update", action="store_true", help="renew a copied plugin")
    task.add_argument("--uninstall", action="store_true", help="remove everything again")
    args = parser.parse_args(arguments)
    try:
        if args.uninstall:
            uninstall(args.python)
        else:
            install(args.python, copy=args.copy, update=args.update)
    except (InstallError, ExlLoaderError) as error:
        say(f"error: {error}")
        return 1
    return 0


def refuse_missing(python: HostPython, host: Host) -> None:
    """Check the packages that a host itself has to install.

    Raises:
        InstallError: some are missing.
    """
    refusals = [p for p in package_problems(python, host) if p.remedy != WE_INSTALL]
    if refusals:
        raise InstallError("; ".join(map(str, refusals)))


def install_plugin(
    python: HostPython, hook: Hook, target: Path, installed: Sequence[str], *, copy: bool,
    update: bool,
) -> None:
    """Install extension and start hook where they are not current, and record packages.

    Args:
        python: the host's. hook: its start hook.
        target: where the extension belongs.
        installed: the packages that this run has installed.
        copy: copy the extension instead of linking it.
        update: renew the extension even if it seems current.

    Raises:
        InstallError: as `install_extension` and `install_hook`.
    """
    copied = target.exists() and not is_link(target)
    if update or not extension_is_current(target) or (copy and not copied):
        kind = install_extension(target, copy=copy or copied)
        say(f"extension: {target} ({kind})")
    else:
        say(f"extension: {target} (unchanged)")
    if hook_is_current(python.site_packages, hook):
        say(f"start hook: {python.site_packages} (unchanged)")
    else:
        install_hook(python.site_packages, hook)
        say(f"start hook: {python.site_packages}")
    record = read_record(python.site_packages, hook)
    packages = sorted({*record.get("packages", []), *installed})
    if record.get("packages") != packages:
        write_record(python.site_packages, {"packages": packages}, hook)


def remove_packages_and_hook(python: HostPython, hook: Hook) -> None:
    """Remove the packages that were recorded, then the start hook.

    Raises:
        InstallError: pip failed; the start hook stays.
    """
    packages = read_record(python.site_packages, hook).get("packages", [])
    if packages:
        pip(python, ["uninstall", "--yes", *packages])
        say(f"removed the packages {', '.join(packages)}")
    if remove_hook(python.site_packages, hook):
        say(f"removed the start hook from {python.site_packages}")


def plugin_problems(
    python: HostPython, host: Host, hook: Hook, target: Path, again: str, loss: str
) -> list[Problem]:
    """Return what is wrong with packages, extension and start hook.

    Args:
        python: the host's. hook: its start hook.
        target: where the extension belongs.
        again: the remedy of what the installer mends.
        loss: what does not work without the start hook.
    """
    found = [Problem(p.problem, again if p.remedy == WE_INSTALL else p.remedy)
             for p in package_problems(python, host)]
    found += [Problem(p.problem, again) for p in extra_problems(python)]
    if not target.exists():
        gone = "links to a folder that no longer exists" if is_link(target) else "does not exist"
        found.append(Problem(f"{target} {gone}", again))
    elif not extension_is_current(target):
        found.append(Problem(f"{target} is not up to date", f"{again}, with --update"))
    if not hook_is_current(python.site_packages, hook):
        found.append(Problem(f"the start hook in {python.site_packages} is missing or outdated, so "
                             f"{loss}", again))
    return found


def verification_problems(verify: Callable[[], str], again: str) -> list[Problem]:
    """Return the problem that `verify` meets, with the remedy `again`."""
    try:
        verify()
    except InstallError as error:
        return [Problem(str(error), again)]
    return []


def import_in(
    python: HostPython, extension: Path, room: str, modules: Sequence[str], folder: Path
) -> str:
    """Import a room of the extension, and the engine, in a host's Python.

    Args:
        python: the host's.
        extension: where the extension is installed.
        room: its folder for the host, such as `webui`.
        modules: of that folder.
        folder: the working folder.

    Returns:
        the engine's version.

    Raises:
        InstallError: with the last line of Python's output.
    """
    result = subprocess.run(
        [str(python.executable), "-c", _VERIFY, str(extension), room, *modules],
        capture_output=True, text=True, errors="replace", env=clean_environment(), cwd=folder,
    )
    if result.returncode != 0:
        output = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(f"the plugin cannot be imported in {python.executable}: {output}")
    return result.stdout.strip().splitlines()[-1]


def install_missing(python: HostPython, host: Host = WEBUI) -> list[str]:
    """Install the required packages that are missing and are not the host's own.

    Returns:
        their names.

    Raises:
        InstallError: pip failed.
    """
    missing = [n for n in REQUIREMENTS if n not in python.packages and n not in host.owned]
    if missing:
        _install_pinned(python, {name: REQUIREMENTS[name] for name in missing})
    return missing


def install_extras(python: HostPython) -> list[str]:
    """Install the optional packages that are missing, if pip can get them; return their names."""
    missing = {n: oldest for n, (oldest, _) in EXTRAS.items() if n not in python.packages}
    if not missing:
        return []
    try:
        _install_pinned(python, missing)
    except InstallError as error:
        losses = "; ".join(f"without {name} {EXTRAS[name][1]}" for name in missing)
        say(f"{losses} ({error})")
        return []
    return list(missing)


def _install_pinned(python: HostPython, wanted: dict[str, str]) -> None:
    """Install packages, and keep everything that is installed at its version."""
    say(f"installing {', '.join(wanted)}")
    pinned = [f"{name}=={version}\n" for name, version in sorted(python.packages.items())]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(pinned), encoding="utf-8")
        packages = [f"{name}>={oldest}" for name, oldest in wanted.items()]
        pip(python, ["install", "--constraint", str(constraints), *packages])


def pip(python: HostPython, arguments: list[str]) -> None:
    """Run a host's pip.

    Raises:
        InstallError: with the last line of its output.
    """
    command = [str(python.executable), "-m", "pip", *arguments, "--disable-pip-version-check"]
    result = children.run([*command, "--no-input"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=clean_environment())
    if result.returncode != 0:
        output = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(f"pip {arguments[0]} failed: {output}. Check that {python.executable} "
                           "has pip and that the package index can be reached")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
