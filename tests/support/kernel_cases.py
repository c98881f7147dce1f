"""Random layers for the kernel tests, and the compiled operations for any instruction set."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from functools import cache

import pytest
import torch

from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
from exl_loader.backends.cpu.layout import PackedLinear, fill_tiles, group_table
from exl_loader.backends.cpu.ops import CpuOps
from exl_loader.backends.layouts import DenseLinear


@cache
def compiled_ops(march: str = "") -> CpuOps:
    """Return the operations compiled for `march` (this machine where empty), or skip."""
    spec = cpu_spec(environ={**os.environ, "EXL_LOADER_MARCH": march})
    if spec is None:
        pytest.skip("no C++ compiler")
    if march:
        # Beside this machine's they are compiled for what they compute. -Og takes a fifth of the
        # time of -O1 for linear_direct.cpp, whose large functions gcc searches for aliases.
        flags = tuple("-Og" if flag == "-O3" else flag for flag in spec.flags)
        spec = replace(spec, flags=flags)
    return CpuOps(ctypes.CDLL(str(build(spec))))


def packed_linear(
    groups: list[tuple[int, int]],
    out_features: int,
    *,
    seed: int = 0,
    zeros: bool = False,
    perm: bool = False,
    bias: bool = False,
) -> PackedLinear:
    """Make a random packed layer.

    Args:
        groups: (bits, rows) of each group.
        out_features: columns.
        zeros: float16 scales and random zero points, as GPTQ has them; else scales of 4 bits as
            EXL2 has them.
        perm: a random order of input channels.
        bias: a random bias.
    """
    g = torch.Generator().manual_seed(seed)
    bits, rows = zip(*groups, strict=True)
    in_features, tiles = sum(rows), -(-out_features // 16)
    tile_bytes = sum(-(-r // 32) * 64 * b for b, r in groups)
    units, zero_points = None, None
    if zeros:
        scales = (torch.rand(tiles, len(groups), 16, generator=g) * 0.02 + 0.001).half()
        limits = torch.tensor([2**b for b in bits])[:, None]
        points = (torch.rand(len(groups), tiles * 16, generator=g) * limits).to(torch.uint8)
        zero_points = torch.empty(tiles, len(groups), 16 if max(bits) > 4 else 8, dtype=torch.uint8)
        fill_tiles(points, zero_points)
    else:
        scales = torch.randint(0, 256, (tiles, len(groups), 8), dtype=torch.uint8, generator=g)
        units = (torch.rand(len(groups), generator=g) * 8e-5 + 2e-6).half()
    return PackedLinear(
        in_features,
        out_features,
        codes=torch.randint(0, 256, (tiles, tile_bytes), dtype=torch.uint8, generator=g),
        scales=scales,
        groups=torch.tensor(group_table(groups), dtype=torch.int32),
        scale_units=units,
        zeros=zero_points,
        perm=torch.randperm(in_features, generator=g).int() if perm else None,
        bias=torch.randn(out_features, generator=g) if bias else None,
    )


def dense_linear(
    in_features: int, out_features: int, dtype: torch.dtype, *, seed: int = 0, bias: bool = False
) -> DenseLinear:
    """Make a random unquantised layer."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(-(-out_features // 16), in_features, 16, generator=g)
    return DenseLinear(
        in_features,
        out_features,
        weight.to(dtype),
        torch.randn(out_features, generator=g) if bias else None,
    )


def random_rows(rows: int, size: int, seed: int = 1) -> torch.Tensor:
    """Return activations with channels of different strength, as models have them."""
    g = torch.Generator().manual_seed(seed)
    strength = torch.exp(0.5 * torch.randn(size, generator=g))
    return torch.randn(rows, size, generator=g) * strength
