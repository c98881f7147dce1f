"""Where built kernels are kept: a folder per user, entries that are whole or not there.

An entry is the directory `<spec.directory_name>` with what was built (`spec.artifacts`) and a
marker that was written last and holds the files' sizes and SHA-256. It appears by one rename,
so that a killed build leaves none; an entry of which a file was damaged later does not match
its marker, and counts as not built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import KernelBuildError
from .spec import BuildSpec

MARKER = "complete.json"

_SCANNER_PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)


def kernel_dirs(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Name the folders that may hold built kernels, first choice first; creates nothing.

    `EXL_LOADER_CACHE_DIR` alone where it is set. Otherwise the user's cache folder, where the
    user has one, and for machines where that cannot be written a folder of this user's own
    among temporary files.

    Raises:
        KernelBuildError: `EXL_LOADER_CACHE_DIR` names the home folder of a user without one.
    """
    chosen = environ.get("EXL_LOADER_CACHE_DIR", "").strip()
    if chosen:
        return [_expand(chosen).absolute() / "kernels"]
    from platformdirs import user_cache_path

    user = os.getuid() if hasattr(os, "getuid") else "user"
    folders = [Path(tempfile.gettempdir()) / f"exl_loader-{user}"]
    try:
        cache = user_cache_path("exl_loader", appauthor=False)
    except RuntimeError:
        # A container's user may be a number without a home.
        return folders
    # Older releases of platformdirs leave "~" standing there, or a relative XDG_CACHE_HOME.
    return [cache / "kernels", *folders] if cache.is_absolute() else folders


def _expand(chosen: str) -> Path:
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise KernelBuildError(
            f"EXL_LOADER_CACHE_DIR is set to {chosen!r}",
            expected="a folder",
            actual="a user whose home folder is not known",
            remedy="Name the folder without ~",
        ) from None


@dataclass(frozen=True)
class Entry:
    """A finished build, as its marker describes it."""

    directory: Path
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files that were built."""
        return sum(path.stat().st_size for path in self.files)


def find_entry(spec: BuildSpec, environ: Mapping[str, str] = os.environ) -> Entry | None:
    """Find the finished build of a spec, verified against its marker.

    Returns:
        The entry, or None where it has to be built.
    """
    for directory in kernel_dirs(environ):
        if _is_private(directory):
            entry = verify(directory / spec.directory_name)
            if entry is not None:
                return entry
    return None


def find_built(spec: BuildSpec, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Like `find_entry`, for a spec whose build is one library: that library's path."""
    entry = find_entry(spec, environ)
    return None if entry is None else entry.directory / spec.library_name


def writable_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Create, with mode 0700, the first of `kernel_dirs` that can be written.

    Raises:
        KernelBuildError: none can be.
    """
    reasons = []
    for directory in kernel_dirs(environ):
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            reasons.append(f"{directory}: {error.strerror or error}")
            continue
        if not _is_private(directory):
            reasons.append(f"{directory}: belongs to somebody else, or is no folder")
        elif not os.access(directory, os.W_OK | os.X_OK):
            reasons.append(f"{directory}: not writable")
        else:
            return directory
    raise KernelBuildError(
        "folder for compiled kernels",
        expected="one that this user can write",
        actual="; ".join(reasons),
        remedy="Set EXL_LOADER_CACHE_DIR to a folder of yours",
    )


def _is_private(directory: Path) -> bool:
    """Whether a folder is this user's own and nobody else can write it.

    A library that is opened runs with all rights of this process. A folder of ours that is
    open to others is closed again.
    """
    try:
        status = directory.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "getuid"):
        return True
    if status.st_uid != os.getuid():
        return False
    if status.st_mode & 0o077:
        try:
            directory.chmod(0o700)
        except OSError:
            # On a disk that cannot be written; what others may only read is no danger.
            return not status.st_mode & 0o022
    return True


def verify(directory: Path) -> Entry | None:
    """Check an entry's files against its marker: present, of the size, of the SHA-256."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        files = {directory / name: described for name, described in marker["files"].items()}
        for path, described in files.items():
            if _describe(path) != described:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(directory, tuple(files)) if files else None


def _describe(path: Path) -> dict[str, int | str]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def seal(directory: Path, *names: str) -> None:
    """Bring files to the disk and write the marker that makes their directory an entry."""
    for name in names:
        _sync(directory / name)
    path = directory / MARKER
    marker = {"files": {name: _describe(directory / name) for name in names}}
    path.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    _sync(path)
    _sync(directory)


def publish(partial: Path, target: Path) -> Entry:
    """Turn a sealed directory into the entry `target` by one rename.

    A damaged entry in the way is replaced. Where another process was faster, its entry stays.

    Returns:
        The entry.
    """
    if target.exists() and verify(target) is None:
        broken = target.with_name(f"{target.name}.broken-{os.getpid()}")
        target.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        _rename(partial, target)
        _sync(target.parent)
    except OSError:
        if verify(target) is None:
            raise
    entry = verify(target)
    if entry is None:
        raise KernelBuildError(
            f"compiled kernels in {target}",
            actual="changed while they were being stored",
            remedy="Check the disk, or set EXL_LOADER_CACHE_DIR to a folder on another one",
        )
    return entry


def _rename(folder: Path, target: Path) -> None:
    """Rename a folder. On Windows a virus scanner may have a file in it open for a moment."""
    for pause_s in _SCANNER_PAUSES_S if os.name == "nt" else ():
        try:
            folder.rename(target)
            return
        except PermissionError:
            time.sleep(pause_s)
    folder.rename(target)


def discard(built: Path) -> None:
    """Remove the entry that a file belongs to, as a whole or not at all.

    Raises:
        KernelBuildError: a program uses it, on Windows, where what is in use stays.
    """
    entry = built.parent
    # Of a name that the next build clears away, should something of it stay.
    unwanted = entry.with_name(f"{entry.name}.partial-left-{os.getpid()}")
    try:
        _rename(entry, unwanted)
    except OSError as error:
        raise KernelBuildError(
            f"compiled kernels in {entry}",
            actual=f"cannot be removed: {error.strerror or error}",
            remedy="End the programs that use them, and try again",
        ) from error
    shutil.rmtree(unwanted, ignore_errors=True)


def list_built(environ: Mapping[str, str] = os.environ) -> list[Entry]:
    """List all verified entries, for people."""
    found = []
    for directory in kernel_dirs(environ):
        if _is_private(directory):
            found += [verify(entry.parent) for entry in sorted(directory.glob(f"*/{MARKER}"))]
    return [entry for entry in found if entry is not None]


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a folder to flush.
    flags = os.O_RDONLY if os.name != "nt" else os.O_RDWR
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
