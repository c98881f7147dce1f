"""Packing kernels write what the definition of their layout does, bit for bit.

The definition is `backends/reference/planes.py` for CPUs and `backends/cuda/pack.py` for CUDA.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu import layout as cpu_layout
from exl_loader.backends.cuda import layout as cuda_layout
from exl_loader.backends.cuda import pack
from exl_loader.backends.layouts import BIT_PLANES
from exl_loader.backends.reference import planes
from exl_loader.formats.layer import zero_bits_for
from exl_loader.utils.integers import ceil_div, round_up
from support.linear_cases import linear_ops
from support.makers import pack_stream
from support.targets import CPUS, EMULATED, target

WIDTHS = sorted(BIT_PLANES)
# Groups as (bits, rows).
EXL2_GROUPS = [
    *([(bits, 128), (bits, 96)] for bits in WIDTHS),
    *([(bits, 32), (bits, rows)] for bits in WIDTHS for rows in (1, 31, 33)),
    [(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 64)],
    [(4, 32)] * 40,
]


@pytest.fixture(params=[*CPUS, *EMULATED])
def ops(request):
    return target(request.param, linear_ops)


def check_cpu(ops, groups, words, columns, bits=None, perm=None):
    """Pack into buffers with different old contents; the arguments are those of `check_cuda`."""
    table = torch.tensor(cpu_layout.group_table(groups), dtype=torch.int32)
    # Bytes beyond the last block become zero.
    tile_bytes = sum(ceil_div(rows, 32) * 64 * width for width, rows in groups) + 64
    results = []
    for implementation, garbage in ((ops, 0xAA), (planes, 0x55)):
        results.append(torch.full((ceil_div(columns, 16), tile_bytes), garbage, dtype=torch.uint8))
        if bits is None:
            implementation.pack_words(words, 0, table, results[-1])
        else:
            implementation.pack_gptq(words, bits, perm, table, results[-1])
    assert torch.equal(*results)
    return results[0]


def pack_parts(ops, groups, words, columns, cuts):
    """Pack parts of a layer, in a random order.

    Args:
        cuts: word rows between blocks, where parts begin and end.
    """
    table = torch.tensor(cpu_layout.group_table(groups), dtype=torch.int32)
    tile_bytes = sum(ceil_div(rows, 32) * 64 * width for width, rows in groups) + 64
    packed = torch.full((ceil_div(columns, 16), tile_bytes), 0x33, dtype=torch.uint8)
    parts = list(pairwise([0, *cuts, len(words)]))
    for index in np.random.default_rng().permutation(len(parts)):
        first, end = parts[index]
        ops.pack_words(words[first:end].contiguous(), first, table, packed)
    return packed


def check_cuda(ops, groups, words, codes, bits=None, perm=None):
    """Pack into buffers with different old contents.

    Args:
        groups: (bits, rows). words: as on disk. codes: uint8 [in_features, N] in stored order.
        bits: of a GPTQ layer, which has zero points.
    """
    rng, columns = np.random.default_rng(1), codes.shape[1]
    zero_bits = 0 if bits is None else zero_bits_for(bits)
    scales, points = rng.integers(0, 16, (len(groups), columns), np.uint8), None
    if bits is not None:
        points = rng.integers(0, 1 << bits, scales.shape).astype(np.uint8)
        scales = rng.normal(size=scales.shape).astype(np.float16)
    table = torch.tensor(cuda_layout.group_table(groups, zero_bits), dtype=torch.int32)
    tile_bytes = cuda_layout.row_block_table(table.tolist(), zero_bits)[-1][0] + 128
    expected = torch.full((ceil_div(columns, 32), tile_bytes), 0x55, dtype=torch.uint8)
    pack.pack_streams(codes, scales, points, table.numpy(), expected.numpy())
    packed, scales = torch.full_like(expected, 0xAA), torch.from_numpy(scales)
    if points is None:
        ops.ops.pack_exl2_streams(words, scales, table, packed)
    else:
        ops.ops.pack_gptq_streams(words, scales, torch.from_numpy(points), perm, table, packed)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("groups", EXL2_GROUPS, ids=str)
@pytest.mark.parametrize("columns", [32, 50, 200])
def test_exl2(ops, groups, columns):
    rng = np.random.default_rng(columns)
    # Columns of a file are whole tiles of 32; CUDA's kernels take any number.
    width = round_up(columns, 32) if ops.kind == "cpu" else columns
    codes = [rng.integers(0, 1 << bits, (rows, width)).astype(np.uint8) for bits, rows in groups]
    streams = [pack_stream(part, bits) for part, (bits, _) in zip(codes, groups, strict=True)]
    words = torch.from_numpy(np.concatenate(streams))
    if ops.kind == "cpu":
        whole = check_cpu(ops, groups, words, columns)
        blocks = [bits for bits, rows in groups for _ in range(ceil_div(rows, 32))]
        cuts = np.cumsum(blocks)[:-1].tolist()
        for cut in ([], cuts[:1], cuts[1::2], cuts):
            for implementation in (ops, planes):
                parts = pack_parts(implementation, groups, words, columns, cut)
                assert torch.equal(parts, whole)
    else:
        check_cuda(ops, groups, words, np.concatenate(codes))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [8, 32, 50, 200])
def test_gptq(ops, bits, act_order, columns):
    rng = np.random.default_rng(bits)
    groups = [(bits, 128), (bits, 128), (bits, 64)]
    codes = rng.integers(0, 1 << bits, (320, columns)).astype(np.uint8)
    perm = torch.from_numpy(rng.permutation(320).astype(np.int32)) if act_order else None
    words = torch.from_numpy(pack_stream(codes, bits))
    if ops.kind == "cpu":
        check_cpu(ops, groups, words, columns, bits, perm)
    else:
        stored = codes if perm is None else codes[perm.numpy()]
        check_cuda(ops, groups, words, stored, bits, perm)


def test_gptq_groups_of_no_whole_blocks_on_cpus():
    words = torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, (12, 32), np.int64))
    ops = target("native", linear_ops)
    check_cpu(ops, [(4, 40), (4, 40), (4, 16)], words.int(), 32, bits=4)
