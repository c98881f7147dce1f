"""Compiled repacking equals `backends/reference/planes.py`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends.cpu.layout import group_table
from exl_loader.backends.reference import planes
from support.kernel_cases import compiled_ops

WIDTHS = (2, 3, 4, 5, 6, 8)


def words(rows: int, columns: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (rows, columns), generator=g).int()


def both(name: str, groups: torch.Tensor, tiles: int, extra_bytes: int, *arguments):
    """Run the compiled and the defining function on buffers of garbage."""
    blocks = -(-groups[:, 2] // 32)
    tile_bytes = int((blocks * groups[:, 0]).sum()) * 64 + extra_bytes
    results = []
    for implementation, garbage in ((compiled_ops(), 0xAA), (planes, 0x55)):
        codes = torch.full((tiles, tile_bytes), garbage, dtype=torch.uint8)
        getattr(implementation, name)(*arguments, groups, codes)
        results.append(codes)
    return results


@pytest.mark.parametrize(
    "groups",
    [
        *([(bits, 128), (bits, 96)] for bits in WIDTHS),
        *([(bits, 32), (bits, rows)] for bits in WIDTHS for rows in (1, 31, 33)),
        [(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 64)],
    ],
    ids=str,
)
@pytest.mark.parametrize(("columns", "tiles"), [(64, 4), (32, 1), (64, 3), (32, 3)])
def test_exl2(groups, columns, tiles):
    table = torch.tensor(group_table(groups), dtype=torch.int32)
    rows = sum(-(-count * bits // 32) for bits, count in groups)
    packed, expected = both("pack_exl2", table, tiles, 64, words(rows, columns, tiles))
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("columns", "tiles"), [(64, 4), (40, 3), (8, 1)])
def test_gptq(bits, act_order, columns, tiles):
    channels = 320
    rows = [128, 128, 64]
    table = torch.tensor(group_table([(bits, count) for count in rows]), dtype=torch.int32)
    perm = None
    if act_order:
        perm = torch.randperm(channels, generator=torch.Generator().manual_seed(bits)).int()
    qweight = words(channels * bits // 32, columns, bits)
    blocks = -(-table[:, 2] // 32)
    tile_bytes = int((blocks * table[:, 0]).sum()) * 64
    results = []
    for implementation in (compiled_ops(), planes):
        codes = torch.full((tiles, tile_bytes), 0xAA, dtype=torch.uint8)
        implementation.pack_gptq(qweight, bits, perm, table, codes)
        results.append(codes)
    assert torch.equal(*results)


def test_gptq_groups_of_no_whole_blocks():
    table = torch.tensor(group_table([(4, 40), (4, 40), (4, 16)]), dtype=torch.int32)
    qweight = words(12, 32, 0)
    results = []
    for implementation in (compiled_ops(), planes):
        codes = torch.empty((2, 5 * 256), dtype=torch.uint8)
        implementation.pack_gptq(qweight, 4, None, table, codes)
        results.append(codes)
    assert torch.equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64"])
def test_other_instruction_sets(march):
    groups = [(8, 32), (6, 64), (5, 32), (4, 128), (3, 32), (2, 47)]
    table = torch.tensor(group_table(groups), dtype=torch.int32)
    q_weight = words(sum(-(-count * bits // 32) for bits, count in groups), 64, 3)
    tile_bytes = sum(-(-count // 32) * bits * 64 for bits, count in groups)
    results = []
    for implementation in (compiled_ops(march), planes):
        codes = torch.empty((4, tile_bytes), dtype=torch.uint8)
        implementation.pack_exl2(q_weight, table, codes)
        results.append(codes)
    assert torch.equal(*results)
