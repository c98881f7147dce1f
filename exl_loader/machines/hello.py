"""What a machine says about itself before it may join: version, sources, numbers, rank."""

from __future__ import annotations

import functools
import hashlib
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..utils.errors import MachineRefused, printable, shown

# The type in which hidden states travel. All machines compute with it, so bits stay the same.
HIDDEN_DTYPE = "float32"

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".c"}


@functools.cache
def sources_digest() -> str:
    """Return a digest of the package's Python and kernel sources.

    Two machines compute the same bits only with the same sources. The version does not tell two
    checkouts apart.
    """
    # An installed package has the kernels' sources inside, a checkout beside.
    inside = _PACKAGE / "csrc"
    roots = [(_PACKAGE, "exl_loader"), (inside if inside.is_dir() else _PACKAGE.parent / "csrc",
                                        "csrc")]
    digest = hashlib.sha256()
    for root, name in roots:
        files = [
            path for path in root.rglob("*") if path.suffix in _SUFFIXES
            and not (name == "exl_loader" and path.is_relative_to(inside))
        ]
        for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
            # Git may write other line ends on Windows.
            content = path.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{name}/{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Hello:
    """A machine, as it introduces itself.

    Attributes:
        rank, world_size: as it was started; the first machine has rank 0 and may not know how
            many there are (0).
        host: its name. process: tells two processes of one machine apart.
        version, sources, byteorder, dtype: what must be the same on all machines.
    """

    rank: int
    world_size: int
    host: str
    process: str
    version: str
    sources: str
    byteorder: str
    dtype: str

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"machine {self.rank} ({self.host})"

    def fields(self) -> dict[str, Any]:
        """Return the values as JSON carries them."""
        return asdict(self)


def own_hello(rank: int, world_size: int, process: str) -> Hello:
    """Introduce this machine."""
    return Hello(
        rank, world_size, socket.gethostname(), process, __version__, sources_digest(),
        sys.byteorder, HIDDEN_DTYPE,
    )


def read_hello(value: Any) -> Hello:
    """Read another machine's introduction.

    Raises:
        MachineRefused: it is none that this version understands.
    """
    types = {name: str for name in Hello.__annotations__} | {"rank": int, "world_size": int}
    known = value if isinstance(value, Mapping) else {}
    if not all(type(known.get(name)) is types[name] for name in types):
        raise MachineRefused(
            "a machine that wants to join", expected="what this version of exl_loader says",
            actual=shown(value, 200), remedy=f"Install version {__version__} on all machines",
        )
    values: dict[str, Any] = {
        name: known[name] if types[name] is int else printable(known[name][:200])
        for name in types
    }
    return Hello(**values)


# What must be equal -> what it is called, and the remedy.
_EQUAL = {
    "version": ("exl_loader's version", "Install the same version on all machines"),
    "sources": (
        "the digest of exl_loader's sources",
        "Check out the same commit on all machines, without local changes",
    ),
    "byteorder": ("the byte order", "Use machines with the same byte order"),
    "dtype": ("the type of hidden states", "Install the same version on all machines"),
}


def check_hello(other: Hello, own: Hello) -> None:
    """Compare what must be equal.

    Raises:
        MachineRefused: something differs; the first difference is named.
    """
    for key, (what, remedy) in _EQUAL.items():
        expected, actual = getattr(own, key), getattr(other, key)
        if expected != actual:
            raise MachineRefused(
                f"{other.name}: {what}", expected=f"{expected} as on the first machine",
                actual=actual, remedy=remedy,
            )
