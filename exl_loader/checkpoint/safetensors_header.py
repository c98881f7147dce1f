"""Read and validate headers of safetensors files, without reading a weight.

A file is: 8 bytes little-endian header length, a JSON object of that length, then the data.
Each entry of the object is `name: {dtype, shape, data_offsets: [begin, end]}` with offsets
from the start of the data; `__metadata__` may map strings to strings. The data must be
covered from the first to the last byte, without gaps and without overlap.
Source of the rules: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..utils.errors import InvalidCheckpoint, shown
from ..utils.json_keys import InvalidJson, parse_json
from ..utils.untrusted_files import open_regular

# dtype in a file -> (PyTorch's name, bits). Types that this engine cannot use are listed too, so
# that an unused tensor does not prevent a model from loading.
DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6),
    "F4": ("float4", 4),
}

LENGTH_BYTES = 8
# The beginning of the text that git writes in place of a large file without git-lfs.
LFS_PREFIX = b"version https://git-lfs"[:LENGTH_BYTES]
# The limit of the safetensors library. The largest real headers have a few megabytes.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 40

DOWNLOAD_AGAIN = "Download the file again"


@dataclass(frozen=True)
class TensorHeader:
    """The header of one tensor.

    Args:
        name: the tensor's name.
        dtype: a key of `table.DTYPE_BYTES`, or the name of a dtype that this engine cannot use.
        shape: dimensions in elements, outermost first.
        path: the file.
        offset: bytes from the start of the file to the tensor.
        nbytes: bytes of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileIdentity:
    """Size and modification time, which change when a file is replaced or written to.

    Not the inode, because some network file systems give a file another one at every opening.
    """

    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity of a file by its `os.stat` result."""
        return cls(status.st_size, status.st_mtime_ns)


def invalid(path: Path, what: str, expected: object, actual: object) -> NoReturn:
    """Raise InvalidCheckpoint about a file."""
    raise InvalidCheckpoint(
        f"{path.name}: {what}", expected=expected, actual=actual, remedy=DOWNLOAD_AGAIN
    )


def read_header(path: Path) -> tuple[list[TensorHeader], FileIdentity]:
    """Read and validate the header of one safetensors file.

    Raises:
        InvalidCheckpoint: the file cannot be read or is truncated, or its header contradicts
            itself or the file.
    """
    try:
        with open_weights(path) as file:
            identity = FileIdentity.of(os.fstat(file.fileno()))
            text = _read_text(file, path, identity.nbytes)
    except OSError as error:
        raise InvalidCheckpoint(
            f"{path.name}: cannot be read",
            actual=error.strerror or error,
            remedy="Check that the file exists and is readable",
        ) from error
    data_start = LENGTH_BYTES + len(text)
    entries = _parse(path, text)
    headers = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    _check_cover(path, headers, data_start, identity.nbytes)
    return headers, identity


def open_weights(path: Path) -> BinaryIO:
    """Open a safetensors file, unbuffered.

    Raises:
        InvalidCheckpoint: there is no such file, or it is not a readable regular file.
    """
    return open_regular(path, error=InvalidCheckpoint, missing=InvalidCheckpoint,
                        remedy=DOWNLOAD_AGAIN)


def _read_text(file: Any, path: Path, file_bytes: int) -> bytes:
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        invalid(path, "file length", f"at least {LENGTH_BYTES} bytes", f"{file_bytes} bytes")
    (header_bytes,) = struct.unpack("<Q", prefix)
    room = min(file_bytes - LENGTH_BYTES, MAX_HEADER_BYTES)
    if prefix == LFS_PREFIX:
        raise InvalidCheckpoint(
            f"{path.name}", expected="the weights", actual="a Git LFS pointer in their place",
            remedy="Run git lfs pull in the folder, or download the file itself",
        )
    if not 2 <= header_bytes <= room:
        invalid(path, "header length", f"2 to {room} bytes", f"{header_bytes} bytes")
    text = file.read(header_bytes)
    if len(text) != header_bytes:
        invalid(path, "header", f"{header_bytes} bytes", f"{len(text)} bytes (truncated)")
    return text


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = parse_json(text, distinct=True)
    except InvalidJson as error:
        invalid(path, "header", "a JSON object with distinct names", str(error)[:200])
    if not isinstance(entries, dict):
        invalid(path, "header", "a JSON object", type(entries).__name__)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        invalid(path, "header's __metadata__", "a JSON object", type(metadata).__name__)
    return entries


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    if not isinstance(entry, dict):
        invalid(path, f"header of {shown(name)}", "a JSON object", shown(entry))
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in DTYPES:
        invalid(path, f"dtype of {shown(name)}", f"one of {', '.join(DTYPES)}", shown(code))
    dtype, bits = DTYPES[code]
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape)
    ):
        expected = f"at most {MAX_DIMENSIONS} integers from 0 to 2^40"
        invalid(path, f"shape of {shown(name)}", expected, shown(shape))
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        expected = "two integers that are not negative"
        invalid(path, f"data_offsets of {shown(name)}", expected, shown(offsets))
    begin, end = offsets
    nbits = math.prod(shape) * bits
    if nbits % 8 or end - begin != nbits // 8:
        expected = f"{nbits / 8:g} for {code} {shape}"
        invalid(path, f"bytes of {shown(name)}", expected, end - begin)
    return TensorHeader(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _check_cover(path: Path, headers: list[TensorHeader], start: int, file_bytes: int) -> None:
    position = start
    for header in sorted(headers, key=lambda h: (h.offset, h.nbytes)):
        if header.offset != position:
            kind = "a gap" if header.offset > position else "an overlap"
            actual = f"byte {header.offset} ({kind})"
            invalid(path, f"start of {shown(header.name)}", f"byte {position}", actual)
        position += header.nbytes
    if position != file_bytes:
        kind = "truncated" if file_bytes < position else "data that no tensor owns"
        invalid(path, "file length", f"{position} bytes", f"{file_bytes} bytes ({kind})")
