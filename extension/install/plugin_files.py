"""Installs files where a host and its Python look for them, and removes them again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_loader import ExlLoaderError
from exl_loader.utils.json_keys import read_json_object
from exl_loader.utils.untrusted_files import SETTINGS_BYTES, read_text

from .environment import InstallError

REPO = Path(__file__).resolve().parents[2]
EXTENSION = REPO / "extension"

# A folder with this file is a copy that we made, so it may be replaced.
COPY_MARK = ".exl_loader-copy.json"

_NOT_COPIED = frozenset({"__pycache__", "demo_model"})

# What a copy contains besides the extension itself.
_ENGINE = ("exl_loader", "csrc")


@dataclass(frozen=True)
class Hook:
    """What runs the extension when a host starts: files in the host's site-packages.

    Args:
        name: of the files, without what tells them apart.
        template: the file of this folder that is written as the start file.
        scripts: names of the host's scripts; the hook does nothing in processes without one.
    """

    name: str
    template: str
    scripts: tuple[str, ...]

    @property
    def pth(self) -> str:
        """The file that makes Python run the start file."""
        return f"{self.name}.pth"

    @property
    def start(self) -> str:
        """The start file."""
        return f"{self.name}_start.py"

    @property
    def record(self) -> str:
        """The file that records which packages were installed."""
        return f"{self.name}.json"

    @property
    def files(self) -> dict[str, str]:
        """Name -> content; the file that makes the hook run is the last one."""
        start = Path(__file__).with_name(self.template).read_text(encoding="utf-8")
        return {self.start: start, self.pth: self._pth_line()}

    def _pth_line(self) -> str:
        """Return the line that Python executes.

        It is one line, because Python executes single lines of .pth files. A .pth file is read
        twice if lib64 is a link to lib. The line runs in every Python of the environment, so the
        cheapest question comes first. A missing start file means a half-removed plugin and is not
        an error.
        """
        start = Path(self.start).stem
        scripts = ", ".join(f'\\"{script}\\"' for script in self.scripts)
        return (
            f"import sys; exec('name = \"{start}\"\\ntry:\\n"
            f" if name not in sys.modules and any(a.endswith(({scripts},)) for a in"
            " sys.orig_argv):\\n"
            "  __import__(name)\\nexcept Exception as error:\\n sys.modules[name] = None\\n"
            " sys.stderr.write(\"exl_loader: not started: %s\\\\n\" % error)')\n"
        )


WEBUI_HOOK = Hook("exl_loader_webui", "start_template.py", ("server.py",))
TABBYAPI_HOOK = Hook("exl_loader_tabbyapi", "tabbyapi_start_template.py", ("main.py", "start.py"))

PTH, START, RECORD = WEBUI_HOOK.pth, WEBUI_HOOK.start, WEBUI_HOOK.record


def extension_is_current(target: Path) -> bool:
    """Return whether the extension is installed and up to date."""
    if is_link(target):
        return target.exists() and target.resolve() == EXTENSION.resolve()
    current = _fingerprint()
    # Files of the copy may have been removed or changed since.
    return _copied_from(target) == current and _digest(target, target) == current["sha256"]


def install_extension(target: Path, *, copy: bool = False) -> str:
    """Link the extension to where a host looks for it, or copy it together with the engine.

    Args:
        target: the extension's folder for the host.
        copy: do not try to link it.

    Returns:
        `link` or `copy`.

    Raises:
        InstallError: the folder exists and is not ours.
    """
    if not (EXTENSION / "script.py").is_file():
        raise InstallError(f"{EXTENSION} does not exist. Run install.py from a checkout")
    remove_extension(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy and _link(target):
        return "link"
    try:
        _copy(target)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise InstallError(f"{target} cannot be written: {error}") from error
    return "copy"


def remove_extension(target: Path) -> bool:
    """Remove our link or our copy; return whether there was one.

    Raises:
        InstallError: the folder is not ours.
    """
    if is_link(target):
        # Python treats a junction as a folder, which `unlink` refuses.
        target.unlink() if target.is_symlink() else os.rmdir(target)
        return True
    if not target.exists():
        return False
    if not (target / COPY_MARK).is_file():
        raise InstallError(f"{target} exists and was not made by this installer. Move it away")
    shutil.rmtree(target)
    return True


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link or a junction; its target need not exist."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode) or _is_junction(status)


def _is_junction(status: os.stat_result) -> bool:
    # IO_REPARSE_TAG_MOUNT_POINT, which `stat` names only on Windows.
    return getattr(status, "st_reparse_tag", 0) == 0xA0000003


def hook_is_current(site_packages: Path, hook: Hook = WEBUI_HOOK) -> bool:
    """Return whether the start hook is in the environment, byte for byte."""
    return all(_read(site_packages / name) == text for name, text in hook.files.items())


def install_hook(site_packages: Path, hook: Hook = WEBUI_HOOK) -> None:
    """Write the start hook; the file that makes it run is written last.

    Raises:
        InstallError: the folder cannot be written.
    """
    try:
        for name, text in hook.files.items():
            temporary = site_packages / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(site_packages / name)
    except OSError as error:
        raise InstallError(f"{site_packages} cannot be written: {error.strerror}. Run this as "
                           "the user who installed that Python") from error


def remove_hook(site_packages: Path, hook: Hook = WEBUI_HOOK) -> bool:
    """Remove the start hook, first the file that makes it run; return whether there was one."""
    found = False
    for name in (hook.pth, hook.start, hook.record):
        path = site_packages / name
        found |= path.exists()
        path.unlink(missing_ok=True)
    for path in (site_packages / "__pycache__").glob(f"{Path(hook.start).stem}.*.pyc"):
        path.unlink(missing_ok=True)
    return found


def read_record(site_packages: Path, hook: Hook = WEBUI_HOOK) -> dict[str, list[str]]:
    """Read what an earlier run recorded: the `packages` that it installed."""
    record = _read_object(site_packages / hook.record) or {}
    packages = record.get("packages", [])
    valid = isinstance(packages, list) and all(isinstance(name, str) for name in packages)
    return {"packages": packages} if valid and "packages" in record else {}


def write_record(
    site_packages: Path, record: dict[str, list[str]], hook: Hook = WEBUI_HOOK
) -> None:
    """Record what was installed, so that it can be uninstalled."""
    (site_packages / hook.record).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _read(path: Path) -> str | None:
    try:
        return read_text(path, SETTINGS_BYTES)
    except ExlLoaderError:
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(path, limit=SETTINGS_BYTES)
    except ExlLoaderError:
        return None


def _link(target: Path) -> bool:
    """Link in the way that the system allows; remove a link that leads nowhere.

    On Windows a symbolic link needs a privilege, and a junction works on one machine only.
    """
    for make in (_symlink, _junction):
        try:
            make(target)
        except OSError:
            pass
        if (target / "script.py").is_file():
            return True
        if is_link(target):
            remove_extension(target)
        elif target.is_dir():
            target.rmdir()  # left by a junction that failed
    return False


def _symlink(target: Path) -> None:
    os.symlink(EXTENSION, target, target_is_directory=True)


def _junction(target: Path) -> None:
    if sys.platform != "win32":
        raise OSError("junctions exist on Windows only")
    import _winapi

    _winapi.CreateJunction(str(EXTENSION), str(target))


def _copy(target: Path) -> None:
    ignore = shutil.ignore_patterns(*_NOT_COPIED)
    shutil.copytree(EXTENSION, target, ignore=ignore)
    for name in _ENGINE:
        shutil.copytree(REPO / name, target / name, ignore=ignore)
    (target / COPY_MARK).write_text(json.dumps(_fingerprint()) + "\n", encoding="utf-8")


def _copied_from(target: Path) -> dict[str, str] | None:
    return _read_object(target / COPY_MARK)


def _fingerprint() -> dict[str, str]:
    """Return what a copy is made of: the checkout and a checksum of its files."""
    return {"source": str(REPO), "sha256": _digest(EXTENSION, REPO)}


def _digest(extension: Path, root: Path) -> str:
    """Compute a checksum of the files of an extension and of the engine in `root`."""
    digest = hashlib.sha256()
    engine = [root / name for name in _ENGINE]
    for folder in (extension, *engine):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            beside = folder == extension and name.parts[0] in (*_ENGINE, COPY_MARK)
            if path.is_file() and not beside and not _NOT_COPIED.intersection(name.parts):
                digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
