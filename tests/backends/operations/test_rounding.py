"""Rounding of weights to codes, and the choice of scales, from their definition in float64.

On a card these are PyTorch's own products, which need no emulation.
"""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends.reference.rounding import RoundingOps
from support.targets import CPUS, target

# Rows of a group around the 32 that are updated together; columns around a vector of 16.
SHAPES = [(32, 32), (128, 80), (33, 17), (7, 5), (64, 96)]
WIDTHS = (2, 3, 4, 5, 6, 8)


@pytest.fixture(params=["reference", *CPUS])
def ops(request):
    return RoundingOps() if request.param == "reference" else target(request.param, RoundingOps)


def random_group(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    strength = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * strength


def tables(generator: torch.Generator, count: int) -> torch.Tensor:
    """Scales of 16 levels, as the format has them: squares."""
    units = (0.5 + torch.rand(count, 1, generator=generator)) / 256
    return torch.arange(1, 17).square() * units


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "tried"), [(2, 10), (3, 7), (4, 7), (8, 1), (5, 16)])
def test_the_level_of_the_smallest_error_is_chosen(ops, shape, bits, tried):
    rows = random_group(*shape, seed=31 * bits + shape[0])
    generator = torch.Generator().manual_seed(tried)
    scales, weights = tables(generator, 3), torch.rand(shape[0], generator=generator) + 0.1
    highest = torch.randint(tried, 17, (3, shape[1]), generator=generator, dtype=torch.int32)
    levels = torch.empty(3, shape[1], dtype=torch.int32)
    errors = torch.empty(3, shape[1])
    ops.choose_levels(rows, scales, highest, tried, bits, weights, levels, errors)
    # Errors of all levels: [C, 16, n, N].
    half, step = 2 ** (bits - 1), scales[:, :, None, None]
    codes = (rows * (1 / step)).round().clamp(-half, half - 1).double()
    squares = (codes * step - rows.double()).square()
    exact = (squares * weights[:, None]).sum(2)
    own = exact.gather(1, levels[:, None].long() - 1)[:, 0]
    torch.testing.assert_close(errors.double(), own, rtol=1e-5, atol=0)
    numbers = torch.arange(1, 17)[:, None]
    allowed = (numbers <= highest[:, None]) & (numbers > highest[:, None] - tried)
    assert allowed.gather(1, levels[:, None].long() - 1).all()
    assert (own <= exact.masked_fill(~allowed, torch.inf).amin(1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_rounded_with_the_errors_of_those_before(ops, shape, bits):
    rows = random_group(*shape, seed=bits)
    generator = torch.Generator().manual_seed(shape[0])
    feedback = torch.randn(shape[0], shape[0], generator=generator).triu() / 8
    feedback.diagonal().copy_(0.5 + torch.rand(shape[0], generator=generator))
    # Some columns are clipped, and some have few codes in use.
    scales = rows.abs().amax(0) / 2 ** (bits - 1) * (0.5 + torch.rand(shape[1]))
    codes, errors = torch.empty(shape, dtype=torch.int8), torch.empty(shape)
    exact = rows.double()
    ops.round_rows(rows.clone(), feedback, scales, bits, codes, errors)
    half = 2 ** (bits - 1)
    for i in range(shape[0]):
        position = exact[i] / scales
        code = codes[i].double()
        assert (position.clamp(-half, half - 1) - code).abs().max() <= 0.5 + 1e-3, i
        error = (exact[i] - code * scales) / feedback[i, i]
        assert ((errors[i] - error).abs() <= 1e-3 * scales / feedback[i, i]).all(), i
        exact[i + 1 :] -= feedback[i, i + 1 :, None] * error
    assert codes.min().item() >= -half and codes.max().item() < half
