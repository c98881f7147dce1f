"""Check that nobody but this user can change a folder or file from which code is loaded.

On POSIX systems a path is safe when this user or root owns it and everything on the way to it,
and no other user may write there. A sticky folder (`/tmp`) is safe although everybody may write
in it, because only the owner of a file can rename or remove the file.

Windows: every check here answers "safe". The user's cache folder lies under `%LOCALAPPDATA%`,
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
# As many as Linux follows.
_MAX_LINKS = 40
# NONBLOCK: opening a FIFO would otherwise wait for a writer.
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


class UnsafePath(OSError):
    """A file or folder could have been written by somebody else; the message says which."""


def is_own(status: os.stat_result) -> bool:
    """Whether this user or root owns a file or folder."""
    return not has_owners() or status.st_uid in (0, os.geteuid())


def is_closed(status: os.stat_result) -> bool:
    """Whether this user or root owns a file or folder, and nobody else may write it."""
    if not has_owners():
        return True
    return is_own(status) and not status.st_mode & _WRITABLE_BY_OTHERS


def find_open_parent(path: Path) -> Path | None:
    """Find a folder on the way to `path` in which somebody else could exchange what is there.

    Symbolic links are followed: the folders that hold them count as well. The path itself is
    not checked, and neither is what does not exist yet.

    Args:
        path: absolute.

    Returns:
        The outermost such folder (or a link that somebody else owns), or None.
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
    """Yield the folders and links that the system passes on its way to a folder."""
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
    """Whether a folder belongs to a user whom this container does not know.

    In a container without root's rights the system's own folders look as if they belonged to
    the overflow user. That user is nobody of the container where its number is not mapped.
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
    """Whether a group has this user alone, as most Linux systems give one to each user.

    There people's folders are writable for their group, because the group is only they.
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
    # With an access control list the group's bits stand for other users as well.
    names: list[str] = []
    if has_access_lists():
        with contextlib.suppress(OSError):
            names = os.listxattr(path)
    return set(group.gr_mem) <= {user.pw_name} and "system.posix_acl_access" not in names


def open_file(path: Path) -> int:
    """Open a regular file that nobody else can have written.

    What is checked is the opened file, which cannot be exchanged afterwards.

    Returns:
        A descriptor for reading; the caller closes it.

    Raises:
        UnsafePath: it is a link, no regular file, or others may write it.
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
