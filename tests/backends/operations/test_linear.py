"""Products with quantised layers against their definitions, on CPUs and on CUDA.

Three comparisons: with the exact value of what the kernels define (activations in 15 bits),
within float32's summation error; with the unquantised product, within what 15 bits cost; and
with themselves: a row's result is the same bits whatever rows go with it.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from exl_loader.backends.cuda.layout import StreamLinear
from exl_loader.backends.cuda.pack import dequantize
from exl_loader.backends.reference.ops import ReferenceOps
from support.kernel_cases import packed_linear, random_rows
from support.linear_cases import (
    assert_exact,
    layer_of_values,
    linear_ops,
    product,
    stream_linear,
)
from support.targets import TARGETS, sizes, target

NATIVE = ["native"]
# Groups as (bits, rows).
LAYOUTS = {
    **{f"{bits}bit": [(bits, 128), (bits, 128)] for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 32": [(4, 32)] * 5,
    "falling widths": [(8, 32), (6, 64), (5, 128), (4, 160), (3, 64), (2, 32)],
    "ragged last group": [(6, 64), (4, 100)],
    "one long group": [(4, 1000)],
    "several chunks or row blocks of a split": None,
    "tiny": [(8, 5)],
}
LONG = {"cpu": [(3, 4096), (2, 512)], "cuda": [(3, 2048), (2, 512)]}
MIXED_GROUPS = [(8, 64), (5, 128), (3, 320), (2, 40)]


@pytest.fixture(params=[*NATIVE, *TARGETS])
def ops(request):
    return target(request.param, linear_ops, threads=2)


def layer_for(ops, groups, out_features, **options):
    """Return a random layer in the layout of the target's kernels."""
    make = {"cpu": packed_linear, "cuda": stream_linear}[ops.kind]
    return make(groups, out_features, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@sizes("rows", cpus=NATIVE, cpu=[1, 2, 3, 5, 8, 9, 14, 48, 64, 130],
       cuda=[1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 32, 33, 40, 130])
def test_quantised_product_equals_its_definition(ops, layout, rows):
    groups = LAYOUTS[layout] or LONG[ops.kind]
    plain = layer_for(ops, groups, 50)
    assert_exact(ops, random_rows(rows, plain.in_features), plain)
    full = layer_for(ops, groups, 80, zeros=True, perm=True, bias=True, seed=rows)
    assert_exact(ops, random_rows(rows, full.in_features), full)


@sizes("out_features", cpus=NATIVE, cpu=[1, 15, 16, 17, 32, 33, 200],
       cuda=[1, 31, 32, 33, 64, 129, 300])
def test_every_number_of_columns(ops, out_features):
    w = layer_for(ops, [(4, 64)], out_features, bias=True)
    for rows in {"cpu": (1, 4, 20), "cuda": (1, 6, 40)}[ops.kind]:
        assert_exact(ops, random_rows(rows, 64), w)
        product(ops, random_rows(rows, 64), w, columns=3)


UNITS = [2**-24, 2**-17, 6e-6, 1.2e-3, 0.77, 255.5, -0.031]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_scale_of_four_bits_is_the_float16_of_the_quantiser(ops, rows):
    """Every level with units of every size, also where the scale is subnormal.

    The input is 16256 in one channel, which is quantised without rounding, and codes are one
    above the zero point: the product is 16256 times the scale, exactly.
    """
    groups = [(4, 32)] * len(UNITS)
    units = np.array(UNITS, np.float16)
    levels = np.tile(np.arange(16, dtype=np.uint8), (len(UNITS), 3))
    codes = np.full((32 * len(UNITS), 48), 9, np.uint8)
    w = layer_of_values(ops, groups, codes, levels, units)
    squares = ((levels.astype(np.float16) + 1) ** 2).astype(np.float16)
    scales = squares * units[:, None]
    assert scales.dtype == np.float16
    for group in range(len(UNITS)):
        x = torch.zeros(rows, w.in_features)
        x[:, 32 * group + 5] = 16256
        expected = torch.from_numpy(scales[group].astype(np.float32) * 16256)
        assert torch.equal(product(ops, x, w), expected.expand(rows, -1))


def test_fresh_data(ops):
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = np.random.default_rng(seed)
    widths = np.sort(rng.choice([2, 3, 4, 5, 6, 8], size=6))[::-1]
    groups = [(int(b), int(rng.choice([32, 64, 96, 128]))) for b in widths]
    groups.append((int(widths[-1]), int(rng.integers(1, 128))))
    w = layer_for(ops, groups, int(rng.integers(1, 300)), seed=seed, zeros=True, perm=True)
    assert_exact(ops, random_rows(int(rng.integers(1, 90)), w.in_features, seed), w)


@pytest.mark.parametrize("rows", [3, 40])
def test_quantised_activations_lose_little_accuracy(ops, rows):
    # A step is 2.7 deviations / 16256 (the largest of 128 normal numbers), its rounding error
    # 1 / sqrt(12) of that: 5e-5. GPTQ's weights are not rounded otherwise. EXL2's are rounded to
    # float16 by definition, which the exact product leaves out.
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(5))
    for zeros, bound in ((True, 7e-5), (False, 5e-4)):
        w = layer_for(ops, [(4, 128)] * 8, 200, perm=True, zeros=zeros)
        if isinstance(w, StreamLinear):
            exact = x.double() @ dequantize(w).double()
        else:
            exact = torch.empty(rows, 200)
            ReferenceOps().linear(x, w, exact, torch.empty(0))
        assert (product(ops, x, w) - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("rows", [3, 40])
def test_add(ops, rows):
    w = layer_for(ops, [(5, 96)], 40, bias=True)
    x, before = random_rows(rows, 96), random_rows(rows, 40, seed=9)
    assert torch.equal(product(ops, x, w, add_to=before), before + product(ops, x, w))


def test_no_rows(ops):
    w = layer_for(ops, [(4, 64)], 32)
    assert product(ops, torch.empty(0, 64), w).shape == (0, 32)


def test_rows_do_not_depend_on_other_rows(ops):
    w = layer_for(ops, MIXED_GROUPS, 140, zeros=True, perm=True)
    x = random_rows(130, w.in_features)
    whole = product(ops, x, w)
    for first, end in ((0, 1), (7, 9), (20, 28), (30, 39), (60, 100), (64, 130), (3, 35)):
        assert torch.equal(product(ops, x[first:end].clone(), w), whole[first:end])


def test_faulty_activations_show_in_their_own_row_only(ops):
    w = layer_for(ops, [(4, 128), (4, 128)], 32)
    x = random_rows(40, 256)
    whole = product(ops, x, w)
    x[3, 200], x[11, 5], x[12, 6] = float("nan"), float("inf"), float("-inf")
    for rows in (slice(0, 40), slice(3, 4), slice(11, 13)):
        out = product(ops, x[rows].clone(), w)
        bad = ~x[rows].isfinite().all(dim=1)
        assert out[bad].isnan().all() and torch.equal(out[~bad], whole[rows][~bad])


def test_zero_and_tiny_activations(ops):
    w = layer_for(ops, [(4, 128), (4, 128)], 32)
    x = torch.zeros(4, 256)
    x[1, :128], x[2, 3], x[3, 200] = 1e-38, 1e-30, 3e38
    out = product(ops, x, w)
    assert (out[:2] == 0).all() and out[2].isfinite().all()
    assert_exact(ops, x[:3].clone(), w)
