"""Read files that come from outside, within bounds. All code of this project opens them here.

A model folder is downloaded, and a person may type any path. There may be a named pipe, on which
`open()` waits forever, a device such as /dev/zero, which has no end, or a file of many
gigabytes. Only regular files and links to them are read, and no more bytes than the kind of file
can need.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from .byte_counts import MIB
from .errors import ExlLoaderError, InvalidConfig, ModelNotFound, shown

# Limits by kind of file, in bytes. Real ones: config.json a few KiB, with quantisation settings
# of a mixture of experts up to 2 MiB; an index up to 15 MiB; tokenizer.json up to 40 MiB;
# tokenizer.model up to 8 MiB; chat templates up to 100 KiB.
JSON_BYTES = 16 * MIB
INDEX_BYTES = 64 * MIB
TOKENIZER_BYTES = 256 * MIB
SENTENCEPIECE_BYTES = 64 * MIB
TEMPLATE_BYTES = 4 * MIB
# A text to evaluate, to calibrate on, or to continue.
TEXT_BYTES = 64 * MIB
# Files that this project or a web UI has written: markers, records, settings.
SETTINGS_BYTES = 16 * MIB

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_REMEDY = "Download this file again"


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return whether anything exists at a path.

    Unlike `Path.is_file` this is true of what cannot be read, such as a named pipe or a broken
    link. So an optional file that is broken is not treated as absent.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def open_regular(
    path: str | os.PathLike[str],
    *,
    error: type[ExlLoaderError] = InvalidConfig,
    missing: type[ExlLoaderError] = ModelNotFound,
    remedy: str = _REMEDY,
) -> BinaryIO:
    """Open a regular file for reading, unbuffered. It never waits, whatever the path names.

    Args:
        path: path of the file, or of a link to it.
        error: type of the exception where the file cannot be opened.
        missing: type of the exception where there is no file.
        remedy: what the user can do about it.
    """
    name = os.fspath(path)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    try:
        # The kind is checked before opening, because opening a device can have side effects, and
        # again afterwards, because another file may have been put in its place.
        _check_kind(name, os.stat(name), error, remedy)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        handle = os.open(name, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        actual = "a link that leads nowhere" if os.path.islink(name) else "none"
        raise missing(name, expected="a file", actual=actual, remedy=remedy) from None
    except (OSError, ValueError) as cause:
        # ValueError: a name with a NUL character, or with a lone surrogate.
        raise _unreadable(name, cause, error) from None
    try:
        _check_kind(name, os.fstat(handle), error, remedy)
        return open(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def read_bytes(
    path: str | os.PathLike[str],
    limit: int,
    *,
    error: type[ExlLoaderError] = InvalidConfig,
    missing: type[ExlLoaderError] = ModelNotFound,
    remedy: str = _REMEDY,
) -> bytes:
    """Read a whole regular file.

    Args:
        path: path of the file, or of a link to it.
        limit: most bytes that it may have.
        error: type of the exception where it cannot be read, is no regular file, is larger than
            `limit`, or was written to during reading.
        missing: type of the exception where there is no file.
        remedy: what the user can do about it.
    """
    with open_regular(path, error=error, missing=missing, remedy=remedy) as file:
        try:
            before = os.fstat(file.fileno())
            if before.st_size > limit:
                raise _too_large(path, before.st_size, limit, error, remedy)
            data = bytearray()
            # A file that grows, or one of /proc, has more bytes than its reported size.
            while len(data) <= limit:
                piece = file.read(min(limit + 1 - len(data), MIB))
                if not piece:
                    break
                data += piece
            after = os.fstat(file.fileno())
        except OSError as cause:
            raise _unreadable(str(path), cause, error) from None
    if len(data) > limit:
        raise _too_large(path, len(data), limit, error, remedy)
    changed = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
    if changed or (before.st_size and len(data) != before.st_size):
        raise error(
            str(path), expected=f"{before.st_size} bytes", actual="another size or content: it "
            "was written to while it was read", remedy="Try again when nothing writes to it",
        )
    return bytes(data)


def read_text(
    path: str | os.PathLike[str],
    limit: int,
    *,
    error: type[ExlLoaderError] = InvalidConfig,
    missing: type[ExlLoaderError] = ModelNotFound,
    remedy: str = _REMEDY,
) -> str:
    """Read a whole UTF-8 file; a byte order mark is removed and lines end in `\\n`.

    Args:
        path, limit, error, missing, remedy: see `read_bytes`.
    """
    data = read_bytes(path, limit, error=error, missing=missing, remedy=remedy)
    try:
        text = decode_utf8(data)
    except ValueError as cause:
        raise error(
            str(path), expected="a UTF-8 text file", actual=str(cause), remedy=remedy
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 and remove a byte order mark, which some Windows editors write.

    Raises:
        ValueError: the bytes are not UTF-8. UTF-16 is named, because Windows' shells write it.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        byte = data[cause.start] if cause.start < len(data) else 0
        raise ValueError(f"byte 0x{byte:02x} at offset {cause.start} is not UTF-8") from None


def _check_kind(
    name: str, status: os.stat_result, error: type[ExlLoaderError], remedy: str
) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "something else")
        raise error(name, expected="a regular file", actual=kind, remedy=remedy)


def _unreadable(
    name: str, cause: OSError | ValueError, error: type[ExlLoaderError]
) -> ExlLoaderError:
    actual = cause.strerror if isinstance(cause, OSError) else None
    return error(
        name if name.isprintable() else shown(name), expected="a readable file",
        actual=actual or str(cause), remedy="Check what it is and who may read it",
    )


def _too_large(
    path: str | os.PathLike[str], nbytes: int, limit: int,
    error: type[ExlLoaderError], remedy: str,
) -> ExlLoaderError:
    return error(
        str(path), expected=f"a file of at most {limit >> 20} MiB" if limit >= MIB else
        f"a file of at most {limit} bytes",
        actual=f"one of {nbytes} bytes" if nbytes > limit + 1 else "a larger one",
        remedy=remedy,
    )
