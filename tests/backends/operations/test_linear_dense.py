"""Products with unquantised layers against float64, on CPUs and on CUDA.

CUDA splits activations in two for tensor cores, so that what is lost is known: see
csrc/cuda/linear_dense.cuh.
"""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends.reference.ops import dense_weight
from support.kernel_cases import dense_linear, random_rows
from support.linear_cases import HALF_ULP, linear_ops, product
from support.targets import TARGETS, sizes, target

NATIVE = ["native"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Columns of half a tile and of many tiles; for CUDA short last parts, slices, blocks and vectors.
SHAPES = {
    "cpu": ((300, 50), (64, 8), (33, 160)),
    "cuda": ((600, 50), (64, 8), (33, 160), (258, 20), (1300, 30)),
}
# Relative error of an activation as the sum of two numbers of a type, on CUDA.
SPLIT = {torch.float32: 0.0, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-18}
# Its error relative to the largest of the row: float16 ends at 2^-24, and the largest is 2^14.
FLOOR = {torch.float32: 0.0, torch.float16: 2.0**-39, torch.bfloat16: 0.0}
RELATIVE_ERROR = 1e-5


@pytest.fixture(params=[*NATIVE, *TARGETS])
def ops(request):
    return target(request.param, linear_ops, threads=2)


def assert_exact(ops, x, w):
    """Compare with float64: one rounding a step, each at most half an ulp of what is summed.

    On CUDA there are the sums of lanes and warps as well, and the loss of splitting.
    """
    weight, dtype = dense_weight(w).double(), w.weight.dtype
    exact, magnitude = x.double() @ weight, x.double().abs() @ weight.abs()
    bound = (w.in_features + 2) * HALF_ULP * magnitude
    if ops.kind == "cuda":
        largest = x.double().abs().amax(dim=1, keepdim=True)
        bound += (32 * HALF_ULP + SPLIT[dtype]) * magnitude
        bound += FLOOR[dtype] * largest * weight.abs().sum(dim=0)
    if w.bias is not None:
        exact, bound = exact + w.bias, bound + HALF_ULP * w.bias.abs()
    actual = product(ops, x, w)
    # Results below float32's smallest normal number are rounded in steps of 2^-149.
    assert ((actual.double() - exact).abs() <= bound + 2.0**-149).all()
    return actual, exact


@pytest.mark.parametrize("dtype", DTYPES)
@sizes("rows", cpus=NATIVE, cpu=[1, 2, 3, 5, 8, 9, 17, 64, 130], cuda=[1, 2, 8, 9, 33, 70])
def test_dense_product(ops, dtype, rows):
    for in_features, out_features in SHAPES[ops.kind]:
        w = dense_linear(in_features, out_features, dtype, bias=rows % 2 == 0)
        x = random_rows(rows, in_features)
        actual, exact = assert_exact(ops, x, w)
        assert (actual - exact).norm() <= RELATIVE_ERROR * exact.norm()
        before = random_rows(rows, out_features, seed=4)
        assert torch.equal(product(ops, x, w, add_to=before), before + actual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_other_rows(ops, dtype):
    w = dense_linear(552, 140, dtype, bias=True)
    x = random_rows(200, 552)
    whole = product(ops, x, w)
    for first, end in ((0, 1), (7, 9), (20, 28), (30, 39), (60, 100), (64, 130), (3, 35)):
        assert torch.equal(product(ops, x[first:end].clone(), w), whole[first:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_beyond_the_layer_and_no_rows(ops, dtype):
    for out_features in (1, 16, 17, 129):
        w = dense_linear(40, out_features, dtype)
        for rows in (0, 3, 40):
            assert product(ops, random_rows(rows, 40), w, columns=3).shape == (rows, out_features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 40])
def test_extreme_values(ops, dtype, rows):
    """Activations of every magnitude within a row, and weights from the largest to the smallest."""
    w = dense_linear(600, 24, dtype)
    x = random_rows(rows, 600)
    flat = w.weight.view(-1)
    limits = torch.finfo(torch.float16)
    flat[:400] = torch.tensor([limits.max, -limits.max, limits.tiny, 2.0**-24]).repeat(100)
    sizes = torch.logspace(-12, 4, 600).flip(0)
    x[0], x[1], x[2] = 0.0, x[1] * sizes, x[2] * 1e-38
    x[3] *= 1e30
    x[4, :256], x[5, 256:] = 1e-20, 0.0
    x[6, 17], x[7, 3] = 3e4 * limits.max, -2.0**-149
    actual, _ = assert_exact(ops, x, w)
    assert (actual[0] == 0).all() and actual.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_faulty_activations_show_in_their_own_row_only(ops, dtype):
    w, x = dense_linear(300, 24, dtype), random_rows(40, 300)
    w.weight[w.weight == 0] = 1.0
    whole = product(ops, x, w)
    x[3, 200], x[11, 5], x[12, 299] = float("nan"), float("inf"), float("-inf")
    for rows in (slice(0, 40), slice(3, 4), slice(11, 13)):
        out = product(ops, x[rows].clone(), w)
        bad = ~x[rows].isfinite().all(dim=1)
        assert not out[bad].isfinite().any() and torch.equal(out[~bad], whole[rows][~bad])
    assert product(ops, x, w)[11].isinf().all()


