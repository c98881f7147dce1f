"""The compiled small operations against the reference, which computes in float64."""

from __future__ import annotations

import weakref

import pytest
import torch

from exl_loader.backends.cpu.threads import default_threads
from exl_loader.backends.recorder import Embed, Product, RmsNorm
from exl_loader.utils.errors import InvalidSettings
from support.elementwise_cases import (
    REFERENCE,
    ULP,
    assert_close,
    check_add_and_softcap,
    check_gate_at_the_extremes,
    check_moe_route_survives_nan,
)
from support.kernel_cases import compiled_ops, dense_linear, random_rows

SIZES = [1, 15, 16, 17, 64, 100, 2049]


@pytest.fixture(params=["native", pytest.param("x86-64-v3", marks=pytest.mark.slow),
                        pytest.param("x86-64", marks=pytest.mark.slow)])
def ops(request):
    ops = compiled_ops("" if request.param == "native" else request.param)
    ops.set_threads(3)
    return ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embed(ops, dtype):
    ids = torch.tensor([3, 0, 49, 17, 3], dtype=torch.int32)
    for table in (random_rows(50, 70).to(dtype), dense_linear(70, 50, dtype)):
        out, expected = torch.empty(5, 70), torch.empty(5, 70)
        ops.embed(ids, table, 1.5, out)
        REFERENCE.embed(ids, table, 1.5, expected)
        assert torch.equal(out, expected)


def test_embed_refuses_ids_beyond_the_table(ops):
    out = torch.full((2, 8), 7.0)
    for table in (random_rows(50, 8), dense_linear(8, 50, torch.float16)):
        for wrong in (50, -1):
            with pytest.raises(AssertionError, match="token id"):
                ops.embed(torch.tensor([1, wrong], dtype=torch.int32), table, 1.0, out)
    assert (out == 7.0).all()


def test_every_half_is_read_as_torch_reads_it(ops):
    halves = torch.arange(65536).to(torch.int32).short().view(torch.float16).reshape(256, 256)
    out = torch.empty(256, 256)
    ops.embed(torch.arange(256).int(), halves, 1.0, out)
    expected = halves.float()
    assert torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops, size):
    x, weight = random_rows(33, size), random_rows(1, size, seed=2)[0]
    out, expected = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(x, weight, 1e-5, out)
    REFERENCE.rms_norm(x, weight, 1e-5, expected)
    # 64 chains: a square's rounding and size / 64 + 6 sums, halved by the root.
    assert_close(out, expected, ulps=4 + size / 128)
    alone = torch.empty(1, size)
    ops.rms_norm(x[5:6], weight, 1e-5, alone)
    assert torch.equal(alone[0], out[5])
    ops.rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("half", [4, 16, 40, 64])
def test_rope(ops, half):
    positions = torch.tensor([0, 1, 4095, 131071, 999_999], dtype=torch.int32)
    inv_freq = (10000.0 ** (-torch.arange(half) / half)).float()
    table, expected = torch.empty(5, 2, half), torch.empty(5, 2, half)
    ops.rope_table(positions, inv_freq, 1.25, table)
    REFERENCE.rope_table(positions, inv_freq, 1.25, expected)
    assert_close(table, expected, ulps=1, atol=1e-15)
    for head_dim in (2 * half, 2 * half + 24):
        x = random_rows(5, 3 * head_dim).reshape(5, 3, head_dim)
        rotated, reference = x.clone(), x.clone()
        ops.rope(rotated, table)
        REFERENCE.rope(reference, table)
        assert_close(rotated, reference, ulps=2, atol=4 * ULP * float(x.abs().max()))
        assert torch.equal(rotated[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("size", SIZES)
def test_gate(ops, activation, size):
    gate, up = random_rows(9, size) * 4, random_rows(9, size, seed=3)
    out, expected = torch.empty_like(gate), torch.empty_like(gate)
    ops.gate(gate, up, activation, out)
    REFERENCE.gate(gate, up, activation, expected)
    assert_close(out, expected, ulps=32, atol=1e-7)
    alone = torch.empty(1, size)
    ops.gate(gate[3:4], up[3:4], activation, alone)
    assert torch.equal(alone[0], out[3])
    ops.gate(gate, up, activation, gate)
    assert torch.equal(gate, out)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gate_at_the_extremes(ops, activation):
    check_gate_at_the_extremes(ops, activation)


@pytest.mark.parametrize("size", SIZES)
def test_add_and_softcap(ops, size):
    check_add_and_softcap(ops, size)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (3, 3), (1, 1)])
def test_moe_route(ops, normalize, num_experts, top_k):
    logits = random_rows(40, num_experts) * 3
    logits[0] = 1.0
    logits[1, num_experts // 2] = logits[1, 0]
    logits[2] += 1e4
    weights, experts = torch.empty(40, top_k), torch.empty(40, top_k, dtype=torch.int32)
    expected = torch.empty_like(weights), torch.empty_like(experts)
    ops.moe_route(logits, top_k, normalize, weights, experts)
    REFERENCE.moe_route(logits, top_k, normalize, *expected)
    assert torch.equal(experts, expected[1])
    assert_close(weights, expected[0], ulps=2)


def test_moe_route_survives_nan(ops):
    check_moe_route_survives_nan(ops)


def test_gather_and_scatter(ops):
    x, rows = random_rows(20, 70), torch.tensor([3, 19, 0, 7], dtype=torch.int32)
    out = torch.empty(4, 70)
    ops.gather_rows(x, rows, out)
    assert torch.equal(out, x[rows.long()])
    weights = torch.tensor([0.5, 2.0, -1.0, 0.25])
    target = random_rows(20, 70, seed=8)
    expected = target.clone()
    ops.scatter_add_rows(out, rows, weights, target)
    REFERENCE.scatter_add_rows(out, rows, weights, expected)
    assert_close(target, expected, ulps=1, atol=ULP * float(out.abs().max()) * 2)
    for wrong in (20, -1):
        bad = torch.tensor([0, 0, 0, wrong], dtype=torch.int32)
        with pytest.raises(AssertionError, match="row beyond"):
            ops.gather_rows(x, bad, out)
        with pytest.raises(AssertionError, match="row beyond"):
            ops.scatter_add_rows(out, bad, weights, target)


def test_threads_setting(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_THREADS", "3")
    assert default_threads() == 3
    for wrong in ("0", "many", "-1", "100000"):
        monkeypatch.setenv("EXL_LOADER_THREADS", wrong)
        with pytest.raises(InvalidSettings, match="EXL_LOADER_THREADS"):
            default_threads()
    monkeypatch.delenv("EXL_LOADER_THREADS")
    assert default_threads() >= 1


def test_a_prepared_call_reads_the_values_of_its_replay(ops):
    x, weight, out = random_rows(2, 64), torch.ones(64), torch.empty(2, 64)
    (call,) = ops.prepare([RmsNorm(x, weight, 1e-5, out)])
    for seed in (5, 6):
        x.copy_(random_rows(2, 64, seed))
        call()
        expected = torch.empty(2, 64)
        ops.rms_norm(x, weight, 1e-5, expected)
        assert torch.equal(out, expected)


def test_a_prepared_call_keeps_its_tensors_alive(ops):
    w, x, out = dense_linear(32, 48, torch.float32), random_rows(1, 32), torch.empty(1, 48)
    expected = torch.empty(1, 48)
    ops.linear(x, w, expected, torch.empty(4096, dtype=torch.uint8))
    scratch = torch.empty(4096, dtype=torch.uint8)
    alive = [weakref.ref(tensor) for tensor in (w.weight, x, scratch)]
    (call,) = ops.prepare([Product(x, w, out, scratch, False)])
    del w, x, scratch
    assert all(tensor() is not None for tensor in alive)
    call()
    assert torch.equal(out, expected)
    del call
    assert all(tensor() is None for tensor in alive)


def test_a_prepared_call_that_fails_raises(ops):
    ids, table, out = torch.tensor([3], dtype=torch.int32), random_rows(4, 8), torch.empty(1, 8)
    (call,) = ops.prepare([Embed(ids, table, 1.0, out)])
    call()
    ids.fill_(4)
    with pytest.raises(AssertionError, match="token id"):
        call()
