"""What small operations must do on every device, beside `ReferenceOps`."""

from __future__ import annotations

import math
from typing import Any

import torch

from exl_loader.backends.reference.ops import ReferenceOps
from support.kernel_cases import random_rows

REFERENCE = ReferenceOps()
ULP = 2.0**-23


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float = 0.0):
    torch.testing.assert_close(actual, expected, rtol=ulps * ULP, atol=atol)


def check_gate_at_the_extremes(ops: Any, activation: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 200.0, -200.0, 1e30, -1e30, float("nan"), 3e-39]])
    out, expected = torch.empty_like(gate), torch.empty_like(gate)
    ops.gate(gate, torch.ones_like(gate), activation, out)
    REFERENCE.gate(gate, torch.ones_like(gate), activation, expected)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def check_add_and_softcap(ops: Any, size: int) -> None:
    x, y = random_rows(7, size), random_rows(7, size, seed=4)
    total = x.clone()
    ops.add(total, y)
    assert torch.equal(total, x + y)
    for magnitude in (1e-6, 1.0, 1e4):
        capped, expected = x * magnitude, x * magnitude
        ops.softcap(capped, 30.0)
        REFERENCE.softcap(expected, 30.0)
        assert_close(capped, expected, ulps=6)


def check_moe_route_survives_nan(ops: Any) -> None:
    logits = torch.full((2, 4), math.nan)
    logits[1, 2] = 1.0
    weights, experts = torch.empty(2, 2), torch.empty(2, 2, dtype=torch.int32)
    ops.moe_route(logits, 2, True, weights, experts)
    assert weights.isnan().any(dim=1).all()
    assert ((experts >= 0) & (experts < 4)).all()
