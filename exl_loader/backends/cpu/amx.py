"""Products on the tiles of Intel's AMX: asked of the system, and checked before their first use.

A process needs the system's permission for tiles, and a virtual machine may have a processor that
names AMX and a system that refuses it. So the library asks (`exl_set_amx`). Then products of small
layers must have the bits of the kernels without tiles, and be close to the reference.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from ...utils.output import warn_once
from ...utils.system.processors import cpu_features, torch_on_one_thread
from ..layouts import TILE_COLUMNS
from ..reference.ops import ReferenceOps
from .layout import HALF_BYTES, PackedLinear, group_table
from .linear import linear_scratch_bytes

if TYPE_CHECKING:
    from .ops import CpuOps

# Results of exl_set_amx.
ON, OFF, REFUSED, NOT_COMPILED = 1, 0, -1, -2

# (bits, rows) of a layer's groups: every number of bits, spans of one and of two steps, and a last
# block that is padded.
GROUPS = ((4, 128), (2, 32), (3, 64), (5, 96), (6, 160), (8, 40))
# Five tiles, an odd number; two whole blocks of rows and one of 5.
OUT_FEATURES, ROWS = 77, 37
# Activations have 15 bits.
_BOUND = 5e-4


def use_amx(ops: CpuOps) -> None:
    """Use AMX tiles if processor and system have them and their products are right.

    Otherwise the other kernels stay in use, and a warning says so if the processor has AMX.

    Args:
        ops: the operations of a library that was just opened.
    """
    state = ops.set_amx(True)
    if state == NOT_COMPILED:
        if "amx_int8" in cpu_features() and not os.environ.get("EXL_LOADER_MARCH", "").strip():
            _warn("the C++ compiler does not know AMX (g++ does from version 11 on)")
    elif state == REFUSED:
        _warn("the system does not permit a process to use AMX tiles")
    elif not products_are_right(ops):
        ops.set_amx(False)
        _warn("products on its AMX tiles are wrong")


def _warn(reason: str) -> None:
    warn_once(f"Prompts run without this processor's AMX, which takes longer: {reason}.")


def products_are_right(ops: CpuOps) -> bool:
    """Compare products on tiles with those of the other kernels and with the reference's.

    AMX is on afterwards.
    """
    generator = torch.Generator().manual_seed(15)
    in_features = sum(rows for _, rows in GROUPS)
    x = torch.randn(ROWS, in_features, generator=generator)
    scratch = torch.empty(linear_scratch_bytes(ROWS, in_features), dtype=torch.uint8)
    with torch_on_one_thread():
        for layer in (_layer(generator, zeros=False), _layer(generator, zeros=True)):
            results = []
            for on in (False, True):
                ops.set_amx(on)
                results.append(torch.empty(ROWS, OUT_FEATURES))
                ops.linear(x, layer, results[-1], scratch)
            expected = torch.empty(ROWS, OUT_FEATURES)
            ReferenceOps().linear(x, layer, expected, scratch)
            without, on_tiles = results
            error = float((on_tiles - expected).norm() / expected.norm())
            if not torch.equal(without, on_tiles) or not error <= _BOUND:
                return False
    return True


def _layer(generator: torch.Generator, *, zeros: bool) -> PackedLinear:
    """Make a random layer, with zero points of 8 bits or with scales of 4 bits and none."""
    table = group_table(GROUPS)
    tiles = -(-OUT_FEATURES // TILE_COLUMNS)
    bits, _, rows, offset = table[-1]
    tile_bytes = offset + -(-rows // 32) * bits * 64
    shape = (tiles, len(GROUPS), TILE_COLUMNS)

    def integers(below: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, below, shape, dtype=torch.uint8, generator=generator)

    if zeros:
        limits = torch.tensor([1 << bits for bits, _ in GROUPS])[:, None]
        points = torch.rand(shape, generator=generator) * limits
        scales = {"scales": (torch.rand(shape, generator=generator) * 0.02).half(),
                  "zeros": points.to(torch.uint8)}
    else:
        scales = {"scales": integers(256, tiles, len(GROUPS), HALF_BYTES),
                  "scale_units": (torch.rand(len(GROUPS), generator=generator) * 8e-5).half()}
    return PackedLinear(
        sum(rows for _, rows in GROUPS), OUT_FEATURES, codes=integers(256, tiles, tile_bytes),
        groups=torch.tensor(table, dtype=torch.int32), **scales,
    )  # fmt: skip
