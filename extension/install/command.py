"""`python install.py --webui PATH`: install, update, verify or take out, and say what was done."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from exl_loader.utils.errors import ExlLoaderError

from . import children, saved
from .host import (
    EXTRAS,
    HOST_OWNED,
    REQUIREMENTS,
    HostPython,
    check_folder,
    clean_environment,
    extension_folder,
    find_python,
    older,
)
from .place import (
    extension_is_current,
    hook_is_current,
    is_link,
    place_extension,
    place_hook,
    read_record,
    remove_extension,
    remove_hook,
    write_record,
)
from .problems import InstallError, Problem

# Imports everything that a load imports, in the web UI's Python, without the web UI.
_VERIFY = """
import sys, importlib.util
path = sys.argv[1] + "/bootstrap.py"
spec = importlib.util.spec_from_file_location("exl_loader_webui_bootstrap", path)
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)
for name in ("early", "registration", "host_panel", "webui_model") + tuple(sys.argv[2:]):
    bootstrap.activate(name)
import exl_loader.loader, exl_loader.engine, exl_loader.backends
print(exl_loader.__version__)
"""


def main(webui: Path, arguments: list[str]) -> int:
    """Run what was asked for.

    Args:
        webui: the web UI's folder.
        arguments: `--python P`, `--update`, `--copy` or `--uninstall`.

    Returns:
        the exit code.
    """
    parser = argparse.ArgumentParser(prog="install.py --webui PATH")
    parser.add_argument("--python", type=Path, help="the Python that runs the web UI")
    parser.add_argument("--copy", action="store_true", help="copy the plugin, do not link it")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--update", action="store_true", help="refresh a copied plugin")
    task.add_argument("--uninstall", action="store_true", help="take everything out again")
    args = parser.parse_args(arguments)
    try:
        if args.uninstall:
            uninstall(webui, args.python)
        else:
            install(webui, args.python, copy=args.copy, update=args.update)
    except (InstallError, ExlLoaderError) as error:
        _say(f"error: {error}")
        return 1
    return 0


def install(
    webui: Path, given: Path | None = None, *, copy: bool = False, update: bool = False
) -> None:
    """Install the plugin; where all of it is there already, nothing is written.

    Args:
        webui: the web UI's folder. given: its Python, where it cannot be found.
        copy: copy the extension instead of linking it.
        update: refresh the extension even if it seems current.

    Raises:
        InstallError: something is missing that is the web UI's own, or the check failed.
    """
    root = check_folder(webui)
    python = find_python(root, given)
    _say(f"web UI: {root}\nits Python: {python.executable} ({_dotted(python.version)})")
    refusals = [p for p in package_problems(python) if p.remedy != _WE_INSTALL]
    if refusals:
        raise InstallError("; ".join(map(str, refusals)))
    installed = [*_install_missing(python), *_install_extras(python)]
    target = extension_folder(root)
    copied = target.exists() and not is_link(target)
    if update or not extension_is_current(target) or (copy and not copied):
        kind = place_extension(target, copy=copy or copied)
        _say(f"extension: {target} ({kind})")
    else:
        _say(f"extension: {target} (as it should be)")
    if hook_is_current(python.site_packages):
        _say(f"start hook: {python.site_packages} (as it should be)")
    else:
        place_hook(python.site_packages)
        _say(f"start hook: {python.site_packages}")
    record = read_record(python.site_packages)
    packages = sorted({*record.get("packages", []), *installed})
    if record.get("packages") != packages:
        write_record(python.site_packages, {"packages": packages})
    _say(f"verified: exl_loader {verify(root, python)} imports in the web UI's Python; start the "
         "web UI as ever, and its Model tab has the loaders ExLlamav2 and ExLlamav2_HF")


def uninstall(webui: Path, given: Path | None = None) -> None:
    """Take everything out: extension, start hook, packages we installed, saved settings.

    Raises:
        InstallError: the folder or its Python is not there; what could be removed is removed.
    """
    root = webui.expanduser().resolve()
    if remove_extension(extension_folder(root)):
        _say(f"removed {extension_folder(root)}")
    for path in saved.config_files(root):
        models = saved.remove_entries(path)
        if models:
            _say(f"{path}: no longer names ExLlamav2 for {', '.join(models)} "
                 f"(as it was: {saved.BACKUP})")
    for path, flags in saved.named_flags(root).items():
        # A file of the web UI's own, which is not ours to change.
        _say(f"take {' and '.join(flags)} out of {path}: without the plugin the web UI does not "
             "start with that")
    python = find_python(root, given)
    packages = read_record(python.site_packages).get("packages", [])
    if packages:
        _pip(python, ["uninstall", "--yes", *packages])
        _say(f"removed the packages {', '.join(packages)}")
    if remove_hook(python.site_packages):
        _say(f"removed the start hook from {python.site_packages}")


def problems(webui: Path, given: Path | None = None) -> list[Problem]:
    """Say what keeps the loader from working in a web UI, and what to do about each."""
    again = f"Run install.py --webui {webui} again"
    try:
        root = check_folder(webui)
        python = find_python(root, given)
    except InstallError as error:
        line, _, remedy = str(error).partition(". ")
        return [Problem(line, remedy)]
    found = [Problem(p.problem, again if p.remedy == _WE_INSTALL else p.remedy)
             for p in package_problems(python)]
    found += [Problem(p.problem, again) for p in extra_problems(python)]
    target = extension_folder(root)
    if not target.exists():
        gone = "points to a folder that is gone" if is_link(target) else "is not there"
        found.append(Problem(f"{target} {gone}", again))
    elif not extension_is_current(target):
        found.append(Problem(f"{target} is not today's", f"{again}, with --update"))
    if not hook_is_current(python.site_packages):
        found.append(Problem(f"the start hook in {python.site_packages} is missing or old, so "
                             "--model does not find the loader", again))
    if not found:
        try:
            verify(root, python)
        except InstallError as error:
            found.append(Problem(str(error), again))
    return found


_WE_INSTALL = "install.py --webui installs it"


def package_problems(python: HostPython) -> list[Problem]:
    """What is missing or too old in the web UI's Python."""
    found = []
    if python.version < (3, 10):
        found.append(Problem(f"its Python is {_dotted(python.version)}, and 3.10 is the oldest "
                             "that exl_loader runs with", "Update the web UI"))
    for name, oldest in REQUIREMENTS.items():
        version = python.packages.get(name)
        if version is None:
            remedy = "Run the web UI's start script once" if name in HOST_OWNED else _WE_INSTALL
            found.append(Problem(f"the package {name} is missing", remedy))
        elif older(version, oldest):
            found.append(Problem(f"{name} is {version}, and {oldest} is the oldest that "
                                 "exl_loader runs with", "Update the web UI"))
    return found


def extra_problems(python: HostPython) -> list[Problem]:
    """What requests of some kinds will miss in the web UI's Python."""
    found = []
    for name, (oldest, loss) in EXTRAS.items():
        version = python.packages.get(name)
        if version is None or older(version, oldest):
            state = "missing" if version is None else f"{version}, older than {oldest}"
            found.append(Problem(f"the package {name} is {state}: {loss}", _WE_INSTALL))
    return found


def verify(root: Path, python: HostPython) -> str:
    """Import the plugin and the engine in the web UI's Python.

    Returns:
        the engine's version.

    Raises:
        InstallError: with the last line of what Python said.
    """
    more = ["webui_model_hf"] if "transformers" in python.packages else []
    result = subprocess.run(
        [str(python.executable), "-c", _VERIFY, str(extension_folder(root)), *more],
        capture_output=True, text=True, errors="replace", env=clean_environment(), cwd=root,
    )
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["no words"])[-1]
        raise InstallError(f"the plugin does not import in {python.executable}: {said}")
    return result.stdout.strip().splitlines()[-1]


def _install_missing(python: HostPython) -> list[str]:
    """Install what is missing."""
    missing = [n for n in REQUIREMENTS if n not in python.packages and n not in HOST_OWNED]
    if missing:
        _install_held(python, {name: REQUIREMENTS[name] for name in missing})
    return missing


def _install_extras(python: HostPython) -> list[str]:
    """Install what is missing of the extras, where that can be had."""
    missing = {n: oldest for n, (oldest, _) in EXTRAS.items() if n not in python.packages}
    if not missing:
        return []
    try:
        _install_held(python, missing)
    except InstallError as error:
        losses = "; ".join(f"without {name} {EXTRAS[name][1]}" for name in missing)
        _say(f"{losses} ({error})")
        return []
    return list(missing)


def _install_held(python: HostPython, wanted: dict[str, str]) -> None:
    """Install packages, and hold everything that is there at its version."""
    _say(f"installing {', '.join(wanted)}")
    held = [f"{name}=={version}\n" for name, version in sorted(python.packages.items())]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(held), encoding="utf-8")
        packages = [f"{name}>={oldest}" for name, oldest in wanted.items()]
        _pip(python, ["install", "--constraint", str(constraints), *packages])


def _pip(python: HostPython, arguments: list[str]) -> None:
    command = [str(python.executable), "-m", "pip", *arguments, "--disable-pip-version-check"]
    result = children.run([*command, "--no-input"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=clean_environment())
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or ["no words"])[-1]
        raise InstallError(f"pip {arguments[0]} failed: {said}. See that {python.executable} "
                           "has pip and the package index can be reached")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
