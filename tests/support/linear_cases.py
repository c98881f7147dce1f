"""Products by CPU and CUDA kernels, their definitions, and random layers in the CUDA layout."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu.layout import packed_shapes
from exl_loader.backends.cpu.linear import linear_scratch_bytes as cpu_scratch_bytes
from exl_loader.backends.cuda.layout import (
    MAX_ROW_SPLITS,
    ROW_BLOCK_ROWS,
    StreamLinear,
    group_table,
    row_block_table,
    row_blocks_for,
    stream_shapes,
)
from exl_loader.backends.cuda.linear import LinearOps, linear_scratch_bytes
from exl_loader.backends.cuda.pack import PackOps, pack_streams, unpack_streams
from exl_loader.backends.reference import planes
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.formats.layer import QuantizedLayer, QuantizedSizes, zero_bits_for
from support.makers import pack_stream

# 15 bits: see csrc/cpu/linear.h and csrc/cuda/linear_layout.cuh.
LARGEST_ACTIVATION = np.float32(127 * 128)
HALF_ULP = 2.0**-24
# A CPU's scratch is sized for this many threads, because tests go up to 4 whatever the machine has.
MAX_THREADS = 4


class LayerOps(LinearOps, PackOps):
    """Operations with quantised layers."""


def linear_ops(launcher) -> LayerOps:
    """Return operations with an upload buffer so small that packing takes several rounds."""
    ops = LayerOps(launcher)
    ops.upload_buffer = torch.empty(1 << 16, dtype=torch.uint8)
    return ops


def scratch_for(rows: int, w, kind: str = "cuda") -> torch.Tensor:
    """Return scratch for a product, exactly as long as is reserved, filled with garbage."""
    if kind == "cuda":
        nbytes = linear_scratch_bytes(rows, w.in_features)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EXL_LOADER_THREADS", str(MAX_THREADS))
            nbytes = cpu_scratch_bytes(rows, w.in_features)
    return torch.full((nbytes,), 0x7B, dtype=torch.uint8)


def product(ops, x, w, *, add_to=None, columns=0):
    """Multiply into a wider view, so that writing outside the columns would show.

    Args:
        ops: a `Target`.
        add_to: contents of the output, which the product is added to; garbage where None.
        columns: of the output, beyond the layer's.
    """
    marker = 12345.0
    wide = torch.full((len(x), w.out_features + 7 + columns), marker)
    if add_to is not None:
        wide[:, : w.out_features] = add_to
    view = wide[:, : w.out_features + columns]
    ops.linear(x, w, view, scratch_for(len(x), w, ops.kind), add_to is not None)
    assert (wide[:, w.out_features :] == marker).all()
    return wide[:, : w.out_features].contiguous()


def equal_from_threads(call, layers, expected) -> bool:
    """Return whether threads that start together, one a layer, get what is expected 20 times."""
    start = threading.Barrier(len(layers))

    def many(i: int) -> bool:
        start.wait()
        return all(torch.equal(call(layers[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(len(layers)) as pool:
        return all(pool.map(many, range(len(layers))))


def stream_linear(
    groups: list[tuple[int, int]],
    out_features: int,
    *,
    seed: int = 0,
    zeros: bool = False,
    perm: bool = False,
    bias: bool = False,
) -> StreamLinear:
    """Make a random layer; arguments as `kernel_cases.packed_linear`."""
    rng = np.random.default_rng(seed)
    units, points = None, None
    scales = np.empty((len(groups), out_features), np.float16)
    scales[:] = rng.uniform(0.001, 0.021, scales.shape)
    codes = np.concatenate(
        [rng.integers(0, 1 << bits, (rows, out_features), np.uint8) for bits, rows in groups]
    )
    if zeros:
        limits = np.array([1 << bits for bits, _ in groups])[:, None]
        points = (rng.uniform(size=scales.shape) * limits).astype(np.uint8)
    else:
        scales = rng.integers(0, 16, scales.shape, np.uint8)
        units = rng.uniform(2e-6, 8e-5, len(groups)).astype(np.float16)
    return _stream(groups, codes, scales, units, points, seed, perm=perm, bias=bias)


def layer_of_values(ops, groups: list[tuple[int, int]], codes: np.ndarray, levels: np.ndarray,
                    units: np.ndarray):
    """Make a layer of EXL2 in the layout of the target's kernels.

    Args:
        ops: a `Target`.
        groups: (bits, rows) of each group.
        codes: uint8 [in_features, N]. levels: uint8 [G, N]. units: float16 [G].
    """
    scales, scale_units = torch.from_numpy(levels), torch.from_numpy(units)
    if ops.kind == "cuda":
        return _stream(groups, codes, levels, units, None, 0, perm=False, bias=False)
    ends = np.cumsum([rows for _, rows in groups])
    words = np.concatenate([pack_stream(codes[end - rows : end], bits)
                            for (bits, rows), end in zip(groups, ends, strict=True)])
    in_features, out_features = codes.shape
    layer = QuantizedLayer("", "layer", in_features, out_features, groups, len(words),
                           lambda first, end: torch.from_numpy(words[first:end]), True, scales,
                           scale_units, None, None, None)
    sizes = QuantizedSizes(out_features, in_features, len(words), len(groups), 0, perm=False)
    views = {role: torch.empty(shape, dtype=getattr(torch, dtype))
             for role, (dtype, shape) in packed_shapes(sizes).items()}
    return ReferenceOps().pack(layer, views)


def _stream(groups: list[tuple[int, int]], codes: np.ndarray, scales: np.ndarray,
            units: np.ndarray | None, points: np.ndarray | None, seed: int, *, perm: bool,
            bias: bool) -> StreamLinear:
    """Pack a layer by the layout's definition, with a random permutation and bias on request."""
    in_features, out_features = codes.shape
    zero_bits = 0 if points is None else max(zero_bits_for(bits) for bits, _ in groups)
    table = group_table(groups, zero_bits)
    words = sum(-(-rows // 32) * bits for bits, rows in groups)
    sizes = QuantizedSizes(out_features, in_features, words, len(groups), zero_bits, perm)
    packed = torch.empty(stream_shapes(sizes)["codes"][1], dtype=torch.uint8)
    group_tensor = torch.tensor(table, dtype=torch.int32)
    pack_streams(codes, scales, points, group_tensor.numpy(), packed.numpy())
    positions = row_block_table(table, zero_bits)
    g = torch.Generator().manual_seed(seed)
    return StreamLinear(
        in_features,
        out_features,
        packed,
        group_tensor,
        torch.tensor(positions, dtype=torch.int32),
        positions,
        scale_units=None if units is None else torch.from_numpy(units),
        zero_bits=zero_bits,
        perm=torch.randperm(in_features, generator=g).int() if perm else None,
        bias=torch.randn(out_features, generator=g) if bias else None,
    )


def quantised_product(x: torch.Tensor, w) -> tuple[np.ndarray, np.ndarray]:
    """Multiply by the kernels' own definition, in float64.

    See csrc/cpu/linear.h for a `PackedLinear`, and csrc/cuda/linear_stream.cuh for a
    `StreamLinear`. They differ in the rows of which activations share a scale.

    Returns:
        The product float64 [T, N], and per element the sum of its terms' magnitudes, which
        bounds what float32 summation may be off by.
    """
    if isinstance(w, StreamLinear):
        codes, scales, zeros = unpack_streams(w)
    else:
        codes = planes.unpack_codes(w)
        scales, zeros = planes.unpack_scales(w), planes.unpack_zeros(w)
    order = np.arange(w.in_features) if w.perm is None else w.perm.numpy()
    stored = x.numpy()[:, order]
    total = np.zeros((len(stored), w.out_features))
    magnitude = np.zeros_like(total)
    for begin, end in _rows_of_a_scale(w):
        largest = np.abs(stored[:, begin:end]).max(axis=1, keepdims=True)
        inverse = np.divide(LARGEST_ACTIVATION, largest, where=largest >= 1e-30,
                            out=np.zeros_like(largest))
        integers = np.rint(stored[:, begin:end] * inverse).astype(np.float64)
        x_scale = (largest / LARGEST_ACTIVATION).astype(np.float64)
        for group, (bits, first, rows, _) in enumerate(w.groups.tolist()):
            a, b = max(first, begin), min(first + rows, end)
            if a >= b:
                continue
            zero = 1 << (bits - 1) if zeros is None else zeros[group, : w.out_features]
            values = codes[a:b, : w.out_features].astype(np.float64) - zero
            scale = scales[group, : w.out_features].astype(np.float64)
            term = scale * x_scale * (integers[:, a - begin : b - begin] @ values)
            total += term
            magnitude += np.abs(term)
    if w.bias is not None:
        total += w.bias.numpy()
        magnitude += np.abs(w.bias.numpy())
    return total, magnitude


def _rows_of_a_scale(w) -> Iterator[tuple[int, int]]:
    """Yield first and end of the rows for which a row of activations has one scale.

    On CUDA they are blocks of the layer's rows, on a CPU blocks of each group's.
    """
    spans = [(0, w.in_features)] if isinstance(w, StreamLinear) else [
        (first, first + rows) for _, first, rows, _ in w.groups.tolist()]
    for first, end in spans:
        for begin in range(first, end, ROW_BLOCK_ROWS):
            yield begin, min(begin + ROW_BLOCK_ROWS, end)


def assert_exact(ops, x, w, roundings_of_a_term=2):
    """Compare with the definition.

    A term is rounded as scale * x_scale, as the integer turned into a float32, and in each of
    the sums after it; every rounding is at most half an ulp of the magnitudes' sum. CUDA adds
    the row splits' sums as well.

    Args:
        ops: a `Target`.
    """
    exact, magnitude = quantised_product(x, w)
    if ops.kind == "cuda":
        sums = row_blocks_for(w.in_features) + len(w.groups) + MAX_ROW_SPLITS + 1
    else:
        sums = sum(1 for _ in _rows_of_a_scale(w))
    bound = (sums + roundings_of_a_term) * HALF_ULP * magnitude + 1e-30
    difference = np.abs(product(ops, x, w).double().numpy() - exact)
    assert (difference <= bound).all(), (difference / bound).max()
