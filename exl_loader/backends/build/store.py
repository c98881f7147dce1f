"""Where built kernels are kept: a folder per user, entries that are whole or not there.

An entry is the directory `<spec.directory_name>` with what was built (`spec.artifacts`) and a
marker that was written last and holds the files' sizes and SHA-256. It appears by one rename,
so that a killed build leaves none; an entry of which a file was damaged later does not match
its marker, and counts as not built.

Whoever can write in the folder can run code in this process. So the folder, all folders on the
way to it, each entry and each file must belong to this user or root and must not be writable
by others (`ownership.py`). A file is hashed by the descriptor whose owner was checked. Between
the check and the opening of a library only this user and root could exchange it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.output import warn
from ...utils.system.files import has_owners, rename_folder, sync
from . import ownership
from .spec import BuildSpec

MARKER = "complete.json"

# Markers name some twenty files.
_MAX_MARKER_BYTES = 1 << 16
# What builds leave in a folder of kernels: entries, unfinished ones, locks and heartbeats.
_ENTRY_NAME = re.compile(r"(cpu|cuda_sm_\w+)-[0-9a-f]{16}(\..*)?$", re.DOTALL)




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
        if directory.is_dir() and _why_unsafe(directory) is None:
            entry = verify(directory / spec.directory_name, spec.artifacts)
            if entry is not None:
                return entry
    return None


def find_built(spec: BuildSpec, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Like `find_entry`, for a spec whose build is one library: that library's path."""
    entry = find_entry(spec, environ)
    return None if entry is None else entry.directory / spec.library_name


def writable_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Create, with mode 0700, the first of `kernel_dirs` that is safe and can be written.

    Raises:
        KernelBuildError: none can be.
    """
    reasons: list[str] = []
    for directory in kernel_dirs(environ):
        try:
            reason = _why_unsafe(directory)
            if reason is None:
                _make_folder(directory)
                # Again: the folder may have been there before, or be somebody else's by now.
                reason = _why_unsafe(directory)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is None and not os.access(directory, os.W_OK | os.X_OK):
            reason = "not writable"
        if reason is None:
            if reasons:
                warn(f"Compiled kernels are kept in {directory}, because {reasons[0]}")
            return directory
        reasons.append(f"{directory}: {reason}")
    raise KernelBuildError(
        "folder for compiled kernels",
        expected="one that this user can write, and nobody else",
        actual="; ".join(reasons),
        remedy="Set EXL_LOADER_CACHE_DIR to a folder of yours that others cannot write",
    )


def _make_folder(directory: Path) -> None:
    """Create a folder and its missing parents, for this user alone whatever the umask is."""
    if not directory.parent.is_dir():
        _make_folder(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)


def _why_unsafe(directory: Path) -> str | None:
    """Say why others could put code into a folder of kernels; None where they cannot.

    A library that is opened runs with all rights of this process. A folder of this user's that
    was open to others is closed and emptied first, because others may have written in it while
    it was open.
    """
    distrusted = False
    while (parent := ownership.find_open_parent(directory)) is not None:
        if not _make_sticky(parent):
            return f"others can exchange it, because they can write in {parent}"
        distrusted = True
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode) or not ownership.is_own(status):
        return "belongs to somebody else, or is no folder"
    if not has_owners() or status.st_uid != os.geteuid():
        return None if ownership.is_closed(status) else "can be written by others"
    distrusted = distrusted or not ownership.is_closed(status)
    if status.st_mode & 0o077:
        try:
            directory.chmod(0o700)
        except OSError:
            # On a disk that cannot be written. That others may read is no danger.
            return "belongs to somebody else, or can be written by others" if distrusted else None
    if distrusted:
        _empty(directory)
    return None


def _make_sticky(folder: Path) -> bool:
    """Set the sticky bit of an open folder, so that others can only exchange what is theirs.

    Returns:
        Whether it is set; it cannot be in a folder that is not this user's.
    """
    if not has_owners():
        return False
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        folder.chmod(stat.S_IMODE(status.st_mode) | stat.S_ISVTX)
    except OSError:
        return False
    warn(
        f"Other users could exchange what lies in {folder}, compiled kernels among it. The "
        "folder got the sticky bit (chmod +t)."
    )
    return True


def _empty(directory: Path) -> None:
    """Put aside all that a folder of kernels holds, and remove what are kernels.

    Raises:
        OSError: something cannot be put aside.
    """
    names = os.listdir(directory)
    if not names:
        return
    aside = directory / f"distrusted-{uuid.uuid4().hex}"
    aside.mkdir(mode=0o700)
    for number, name in enumerate(names):
        unwanted = aside / name
        try:
            (directory / name).rename(unwanted)
        except OSError:
            # A folder of somebody else's can be renamed, but not moved.
            unwanted = aside.with_name(f"{aside.name}.{number}")
            (directory / name).rename(unwanted)
        # Anything else in a folder of this name is no work of ours, and people may miss it.
        if _ENTRY_NAME.match(name):
            _remove(unwanted)
    with contextlib.suppress(OSError):
        aside.rmdir()
    left = [path.name for path in directory.iterdir() if path.name.startswith("distrusted-")]
    kept = f" What is no kernel, or could not be removed, is there as {sorted(left)[:3]}."
    warn(
        f"Others could write in the folder of compiled kernels {directory}. It was closed and "
        f"emptied, and kernels are compiled anew.{kept if left else ''}"
    )


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def verify(directory: Path, artifacts: Collection[str] | None = None) -> Entry | None:
    """Check an entry: that nobody else can have written it, and its files against its marker.

    Args:
        artifacts: the files that it must have, no more and no less; any where None.

    Returns:
        The entry, or None where it is missing, damaged or not safe to open.
    """
    try:
        status = directory.lstat()
        if not (stat.S_ISDIR(status.st_mode) and ownership.is_closed(status)):
            return None
        marker = json.loads(_read_marker(directory / MARKER))
        files = {directory / name: described for name, described in marker["files"].items()}
        if not files or any(path.parent != directory for path in files):
            return None
        if artifacts is not None and {path.name for path in files} != set(artifacts):
            return None
        for path, described in files.items():
            if _describe(path) != described:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Entry(directory, tuple(files))


def _read_marker(path: Path) -> bytes:
    with open(ownership.open_file(path), "rb") as file:
        data = file.read(_MAX_MARKER_BYTES + 1)
    if len(data) > _MAX_MARKER_BYTES:
        raise ValueError(f"{path} has more than {_MAX_MARKER_BYTES} bytes")
    return data


def _describe(path: Path) -> dict[str, int | str]:
    """Describe a file as the marker does: its size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with open(ownership.open_file(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def seal(directory: Path, *names: str) -> None:
    """Bring files to the disk and write the marker that makes their directory an entry."""
    for name in names:
        _close_to_others(directory / name)
        sync(directory / name)
    path = directory / MARKER
    marker = {"files": {name: _describe(directory / name) for name in names}}
    path.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    _close_to_others(path)
    sync(path)
    sync(directory)


def _close_to_others(path: Path) -> None:
    """Take the right to write a file from others, which a umask of 002 gives to a group."""
    if has_owners():
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def publish(partial: Path, target: Path) -> Entry:
    """Turn a sealed directory into the entry `target` by one rename.

    A damaged entry in the way is replaced. Where another process was faster, its entry stays.

    Returns:
        The entry.
    """
    if os.path.lexists(target) and verify(target) is None:
        broken = target.with_name(f"{target.name}.broken-{os.getpid()}")
        target.rename(broken)
        _remove(broken)
    try:
        rename_folder(partial, target)
        sync(target.parent)
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


def discard(built: Path) -> None:
    """Remove the entry that a file belongs to, as a whole or not at all.

    Raises:
        KernelBuildError: a program uses it, on Windows, where what is in use stays.
    """
    entry = built.parent
    # Of a name that the next build clears away, should something of it stay.
    unwanted = entry.with_name(f"{entry.name}.partial-left-{os.getpid()}")
    try:
        rename_folder(entry, unwanted)
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
        if directory.is_dir() and _why_unsafe(directory) is None:
            found += [verify(entry.parent) for entry in sorted(directory.glob(f"*/{MARKER}"))]
    return [entry for entry in found if entry is not None]
