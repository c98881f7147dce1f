"""LayerNorm against the reference, which uses float64."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.reference.ops import ReferenceOps
from support.kernel_cases import random_rows
from support.targets import ALL_TARGETS, sizes, target

REFERENCE = ReferenceOps()
ULP = 2.0**-23
CPU_SIZES = [2, 15, 16, 17, 64, 100, 2049]
CUDA_SIZES = [2, 31, 32, 33, 100, 512, 513, 1300]


@pytest.fixture(params=ALL_TARGETS)
def ops(request):
    return target(request.param, MoeOps)


def assert_like_the_reference(ops, x, weight, bias, ulps, eps=1e-5):
    """Compare, also in place, and return the result."""
    out, expected = torch.empty_like(x), torch.empty_like(x)
    ops.layer_norm(x, weight, bias, eps, out)
    REFERENCE.layer_norm(x, weight, bias, eps, expected)
    # A result has rounding errors of the deviation, of the product and of the bias.
    largest = float(expected.abs().max() + (0 if bias is None else bias.abs().max()))
    torch.testing.assert_close(out, expected, rtol=0, atol=ulps * ULP * largest)
    in_place = x.clone()
    ops.layer_norm(in_place, weight, bias, eps, in_place)
    assert torch.equal(in_place, out)
    return out


@pytest.mark.parametrize("has_bias", [False, True])
@sizes("size", cpu=CPU_SIZES, cuda=CUDA_SIZES)
def test_layer_norm(ops, size, has_bias):
    x, weight = random_rows(9, size) + 0.5, random_rows(1, size, seed=2)
    bias = random_rows(1, size, seed=3) if has_bias else None
    out = assert_like_the_reference(ops, x, weight, bias, ulps=6 + size / 128)
    alone = torch.empty(1, size)
    ops.layer_norm(x[5:6].clone(), weight, bias, 1e-5, alone)
    assert torch.equal(alone[0], out[5])


@pytest.mark.parametrize("heads", [1, 3, 5])
@sizes("size", cpu=[7, 64, 128], cuda=[7, 64, 600])
def test_heads_have_weights_of_their_own(ops, heads, size):
    x = random_rows(4 * heads, size)
    weight, bias = random_rows(heads, size, seed=2), random_rows(heads, size, seed=3)
    for own_bias in (None, bias):
        assert_like_the_reference(ops, x, weight, own_bias, ulps=6 + size / 128)


@sizes("size", cpu=[33, 2049], cuda=[33, 1300])
def test_a_mean_far_above_the_deviations(ops, size):
    """The mean of squares minus the square of the mean would have no correct digit here."""
    deviations = torch.randint(-64, 65, (3, size), generator=torch.Generator().manual_seed(4))
    x = 30000.0 + deviations.float() / 64  # exact in float32
    weight = random_rows(1, size, seed=2)
    assert_like_the_reference(ops, x, weight, None, ulps=8 + size / 64)


@sizes("size", cpu=[17, 64], cuda=[64, 513])
def test_equal_elements_give_the_bias(ops, size):
    x, bias = torch.full((2, size), 12.25), random_rows(1, size, seed=3)
    out = torch.empty_like(x)
    ops.layer_norm(x, torch.ones(1, size), bias, 1e-5, out)
    assert torch.equal(out, bias.expand(2, size))
