"""PTX instructions that csrc/cuda writes itself: since which PTX, and for which cards.

PTX ISA manual, "PTX ISA Notes" and "Target ISA Notes" of each instruction. Compilers choose the
others by the architecture that they compile for.
"""

from __future__ import annotations

import re

# Pattern of an opcode -> (PTX release, least compute capability as a number).
SINCE = {
    r"add\.rn\.f16x2|sub\.rn\.f16x2|mul\.rn\.f16x2|fma\.rn\.f16x2": ((4, 2), 53),
    r"cp\.async\..*": ((7, 0), 80),
    r"cvt\.f32\.f16|cvt\.rn\.f16\.f32": ((1, 0), 53),
    r"cvt\.rn\.(f16x2|bf16x2)\.f32": ((7, 0), 80),
    r"dp4a\..*": ((5, 0), 61),
    r"(ex2|rcp|rsqrt)\.approx(\.ftz)?\.f32": ((1, 4), 20),
    r"fma\.rn\.sat\.f32": ((2, 0), 20),
    r"ld\.global\.cg\..*": ((2, 0), 20),
    r"ld\.global\.nc\.L1::no_allocate\..*": ((7, 4), 70),
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\..*b16": ((6, 5), 75),
    r"mma\.sync\.aligned\.m8n8k16\..*": ((6, 5), 75),
    r"mma\.sync\.aligned\.m16n8k8\..*\.f16\.f16\.f32": ((6, 5), 75),
    r"mma\.sync\.aligned\.m16n8k(16|32)\..*": ((7, 0), 80),
    r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16": ((7, 8), 75),
    r"prefetch\.global\.L2": ((2, 0), 20),
}

# PTX release -> the CUDA release that brought it ("Release Notes").
CUDA_OF = {(7, 4): (11, 4), (7, 8): (11, 8)}

# Parameters of these types have no size of their own in PTX.
TYPE_BYTES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4,
              "u8": 1, "b8": 1}


def since(opcode: str) -> tuple[tuple[int, int], int] | None:
    """Look an opcode up; None where it is not in the table."""
    return next((found for pattern, found in SINCE.items() if re.fullmatch(pattern, opcode)), None)


def least_target(opcode: str) -> int:
    """Return the least compute capability for an opcode, 75 being 7.5; 0 where not in the table."""
    found = since(opcode)
    return 0 if found is None else found[1]
