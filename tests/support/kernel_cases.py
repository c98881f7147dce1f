"""Random layers for the kernel tests, and the compiled operations for any instruction set."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
from exl_loader.backends.cpu.layout import PackedLinear, group_table
from exl_loader.backends.cpu.linear import linear_scratch_bytes
from exl_loader.backends.cpu.ops import CpuOps
from exl_loader.backends.layouts import DenseLinear
from exl_loader.backends.reference import planes

# Scratch is sized for this many threads: conftest leaves EXL_LOADER_THREADS alone, and the
# tests go up to 4 whatever the machine has.
MAX_THREADS = 4
# 15 bits: see csrc/cpu/linear.h.
LARGEST_ACTIVATION = np.float32(127 * 128)


@cache
def compiled_ops(march: str = "") -> CpuOps:
    """Return the operations compiled for `march` (this machine where empty), or skip."""
    spec = cpu_spec(environ={**os.environ, "EXL_LOADER_MARCH": march})
    if spec is None:
        pytest.skip("no C++ compiler")
    if march:
        # Beside this machine's they are compiled for what they compute: in half of the time.
        flags = tuple("-O1" if flag == "-O3" else flag for flag in spec.flags)
        spec = replace(spec, flags=flags)
    return CpuOps(ctypes.CDLL(str(build(spec))))


def scratch_for(rows: int, in_features: int) -> torch.Tensor:
    """Return scratch for a product on MAX_THREADS threads, exactly as long as it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_THREADS", str(MAX_THREADS))
        return torch.empty(linear_scratch_bytes(rows, in_features), dtype=torch.uint8)


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
        zeros: random zero points per group and column, as GPTQ has them.
        perm: a random order of input channels.
        bias: a random bias.
    """
    g = torch.Generator().manual_seed(seed)
    bits, rows = zip(*groups, strict=True)
    in_features, tiles = sum(rows), -(-out_features // 16)
    tile_bytes = sum(-(-r // 32) * 64 * b for b, r in groups)
    scales = (torch.rand(tiles, len(groups), 16, generator=g) * 0.02 + 0.001).half()
    zero_points = None
    if zeros:
        limits = torch.tensor([2**b for b in bits])[None, :, None]
        zero_points = (torch.rand(scales.shape, generator=g) * limits).to(torch.uint8)
    return PackedLinear(
        in_features,
        out_features,
        codes=torch.randint(0, 256, (tiles, tile_bytes), dtype=torch.uint8, generator=g),
        scales=scales,
        groups=torch.tensor(group_table(groups), dtype=torch.int32),
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


def quantised_product(x: torch.Tensor, w: PackedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Multiply by the kernels' own definition (csrc/cpu/linear.h), in float64.

    Returns:
        The product float64 [T, N], and per element the sum of its terms' magnitudes, which
        bounds what float32 summation may be off by.
    """
    codes = planes.unpack_codes(w)[:, : w.out_features].astype(np.float64)
    order = np.arange(w.in_features) if w.perm is None else w.perm.numpy()
    stored = x.numpy()[:, order]
    total = np.zeros((len(stored), w.out_features))
    magnitude = np.zeros_like(total)
    for group, (bits, first, rows, _) in enumerate(w.groups.tolist()):
        scale = _columns(w.scales, group, w.out_features)
        zero = 2 ** (bits - 1) if w.zeros is None else _columns(w.zeros, group, w.out_features)
        for start in range(first, first + rows, 128):
            span = slice(start, min(start + 128, first + rows))
            largest = np.abs(stored[:, span]).max(axis=1, keepdims=True)
            inverse = np.divide(LARGEST_ACTIVATION, largest, where=largest >= 1e-30,
                                out=np.zeros_like(largest))
            integers = np.rint(stored[:, span] * inverse).astype(np.float64)
            x_scale = (largest / LARGEST_ACTIVATION).astype(np.float64)
            term = scale * x_scale * (integers @ (codes[span] - zero))
            total += term
            magnitude += np.abs(term)
    if w.bias is not None:
        total += w.bias.numpy()
        magnitude += np.abs(w.bias.numpy())
    return total, magnitude


def _columns(table: torch.Tensor, group: int, out_features: int) -> np.ndarray:
    return table[:, group].reshape(-1)[:out_features].double().numpy()
