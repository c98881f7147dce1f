"""Every kind of device implements the protocols in full."""

from __future__ import annotations

import inspect

import pytest
import torch

from exl_loader.backends import BACKENDS
from exl_loader.backends.base import Backend, DeviceOps, Ops
from exl_loader.backends.cpu.ops import CpuOps
from exl_loader.backends.cuda.ops import CudaOps
from exl_loader.backends.recorder import Recorder
from exl_loader.backends.reference.ops import ReferenceOps
from support.emulated_cuda import EmulatedCard


def methods(protocol: type) -> dict[str, list[str]]:
    """Name the methods of a protocol with the names of their parameters."""
    return {
        name: [*inspect.signature(function).parameters]
        for name, function in inspect.getmembers(protocol, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(("protocol", "implementation"), [
    (DeviceOps, ReferenceOps), (DeviceOps, CpuOps), (DeviceOps, CudaOps), (Ops, Recorder),
    *((Backend, type(backend)) for backend in BACKENDS.values()), (Backend, EmulatedCard),
], ids=lambda value: value.__name__)
def test_every_method_is_implemented_with_the_same_parameters(protocol, implementation):
    wanted = methods(protocol)
    assert wanted
    for name, parameters in wanted.items():
        function = getattr(implementation, name)
        assert not getattr(function, "__isabstractmethod__", False), name
        found = inspect.signature(function).parameters
        assert [*found][: len(parameters)] == parameters, name


def test_pairs_and_their_sum_are_the_grouped_experts_bit_for_bit():
    """The definition of `linear_pairs` and `moe_sum` against `linear` and `scatter_add_rows`."""
    from support.kernel_cases import dense_linear, random_rows

    ops, scratch = ReferenceOps(), torch.empty(0, dtype=torch.uint8)
    layers = [dense_linear(24, 40, torch.float16, seed=seed) for seed in range(5)]
    x, weights = random_rows(3, 24), torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
    experts = torch.tensor([[4, 1], [0, 4], [2, 3]], dtype=torch.int32)
    table = ops.expert_table(layers, torch.empty(0, dtype=torch.uint8))
    pairs, summed, expected = torch.empty(6, 40), random_rows(3, 40), random_rows(3, 40)
    ops.linear_pairs(x, table, experts, pairs, scratch)
    ops.moe_sum(pairs, weights, experts, summed)
    for expert, layer in enumerate(layers):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        if len(rows):
            product = torch.empty(len(rows), 40)
            ops.linear(x[rows], layer, product, scratch)
            ops.scatter_add_rows(product, rows.int(), weights[rows, places], expected)
    assert torch.equal(summed, expected)
