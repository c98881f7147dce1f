"""Invalid values for settings, as faulty clients send them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class Unprintable:
    """An object whose `repr` fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def odd_values() -> list[Any]:
    """Return numbers, texts, lists and objects that no setting accepts; some are random."""
    return [
        None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 10**5000, -(10**5000),
        0.5, -1.5, 1e300, -1e300, 5e-324, 4e38, float("nan"), float("inf"), -float("inf"), 1j,
        "", "5", "nan", "1e999", "9" * 5000, "x", "\ud800", "a\udfffb", "a\0b", "\x1b[2J",
        "[" * 100_000, '{"a": 1e999}', "x" * 100_000,
        b"", b"x", bytearray(b"5"), [], [None], [True], [1.5], ["\ud800"], [10**5000], [[[[1]]]],
        {}, {5: 10**5000}, {"5": float("nan")}, {"5": 1e300}, {1: 2}, {1, 2}, (), range(5),
        list(range(10_000)), [[]] * 10_000,
        np.int64(5), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([1, 2]),
        np.zeros((2, 2)), np.zeros(0), torch.tensor(3), torch.tensor([1, 2]), torch.tensor(0.5),
        object(), Unprintable(), Ellipsis, int, lambda: 0, iter([1]),
        random.randrange(-(1 << 70), 1 << 70), random.uniform(-1e9, 1e9),
        "".join(chr(random.randrange(0x110000)) for _ in range(20)),
    ]
