"""The choice of experts and their weights against the reference, which uses float64."""

from __future__ import annotations

import math

import pytest
import torch

from exl_loader.backends.base import Routing
from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.reference.ops import ReferenceOps
from support.kernel_cases import random_rows
from support.targets import ALL_TARGETS, target

REFERENCE = ReferenceOps()
ULP = 2.0**-23
# A CPU's threads share the rows.
ROWS = {"cpu": 33, "cuda": 9}
SIZES = [(8, 2), (64, 8), (33, 33), (3, 3), (1, 1)]
# On CUDA a logit 30 below the largest has a difference that is itself rounded by 8 ulp.
ULPS = {"cpu": 2, "cuda": 20}


@pytest.fixture(params=ALL_TARGETS)
def ops(request):
    return target(request.param, MoeOps)


def route(ops, logits, routing):
    """Return weights and experts."""
    shape = len(logits), routing.top_k
    weights, experts = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
    ops.moe_route(logits, routing, weights, experts)
    return weights, experts


def assert_like_the_reference(ops, logits, routing):
    weights, experts = route(ops, logits, routing)
    expected = route(REFERENCE, logits, routing)
    assert torch.equal(experts, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=ULPS[ops.kind] * ULP, atol=0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_moe_route(ops, score, normalize, num_experts, top_k):
    logits = random_rows(ROWS[ops.kind], num_experts) * 3
    logits[0] = 1.0
    logits[1, num_experts // 2] = logits[1, 0]
    logits[2] += 1e4  # a sigmoid is 1 for all, but logits still decide
    assert_like_the_reference(ops, logits, Routing(top_k, score, normalize, 2.5))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [*SIZES, (256, 8)])
def test_a_correction_decides_the_choice_only(ops, score, normalize, num_experts, top_k):
    """The corrections are distinct and far apart, so that no rounding decides."""
    generator = torch.Generator().manual_seed(num_experts)
    logits = random_rows(ROWS[ops.kind], num_experts)
    correction = 1.5 * torch.randperm(num_experts, generator=generator).float()
    routing = Routing(top_k, score, normalize, correction=correction)
    assert_like_the_reference(ops, logits, routing)
    _, experts = route(ops, logits, routing)
    assert torch.equal(experts[0].long(), correction.argsort(descending=True)[:top_k])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_and_correction_are_added(ops, score):
    """Small corrections leave part of the order to the scores. Sums differ by more than 1e-4."""
    logits = random_rows(ROWS[ops.kind], 12, seed=int(torch.randint(1 << 30, ())))
    exact = logits.double()
    scores = exact.sigmoid() if score == "sigmoid" else exact.softmax(-1)
    correction = torch.linspace(-0.1, 0.1, 12)
    ordered = (scores + correction).sort(-1).values
    is_clear = (ordered.diff(dim=-1) > 1e-4).all(-1)
    if not is_clear.any():
        pytest.skip("all rows of this seed have sums too close to each other")
    assert_like_the_reference(ops, logits[is_clear].contiguous(),
                              Routing(5, score, correction=correction))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_sums_choose_the_lower_expert(ops, score):
    logits, correction = torch.zeros(2, 40), torch.zeros(40)
    correction[[7, 36]] = 1.0
    _, experts = route(ops, logits, Routing(4, score, correction=correction))
    assert experts.tolist() == [[7, 36, 0, 1]] * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("correction", [None, torch.zeros(4)])
def test_moe_route_survives_nan(ops, score, correction):
    logits = torch.full((2, 4), math.nan)
    logits[1, 2] = 1.0
    weights, experts = route(ops, logits, Routing(2, score, correction=correction))
    assert weights.isnan().any(dim=1).all()
    assert ((experts >= 0) & (experts < 4)).all()
