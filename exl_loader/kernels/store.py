"""Where built kernels are kept: a folder per user, entries that are whole or not there.

An entry is the directory `<spec.directory_name>` with the library and a marker that was
written last and holds the library's size and SHA-256. It appears by one rename, so that a
killed build leaves none; a library that was damaged later does not match its marker, and
counts as not built.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..errors import KernelBuildError
from .spec import BuildSpec

MARKER = "complete.json"


def kernel_dirs(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Name the folders that may hold built kernels, first choice first; creates nothing.

    `EXL_LOADER_CACHE_DIR` alone where it is set. Otherwise the user's cache folder, and for
    machines where that cannot be written a folder of this user's own among temporary files.
    """
    chosen = environ.get("EXL_LOADER_CACHE_DIR", "").strip()
    if chosen:
        return [Path(chosen).expanduser().absolute() / "kernels"]
    from platformdirs import user_cache_path

    user = os.getuid() if hasattr(os, "getuid") else "user"
    fallback = Path(tempfile.gettempdir()) / f"exl_loader-{user}"
    return [user_cache_path("exl_loader", appauthor=False) / "kernels", fallback]


def find_built(spec: BuildSpec, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Find the finished library of a spec, verified against its marker.

    Returns:
        The library's path, or None where it has to be built.
    """
    for directory in kernel_dirs(environ):
        if _is_private(directory):
            library = verify(directory / spec.directory_name)
            if library is not None:
                return library
    return None


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
        directory.chmod(0o700)
    return True


def verify(directory: Path) -> Path | None:
    """Check an entry's library against its marker: present, of the size, of the SHA-256."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        library = directory / marker["library"]
        data = library.read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(data) != marker.get("library_bytes"):
        return None
    return library if hashlib.sha256(data).hexdigest() == marker.get("sha256") else None


def seal(directory: Path, library_name: str) -> None:
    """Bring a library to the disk and write the marker that makes its directory an entry."""
    library = directory / library_name
    data = library.read_bytes()
    _sync(library)
    marker = {
        "library": library_name,
        "library_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    path = directory / MARKER
    path.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    _sync(path)
    _sync(directory)


def publish(partial: Path, target: Path) -> Path:
    """Turn a sealed directory into the entry `target` by one rename.

    A damaged entry in the way is replaced. Where another process was faster, its entry stays.

    Returns:
        The path of the entry's library.
    """
    if target.exists() and verify(target) is None:
        broken = target.with_name(f"{target.name}.broken-{os.getpid()}")
        target.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        partial.rename(target)
        _sync(target.parent)
    except OSError:
        if verify(target) is None:
            raise
    library = verify(target)
    if library is None:
        raise KernelBuildError(
            f"compiled kernels in {target}",
            actual="changed while they were being stored",
            remedy="Check the disk, or set EXL_LOADER_CACHE_DIR to a folder on another one",
        )
    return library


def discard(library: Path) -> None:
    """Remove the entry that a library belongs to, because it turned out to be unusable."""
    shutil.rmtree(library.parent, ignore_errors=True)


def list_built(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """List the verified libraries of all entries, for people."""
    found = []
    for directory in kernel_dirs(environ):
        if _is_private(directory):
            found += [verify(entry.parent) for entry in sorted(directory.glob(f"*/{MARKER}"))]
    return [library for library in found if library is not None]


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
