"""The folder of compiled kernels: one directory for each build, which is complete or absent.

An entry is the directory `<spec.directory_name>` with the built files (`spec.artifacts`) and a
marker, which is written last and holds the files' sizes and SHA-256. A build happens in a private
directory and becomes an entry by one rename, so a killed build leaves no entry. An entry with a
damaged file does not match its marker and counts as not built; the same holds for files that a
power failure lost, so nothing is forced to the disk.

Whoever can write in the folder can run code in this process. Therefore the folder, all folders
on the way to it, each entry and each file must belong to this user or root and must not be
writable by others (`ownership.py`). A file is hashed through the descriptor whose owner was
checked. Between the check and the opening of a library only this user and root can exchange it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.output import warn
from ...utils.system.files import has_owners, rename_folder
from . import ownership
from .spec import BuildSpec

MARKER = "complete.json"

# Markers name some twenty files.
_MAX_MARKER_BYTES = 1 << 16


def kernel_dirs(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Name the folders that may hold built kernels, first choice first; create nothing.

    With `EXL_LOADER_CACHE_DIR` that folder only. Otherwise the user's cache folder if the user
    has one, then this user's own folder among temporary files for machines on which the cache
    folder cannot be written.

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
        # A container's user may have a number and no home folder.
        return folders
    # Older releases of platformdirs return "~/.cache" or a relative XDG_CACHE_HOME as it is.
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
    """Find the verified library of a spec whose build is one library; None where there is none."""
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
                # Again, because another process may have created it first.
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
    """Return why others could put code into a folder of kernels; None where they cannot.

    A loaded library runs with all rights of this process. A folder of this user that others
    could write in may hold their files, so it is renamed and not read; a new one takes its
    place.
    """
    may_have_changed = False
    while (parent := ownership.find_open_parent(directory)) is not None:
        if not _make_sticky(parent):
            return f"others can exchange it, because they can write in {parent}"
        may_have_changed = True
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(status.st_mode) or not ownership.is_own(status):
        return "it belongs to another user, or is no folder"
    if not ownership.is_closed(status):
        may_have_changed = True
    if not has_owners() or status.st_uid != os.geteuid():
        return "others can write in it" if may_have_changed else None
    try:
        if may_have_changed:
            _put_aside(directory)
        elif status.st_mode & 0o077:
            directory.chmod(0o700)
    except FileNotFoundError:
        return None  # Another process of this user has put it aside.
    except OSError:
        # The disk may be read-only. That others can read the folder is no danger.
        return "others could write in it" if may_have_changed else None
    return None


def _make_sticky(folder: Path) -> bool:
    """Set the sticky bit of an open folder, so that others can exchange only their own files.

    Returns:
        Whether it is set. It cannot be in another user's folder, or on a disk without modes.
    """
    if not has_owners():
        return False
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        folder.chmod(stat.S_IMODE(status.st_mode) | stat.S_ISVTX)
        if not folder.lstat().st_mode & stat.S_ISVTX:
            return False
    except OSError:
        return False
    warn(
        f"Other users could exchange files in {folder}, compiled kernels among them. The folder "
        "got the sticky bit (chmod +t)."
    )
    return True


def _put_aside(directory: Path) -> None:
    """Rename a folder in which others may have put code. Nothing in it is removed.

    Raises:
        OSError: it cannot be renamed.
    """
    aside = directory.with_name(f"{directory.name}.distrusted-{uuid.uuid4().hex}")
    directory.rename(aside)
    warn(
        f"Others could write in the folder of compiled kernels {directory}. It is {aside} now "
        "and not used any more. Kernels are compiled again."
    )


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def verify(directory: Path, artifacts: Collection[str] | None = None) -> Entry | None:
    """Check that only this user or root can have written an entry, and that its marker is true.

    Args:
        directory: the entry.
        artifacts: exactly the files that it must have; any where None.

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
    """Write the marker that makes a directory with these files an entry."""
    for name in names:
        _close_to_others(directory / name)
    path = directory / MARKER
    marker = {"files": {name: _describe(directory / name) for name in names}}
    path.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    _close_to_others(path)


def _close_to_others(path: Path) -> None:
    """Let only the owner write a file; with a umask of 002 its group could as well."""
    if has_owners():
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)


def private_prefix(target: Path) -> str:
    """Return how the names of all private directories of an entry begin."""
    return f"{target.name}.partial-"


def remove_private(target: Path) -> None:
    """Remove an entry's private directories. The caller holds the lock, so no build uses them."""
    for path in target.parent.glob(f"{private_prefix(target)}*"):
        _remove(path)


def publish(private: Path, target: Path) -> Entry:
    """Turn a sealed directory into the entry `target` by one rename.

    A damaged entry is replaced. If another process published the same build first, its entry
    stays.

    Returns:
        The entry.

    Raises:
        KernelBuildError: the entry does not match its marker after the rename.
        OSError: the directory cannot be renamed.
    """
    if os.path.lexists(target) and verify(target) is None:
        _remove_entry(target)
    try:
        rename_folder(private, target)
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


def _remove_entry(target: Path) -> None:
    """Remove an entry, or what has its name, after a rename, so that no process reads half of it.

    Raises:
        OSError: it cannot be renamed.
    """
    # The next build removes what cannot be removed now.
    unwanted = target.with_name(f"{private_prefix(target)}{uuid.uuid4().hex}")
    rename_folder(target, unwanted)
    _remove(unwanted)


def discard(built: Path) -> None:
    """Remove the whole entry that a file belongs to.

    Raises:
        KernelBuildError: a program uses it. On Windows a file in use cannot be removed.
    """
    entry = built.parent
    try:
        _remove_entry(entry)
    except OSError as error:
        raise KernelBuildError(
            f"compiled kernels in {entry}",
            actual=f"cannot be removed: {error.strerror or error}",
            remedy="End the programs that use them, and try again",
        ) from error


def list_built(environ: Mapping[str, str] = os.environ) -> list[Entry]:
    """List all verified entries of all folders of `kernel_dirs`."""
    found = []
    for directory in kernel_dirs(environ):
        if directory.is_dir() and _why_unsafe(directory) is None:
            found += [verify(entry.parent) for entry in sorted(directory.glob(f"*/{MARKER}"))]
    return [entry for entry in found if entry is not None]
