"""Check that only this user can change a folder or file from which code is loaded.

On POSIX systems a path is safe if this user or root owns it and every folder on the way to it,
and no other user may write in any of them. A sticky folder (`/tmp`) is safe although everybody
may write in it, because only the owner of a file can rename or remove the file.

Windows: every check here answers "safe". The user's cache folder is under `%LOCALAPPDATA%`,
which only the user, administrators and the system may write, and Python since 3.12.4 (also
3.11.10 and 3.10.15) creates a folder of mode 0o700 for the user and administrators alone. Where
`EXL_LOADER_CACHE_DIR` names a folder that already lets others write, they can plant code there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ...utils.system.files import has_access_lists, has_owners

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Linux follows as many symbolic links.
_MAX_LINKS = 40
# NONBLOCK, because opening a FIFO would otherwise wait for a writer.
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


class UnsafePath(OSError):
    """Another user may have written a file or folder; the message names it."""


def is_own(status: os.stat_result) -> bool:
    """Return whether this user or root owns a file or folder."""
    return not has_owners() or status.st_uid in (0, os.geteuid())


def is_closed(status: os.stat_result) -> bool:
    """Return whether this user or root owns a file or folder, and no other user may write it."""
    if not has_owners():
        return True
    return is_own(status) and not status.st_mode & _WRITABLE_BY_OTHERS


def find_open_parent(path: Path) -> Path | None:
    """Find a folder on the way to `path` in which another user could exchange files.

    Symbolic links are followed, and the folders that contain them are checked as well. The path
    itself and folders that do not exist yet are not checked.

    Args:
        path: absolute.

    Returns:
        The outermost such folder (or a link of another user), or None.
    """
    if not has_owners():
        return None
    for step in _steps_to(path.parent):
        try:
            status = step.lstat()
        except OSError:
            return None
        if not (is_own(status) or _is_outside_namespace(status)):
            return step
        if stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX:
            continue
        if status.st_mode & stat.S_IWOTH:
            return step
        if status.st_mode & stat.S_IWGRP and not _is_private_group(step, status.st_gid):
            return step
    return None


def _steps_to(path: Path) -> Iterator[Path]:
    """Yield the folders and links that the system resolves on its way to a folder."""
    current = Path(path.anchor)
    pending = list(reversed(path.parts[1:]))
    links = 0
    yield current
    while pending:
        part = pending.pop()
        if part == "..":
            current = current.parent
            continue
        step = current / part
        yield step
        try:
            target = Path(os.readlink(step))
        except OSError:
            current = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return
        if target.is_absolute():
            current = Path(target.anchor)
            pending += reversed(target.parts[1:])
        else:
            pending += reversed(target.parts)


def _is_outside_namespace(status: os.stat_result) -> bool:
    """Return whether a folder's owner is a user outside this container.

    In a container without root's rights the system's own folders seem to belong to the overflow
    user. If the container's map of users does not have that number, no user inside it has it.
    """
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_bytes())
        ranges = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return False
    if status.st_uid != overflow:
        return False
    mapped = [tuple(map(int, line.split())) for line in ranges]
    return not any(first <= overflow < first + count for first, _, count in mapped)


def _is_private_group(path: Path, gid: int) -> bool:
    """Return whether a group has no member but this user.

    Most Linux systems give each user such a group, and folders are writable for it by default.
    """
    if not has_owners():
        return False
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    if group.gr_gid != user.pw_gid or group.gr_name != user.pw_name:
        return False
    # With an access control list the group's bits also apply to other users.
    names: list[str] = []
    if has_access_lists():
        with contextlib.suppress(OSError):
            names = os.listxattr(path)
    return set(group.gr_mem) <= {user.pw_name} and "system.posix_acl_access" not in names


def open_file(path: Path) -> int:
    """Open a regular file that only this user or root can have written.

    The opened file is checked, so another file cannot take its place after the check.

    Returns:
        A descriptor for reading; the caller closes it.

    Raises:
        UnsafePath: it is no regular file, or others may write it.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafePath(f"{path} is no regular file")
        if not is_closed(status):
            raise UnsafePath(f"{path} can be written by others")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
