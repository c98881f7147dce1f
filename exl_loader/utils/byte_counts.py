"""Byte counts as people write and read them: `24GiB`, `1.5 GB`, `18.5 MiB`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import InvalidSettings, shown

if TYPE_CHECKING:
    from fractions import Fraction

GIB = 1 << 30
MIB = 1 << 20

# The largest size of a file or a buffer.
MAX_BYTES = (1 << 63) - 1

# A smaller number without a unit means GiB or MiB: no card has more MiB than this.
LEAST_BARE_BYTES = 1 << 18

_BYTES = re.compile(
    r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*(?:([KMGT])(iB|B)?|B)?\s*", re.IGNORECASE | re.ASCII
)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(value: int | str, setting: str) -> int:
    """Read a byte count: an int, or text such as `24GiB`, `24G`, `1.5 GB` or `8589934592`.

    KiB, MiB, GiB (and K, M, G) are powers of 1024; KB, MB, GB are powers of 1000. Small numbers
    without a unit are refused, because `24` is meant to be 24 GiB.

    Args:
        value: the count.
        setting: the name of the setting, for the error.

    Raises:
        InvalidSettings: it is no positive byte count, or its unit is missing.
    """
    least = 1
    count: int | Fraction
    if isinstance(value, int) and not isinstance(value, bool):
        count = value if value <= MAX_BYTES else 0
    else:
        match = _BYTES.fullmatch(value) if isinstance(value, str) else None
        count = _scaled(*match.groups(default="")) if match else 0
        if match and match[0].rstrip()[-1].isdigit():
            least = LEAST_BARE_BYTES
    if not least <= count <= MAX_BYTES:
        raise InvalidSettings(
            setting, expected="a number of bytes such as 24GiB", actual=shown(value)
        )
    return int(count)


def _scaled(number: str, unit: str, suffix: str) -> Fraction:
    from fractions import Fraction

    base = 1000 if suffix.upper() == "B" else 1024
    return Fraction(number) * base ** _POWERS[unit.upper()]


def amount(nbytes: int) -> str:
    """Write bytes as a person reads them: `3.21 GiB`, `18.5 MiB`, `640 bytes`."""
    if abs(nbytes) >= GIB:
        return f"{nbytes / GIB:.2f} GiB"
    if abs(nbytes) >= MIB // 10:
        return f"{nbytes / MIB:.1f} MiB"
    return f"{nbytes} byte" if abs(nbytes) == 1 else f"{nbytes} bytes"
