"""The compiled matrix products against their definitions.

Three comparisons: with the exact value of what the kernels define (activations in 15 bits),
within float32's summation error; with the unquantised product, within what 15 bits cost; and
with themselves: a row's result is the same bits whatever rows and threads go with it.
"""

from __future__ import annotations

import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu.linear import linear_scratch_bytes
from exl_loader.backends.reference.ops import ReferenceOps, dense_weight
from support.kernel_cases import (
    MAX_THREADS,
    compiled_ops,
    dense_linear,
    packed_linear,
    quantised_product,
    random_rows,
    scratch_for,
)

ROWS = [1, 2, 3, 5, 8, 9, 17, 64, 130]
HALF_ULP = 2.0**-24

LAYOUTS = {
    **{f"{bits}bit": [(bits, 128), (bits, 128)] for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 32": [(4, 32)] * 5,
    "falling widths": [(8, 32), (6, 64), (5, 128), (4, 160), (3, 64), (2, 32)],
    "ragged last group": [(6, 64), (4, 100)],
    "one long group": [(4, 1000)],
    "several chunks": [(3, 4096), (2, 512)],
    "tiny": [(8, 5)],
}


@pytest.fixture
def ops():
    ops = compiled_ops()
    before = ops.set_threads(2)
    yield ops
    ops.set_threads(before)


def product(ops, x, w, *, add_to=None, columns=0):
    """Multiply into a wider view, so that writing outside the columns would show."""
    marker = 12345.0
    wide = torch.full((len(x), w.out_features + 7 + columns), marker)
    if add_to is not None:
        wide[:, : w.out_features] = add_to
    ops.linear(x, w, wide[:, : w.out_features + columns], scratch_for(len(x), w.in_features),
               add_to is not None)
    assert (wide[:, w.out_features :] == marker).all()
    return wide[:, : w.out_features].contiguous()


def assert_exact(ops, x, w, roundings_of_a_term=2):
    """Compare with the definition.

    A term is rounded as scale * x_scale, as the integer turned into a float32, and in each of
    the sums after it; every rounding is at most half an ulp of the magnitudes' sum.
    """
    exact, magnitude = quantised_product(x, w)
    spans = sum(-(-rows // 128) for rows in w.groups[:, 2].tolist())
    bound = (spans + roundings_of_a_term) * HALF_ULP * magnitude + 1e-30
    difference = np.abs(product(ops, x, w).double().numpy() - exact)
    assert (difference <= bound).all(), (difference / bound).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
def test_packed_product_is_its_definition(ops, layout, rows):
    plain = packed_linear(LAYOUTS[layout], 50)
    assert_exact(ops, random_rows(rows, plain.in_features), plain)
    full = packed_linear(LAYOUTS[layout], 80, zeros=True, perm=True, bias=True, seed=rows)
    assert_exact(ops, random_rows(rows, full.in_features), full)


@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 32, 33, 200])
def test_every_number_of_columns(ops, out_features):
    w = packed_linear([(4, 64)], out_features, bias=True)
    for rows in (1, 4, 20):
        assert_exact(ops, random_rows(rows, 64), w)
        product(ops, random_rows(rows, 64), w, columns=3)


def test_fresh_data(ops):
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = np.random.default_rng(seed)
    widths = np.sort(rng.choice([2, 3, 4, 5, 6, 8], size=4))[::-1]
    groups = [(int(b), int(rng.choice([32, 64, 128]))) for b in widths]
    groups.append((int(widths[-1]), int(rng.integers(1, 128))))
    w = packed_linear(groups, int(rng.integers(1, 300)), seed=seed, zeros=True, perm=True)
    assert_exact(ops, random_rows(int(rng.integers(1, 40)), w.in_features, seed), w)


def test_quantised_activations_cost_nothing_to_speak_of(ops):
    # A step is 2.7 deviations / 16256 (the largest of 128 normal numbers), its rounding error
    # 1 / sqrt(12) of that: 5e-5. The definition of GPTQ's weights has no rounding beside it.
    w = packed_linear([(4, 128)] * 8, 512, perm=True, zeros=True)
    x = torch.randn(17, w.in_features, generator=torch.Generator().manual_seed(5))
    exact = torch.empty(17, 512)
    ReferenceOps().linear(x, w, exact, torch.empty(0))
    error = (product(ops, x, w) - exact).norm() / exact.norm()
    assert error < 7e-5


@pytest.mark.parametrize("rows", [3, 40])
def test_add(ops, rows):
    w = packed_linear([(5, 96)], 40, bias=True)
    x, before = random_rows(rows, 96), random_rows(rows, 40, seed=9)
    assert torch.equal(product(ops, x, w, add_to=before), before + product(ops, x, w))


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_rows_do_not_depend_on_company_or_threads(ops, kind):
    if kind == "packed":
        w = packed_linear([(8, 64), (5, 128), (3, 320), (2, 40)], 140, zeros=True, perm=True)
    else:
        w = dense_linear(552, 140, torch.float16, bias=True)
    x = random_rows(300, w.in_features)
    ops.set_threads(1)
    whole = product(ops, x, w)
    for threads in range(1, MAX_THREADS + 1):
        assert ops.set_threads(threads) == threads
        assert torch.equal(product(ops, x, w), whole)
        for first, end in ((0, 1), (7, 9), (20, 23), (30, 35), (100, 108), (111, 130)):
            assert torch.equal(product(ops, x[first:end].clone(), w), whole[first:end])


def test_faulty_activations_show_in_their_own_row_alone(ops):
    w = packed_linear([(4, 128), (4, 128)], 32)
    x = random_rows(20, 256)
    whole = product(ops, x, w)
    x[3, 200], x[11, 5], x[12, 6] = float("nan"), float("inf"), float("-inf")
    for rows in (slice(0, 20), slice(3, 4), slice(11, 13)):
        out = product(ops, x[rows].clone(), w)
        bad = ~x[rows].isfinite().all(dim=1)
        assert out[bad].isnan().all() and torch.equal(out[~bad], whole[rows][~bad])


def test_zero_and_tiny_activations(ops):
    w = packed_linear([(4, 128), (4, 128)], 32)
    x = torch.zeros(4, 256)
    x[1, :128], x[2, 3], x[3, 200] = 1e-38, 1e-30, 3e38
    out = product(ops, x, w)
    assert (out[:2] == 0).all() and out[2].isfinite().all()
    assert_exact(ops, x[:3].clone(), w)


def test_scratch_that_is_too_short_is_refused(ops):
    for rows in (1, 8, 20):
        for w in (packed_linear([(4, 256)], 32), dense_linear(256, 32, torch.float32)):
            if rows == 1 and w.__class__.__name__ == "DenseLinear":
                continue
            out = torch.full((rows, 32), 7.0)
            with pytest.raises(AssertionError, match="scratch"):
                ops.linear(random_rows(rows, 256), w, out, torch.empty(100, dtype=torch.uint8))
            assert (out == 7.0).all()


def test_more_threads_than_scratch_has_room_for(ops, monkeypatch):
    """Another model that is loaded meanwhile may ask for more threads."""
    w, x = packed_linear([(4, 128)] * 4, 256), random_rows(40, 512)
    ops.set_threads(MAX_THREADS)
    expected = product(ops, x, w)
    monkeypatch.setenv("EXL_LOADER_THREADS", "1")
    nbytes, out = linear_scratch_bytes(40, 512), torch.empty(40, 256)
    memory = torch.full((nbytes + MAX_THREADS * nbytes,), 77, dtype=torch.uint8)
    for _ in range(10):
        ops.linear(x, w, out, memory[:nbytes])
        assert torch.equal(out, expected) and (memory[nbytes:] == 77).all()


def test_scratch_grows_with_rows_and_stops(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_THREADS", "2")
    sizes = [linear_scratch_bytes(rows, 4096) for rows in (1, 2, 64, 256, 512, 4096)]
    assert sizes == sorted(sizes) and sizes[-1] == sizes[-2] == sizes[-3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_dense_product(ops, dtype, rows):
    for in_features, out_features in ((300, 50), (64, 8), (33, 160)):
        w = dense_linear(in_features, out_features, dtype, bias=rows % 2 == 0)
        x = random_rows(rows, in_features)
        weight = dense_weight(w).double()
        exact, magnitude = x.double() @ weight, x.abs().double() @ weight.abs()
        if w.bias is not None:
            exact, magnitude = exact + w.bias, magnitude + w.bias.abs()
        difference = (product(ops, x, w).double() - exact).abs()
        # One rounding a step, each at most half an ulp of what is summed so far.
        assert (difference <= (in_features + 2) * HALF_ULP * magnitude).all()


def test_calls_from_several_threads(ops):
    layers = [packed_linear([(4, 128)] * 4, 256, seed=s, perm=True) for s in range(4)]
    x = random_rows(20, 512)
    expected = [product(ops, x, w) for w in layers]
    start = threading.Barrier(4)

    def many(i):
        start.wait()
        return all(torch.equal(product(ops, x, layers[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_its_own_threads(ops):
    w, x = packed_linear([(4, 128)] * 4, 256), random_rows(20, 512)
    scratch, out = scratch_for(20, 512), torch.empty(20, 256)
    expected = product(ops, x, w)
    child = os.fork()
    if child == 0:
        ops.linear(x, w, out, scratch)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(ops, x, w), expected)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_instruction_sets_agree(ops, march):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("instruction sets of x86-64")
    other = compiled_ops(march)
    other.set_threads(2)
    for layout in LAYOUTS.values():
        w = packed_linear(layout, 50, zeros=True, perm=True, bias=True)
        for rows in (1, 4, 7, 30):
            x = random_rows(rows, w.in_features)
            # Without fused multiply-add a term has one rounding more.
            assert_exact(other, x, w, roundings_of_a_term=3)
            if march == "x86-64-v3":
                assert torch.equal(product(other, x, w), product(ops, x, w))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w, x = dense_linear(100, 50, dtype), random_rows(9, 100)
        torch.testing.assert_close(product(other, x, w), product(ops, x, w), rtol=1e-5, atol=1e-5)
