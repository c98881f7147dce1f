"""Embedding, RMS norms, RoPE, activations, sums and rows against the reference in float64.

CUDA's sizes are below, at and above a warp and a block; the CPU's are around its vectors.
"""

from __future__ import annotations

import math

import pytest
import torch

from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.kernel_structs import ACTIVATIONS, GATES
from exl_loader.backends.reference.ops import ReferenceOps
from support.kernel_cases import dense_linear, random_rows
from support.targets import ALL_TARGETS, emulated_launcher, sizes, target

REFERENCE = ReferenceOps()
ULP = 2.0**-23
CPU_SIZES = [1, 15, 16, 17, 64, 100, 2049]
# A CPU's threads share the rows.
ROWS = {"cpu": 33, "cuda": 9}


@pytest.fixture(params=ALL_TARGETS)
def ops(request):
    return target(request.param, MoeOps)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float = 0.0):
    torch.testing.assert_close(actual, expected, rtol=ulps * ULP, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [70, 256, 300])
def test_embed(ops, dtype, size):
    ids = torch.tensor([3, 0, 49, 17, 3], dtype=torch.int32)
    for table in (random_rows(50, size).to(dtype), dense_linear(size, 50, dtype)):
        out, expected = torch.empty(5, size), torch.empty(5, size)
        ops.embed(ids, table, 1.5, out)
        REFERENCE.embed(ids, table, 1.5, expected)
        assert torch.equal(out, expected)


@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 32, 33, 100, 512, 513, 1300])
def test_rms_norm(ops, size):
    x, weight = random_rows(ROWS[ops.kind], size), random_rows(1, size, seed=2)[0]
    out, expected = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(x, weight, 1e-5, out)
    REFERENCE.rms_norm(x, weight, 1e-5, expected)
    # The CPU has 64 chains: a square's rounding and size / 64 + 6 sums, halved by the root. CUDA
    # rounds in the sums of lanes and warps as well.
    assert_close(out, expected, ulps={"cpu": 4, "cuda": 6}[ops.kind] + size / 128)
    alone = torch.empty(1, size)
    ops.rms_norm(x[5:6], weight, 1e-5, alone)
    assert torch.equal(alone[0], out[5])
    ops.rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, out)


def assert_like_reference_s_table(ops, positions, inv_freq, factor):
    """Compare a table of cosines and sines, and return the reference's."""
    table, expected = torch.empty(2, len(positions), 2, len(inv_freq))
    ops.rope_table(positions, inv_freq, factor, table)
    REFERENCE.rope_table(positions, inv_freq, factor, expected)
    # A CPU computes angles, cosines and sines in float64.
    ulps, atol = {"cpu": (1, 1e-15), "cuda": (2, ULP)}[ops.kind]
    assert_close(table, expected, ulps, atol)
    return expected


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [4, 16, 32, 40, 64])
def test_rope(ops, half, interleaved):
    positions = torch.tensor([0, 1, 4095, 131071, 999_999, 2**31 - 1], dtype=torch.int32)
    inv_freq = (10000.0 ** (-torch.arange(half) / half)).float()
    table = assert_like_reference_s_table(ops, positions, inv_freq, 1.25)
    for head_dim in (2 * half, 2 * half + 24):
        x = random_rows(6, 3 * head_dim).reshape(6, 3, head_dim)
        rotated, reference = x.clone(), x.clone()
        ops.rope(rotated, table, interleaved)
        REFERENCE.rope(reference, table, interleaved)
        assert_close(rotated, reference, ulps=2, atol=4 * ULP * float(x.abs().max()))
        assert torch.equal(rotated[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(8, 4), (64, 32), (80, 40), (104, 40), (65, 3)])
def test_rope_subtracts_a_mean_first(ops, head_dim, half, interleaved):
    """The same bits as subtracting before the call, in turned elements and in the others."""
    x = random_rows(5, 3 * head_dim).reshape(5, 3, head_dim)
    mean = 20 * random_rows(3, head_dim, seed=2)
    table = random_rows(5, 2 * half, seed=3).reshape(5, 2, half)
    at_once, apart = x.clone(), x - mean
    ops.rope(at_once, table, interleaved, mean)
    ops.rope(apart, table, interleaved)
    assert torch.equal(at_once, apart) and not torch.equal(at_once, x)


@pytest.mark.parametrize("turn", range(8))
def test_angles_of_every_quarter_turn(ops, turn):
    """Positions that end in each quarter and at its borders, with both signs of both results."""
    angles = (turn * math.pi / 4 + torch.linspace(-0.02, 0.02, 65)).clamp(min=0).float()
    assert_like_reference_s_table(ops, torch.ones(1, dtype=torch.int32), angles, 1.0)


@pytest.mark.parametrize("activation", GATES)
@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_gate(ops, activation, size):
    gate, up = random_rows(9, size) * 4, random_rows(9, size, seed=3) * 4
    out, expected = torch.empty_like(gate), torch.empty_like(gate)
    ops.gate(gate, up, activation, out)
    REFERENCE.gate(gate, up, activation, expected)
    assert_close(out, expected, ulps=32, atol=1e-7)
    alone = torch.empty(1, size)
    ops.gate(gate[3:4], up[3:4], activation, alone)
    assert torch.equal(alone[0], out[3])
    ops.gate(gate, up, activation, gate)
    assert torch.equal(gate, out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_activate(ops, activation, size):
    x = random_rows(9, size) * 4
    out, gated = torch.empty_like(x), torch.empty_like(x)
    ops.activate(x, activation, out)
    ops.gate(x, torch.ones_like(x), activation, gated)
    assert torch.equal(out, gated)
    ops.activate(x, activation, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("activation", GATES)
def test_gate_at_the_extremes(ops, activation):
    gate = torch.tensor([[0.0, -0.0, 200.0, -200.0, 1e30, -1e30, float("nan"), 3e-39]])
    out, expected = torch.empty_like(gate), torch.empty_like(gate)
    ops.gate(gate, torch.ones_like(gate), activation, out)
    REFERENCE.gate(gate, torch.ones_like(gate), activation, expected)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_clamped_swiglu_clamps_the_gate_above_and_the_other_factor_on_both_sides(ops):
    limits = [-1e30, -7.5, -7.0, -1.0, 0.0, 6.5, 7.0, 7.5, 1e30, float("nan")]
    gate, up = (part.flatten().contiguous()[None] for part in torch.meshgrid(
        torch.tensor(limits), torch.tensor(limits), indexing="ij"))
    out, exact = torch.empty_like(gate), gate.double()
    ops.gate(gate, up, "clamped_swiglu", out)
    exact = torch.where(exact > 7, 7.0, exact)
    factor = torch.where(up > 7, 7.0, torch.where(up < -7, -7.0, up.double())) + 1
    expected = (exact / (1 + (-1.702 * exact).exp()) * factor).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_add_and_softcap(ops, size):
    x, y = random_rows(7, size), random_rows(7, size, seed=4)
    total = x.clone()
    ops.add(total, y)
    assert torch.equal(total, x + y)
    for magnitude in (1e-6, 1.0, 1e4):
        capped, expected = x * magnitude, x * magnitude
        ops.softcap(capped, 30.0)
        REFERENCE.softcap(expected, 30.0)
        assert_close(capped, expected, ulps=6)


@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_add_with_a_factor(ops, size):
    x, y = random_rows(7, size), random_rows(7, size, seed=4)
    total, expected = x.clone(), x.clone()
    ops.add(total, y, 0.22)
    REFERENCE.add(expected, y, 0.22)
    # The factor is rounded to float32, and so may be the product.
    assert_close(total, expected, ulps=1, atol=ULP * float(y.abs().max()))


@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_clamp(ops, size):
    x = random_rows(7, size) * 3
    x[0, 0], x[1, 0], x[2, 0] = math.nan, math.inf, -math.inf
    expected = x.clamp(-1.5, 1.5)
    ops.clamp(x, 1.5)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


@sizes("size", cpu=CPU_SIZES, cuda=[1, 31, 257])
def test_add_gated_rows(ops, size):
    x, y = random_rows(7, size), random_rows(7, size, seed=4)
    logits = torch.tensor([0.0, 1.5, -1.5, 30.0, -30.0, 200.0, -200.0])
    total, expected = x.clone(), x.clone()
    ops.add_gated_rows(total, y, logits)
    REFERENCE.add_gated_rows(expected, y, logits)
    assert_close(total, expected, ulps=2, atol=2 * ULP * float(y.abs().max()))
    alone = x[1:2].clone()
    ops.add_gated_rows(alone, y[1:2].clone(), logits[1:2].clone())
    assert torch.equal(alone[0], total[1])


def test_gather_and_scatter(ops):
    x, rows = random_rows(20, 270), torch.tensor([3, 19, 0, 7], dtype=torch.int32)
    out = torch.empty(4, 270)
    ops.gather_rows(x, rows, out)
    assert torch.equal(out, x[rows.long()])
    weights = torch.tensor([0.5, 2.0, -1.0, 0.25])
    total = random_rows(20, 270, seed=8)
    expected = total.clone()
    ops.scatter_add_rows(out, rows, weights, total)
    REFERENCE.scatter_add_rows(out, rows, weights, expected)
    assert_close(total, expected, ulps=1, atol=ULP * float(out.abs().max()) * 2)


def call_with_no_rows(ops):
    """Call operations on tensors without a row; return rows that none of them may change."""
    empty, no_rows = torch.empty(0, 40), torch.empty(0, dtype=torch.int32)
    rows = random_rows(3, 40)
    ops.rms_norm(empty, torch.ones(40), 1e-5, empty)
    ops.layer_norm(empty, torch.ones(1, 40), None, 1e-5, empty)
    ops.add(empty, empty)
    ops.add_gated_rows(empty, empty, torch.empty(0))
    ops.clamp(empty, 1.0)
    ops.activate(empty, "relu", empty)
    ops.gather_rows(rows, no_rows, empty)
    ops.scatter_add_rows(empty, no_rows, torch.empty(0), rows)
    return rows


def test_no_rows_are_no_work(ops):
    """Addresses of empty tensors are null, so that work would end the process."""
    assert torch.equal(call_with_no_rows(ops), random_rows(3, 40))


def test_no_rows_are_no_launch():
    """A card refuses a launch without a block."""
    launches: list = []
    call_with_no_rows(MoeOps(emulated_launcher(), launches.append))
    assert launches == []
