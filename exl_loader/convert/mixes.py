"""How a linear layer is stored: a mix of code widths, each with a size of its groups.

The rows of a layer are sorted by importance. The first rows get the widest codes. exllamav2's
conversion writes a mix as the keys `bits`, `bits_prop`, `group_size` and `scale_bits`, and these
files keep its form, so that its measurements can be read here and ours there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..formats.exl2 import COLUMN_PADDING
from ..utils.integers import ceil_div, round_up

# Bits of a column's scale in a group.
SCALE_BITS = 4
# In the file of a group: q_scale_max has 16 bits, q_groups has two times 16.
_GROUP_BITS = 16 + 2 * 16
# In the file of an input channel: q_invperm.
_CHANNEL_BITS = 32


class Group(NamedTuple):
    """Rows of a layer that share a width and a scale for each column."""

    bits: int
    rows: int


@dataclass(frozen=True)
class Mix:
    """A way to store a layer.

    Args:
        bits: widths in falling order.
        group_sizes: rows of a group of each width, multiples of 32.
        shares: share of the rows that get each width; they add up to 1.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)

    def groups(self, in_features: int) -> list[Group]:
        """Cut the rows of a layer into groups. Shares are rounded up to whole groups."""
        left, found = in_features, []
        for bits, size, share in zip(self.bits, self.group_sizes, self.shares, strict=True):
            for _ in range(math.ceil(min(in_features * share, left) / size)):
                found.append(Group(bits, min(size, left)))
                left -= found[-1].rows
        assert left == 0, (self, in_features)
        return found

    def stored_bits(self, in_features: int, out_features: int) -> int:
        """Return the bits of a layer's tensors in the file, with tables and padding."""
        groups = self.groups(in_features)
        words = sum(ceil_div(group.rows * group.bits, 32) for group in groups)
        per_column = 32 * words + SCALE_BITS * len(groups)
        columns = round_up(out_features, COLUMN_PADDING)
        return per_column * columns + len(groups) * _GROUP_BITS + in_features * _CHANNEL_BITS

    def as_dict(self) -> dict[str, Any]:
        """Return the mix in exllamav2's form."""
        sizes = zip(self.bits, self.group_sizes, strict=True)
        return {
            "group_size": {str(bits): size for bits, size in sizes},
            "bits": list(self.bits),
            "bits_prop": list(self.shares),
            "scale_bits": SCALE_BITS,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Mix:
        """Read a mix in exllamav2's form."""
        bits = tuple(values["bits"])
        sizes = tuple(values["group_size"][str(width)] for width in bits)
        return cls(bits, sizes, tuple(values["bits_prop"]))

    def __str__(self) -> str:
        widths = zip(self.bits, self.group_sizes, self.shares, strict=True)
        return " + ".join(f"{share:g} x {bits}b g{size}" for bits, size, share in widths)
