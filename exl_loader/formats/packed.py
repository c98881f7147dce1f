"""What a linear layer is on a device: plans without PyTorch, and the tensors at run time.

`LinearPlan` is made from checkpoint headers alone and says which tensors the layer will
occupy. `PackedLinear` and `DenseLinear` are what the operations take.

Packed layout (EXL2 and GPTQ alike; CPU)
----------------------------------------
Output columns are cut into tiles of 16, stored rows (already permuted, so that a group's
rows follow each other) into blocks of 32. A block of 32 rows x 16 columns of b-bit codes
takes exactly 64*b bytes: b vectors of 64 bytes. One *register* is the 64 bytes
[column 0..15][row 4j..4j+3], one byte a code: what an 8-bit integer dot product takes. A
block has 8 registers, j = 0..7. Codes are split into bit planes, the high plane first:

    bits 2: plane of 2      bits 4: plane of 4      bits 6: planes of 4 (high), 2 (low)
    bits 3: planes of 2, 1  bits 5: planes of 4, 1  bits 8: plane of 8

so code = (high << width of the low plane) | low. A plane of w bits takes w vectors. Vector
v (0 <= v < w) of a plane holds in each byte the w-bit fields of 8/w registers: register
v*(8/w) + i stands at bits [i*w, i*w + w) of the byte at its own position. The planes of a
block follow each other, high first.

`codes` is [tiles, tile_bytes]: per tile the blocks of group 0, group 1, ... in row order. A
group whose rows are no multiple of 32 is filled up with rows of code 2^(bits-1); the
activations there are zero, so their codes do not matter.
`groups` is int32 [G, 4]: bits, first stored row, rows (without fill), byte offset of the
group's first block within a tile.
`scales` is float16 [tiles, G, 16]. `zeros` is uint8 [tiles, G, 16] or None, where every
zero point is 2^(bits-1) (EXL2). `perm` is int32 [in_features]: stored row r takes input
channel perm[r]; None where it is the identity. `bias` is float32 [out_features] or None.

    value(stored row r of group g, column n) = scales[g, n] * (code - zero[g, n])

EXL2 (`zeros` is None) means this value rounded to float16, as the weights its quantiser
measured: `planes.dequantize` decodes so, and then the fixtures' logits agree to the last
bit. Kernels that sum integers and apply the scale afterwards leave that rounding out, which
moves the logits by 5e-4 to 8e-4 (relative L2, fixtures). GPTQ's value is rounded nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..utils.table import TensorSpec

if TYPE_CHECKING:
    import torch

TILE_COLUMNS = 16
BLOCK_ROWS = 32
BIT_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True)
class QuantizedSizes:
    """What says how large the tensors of a quantised layer are, whatever its layout.

    Args:
        code_words: 32-bit words of codes a column, fill included.
        num_groups: G.
        zeros: the layer has zero points.
        perm: it has a permutation.
    """

    out_features: int
    in_features: int
    code_words: int
    num_groups: int
    zeros: bool
    perm: bool


@dataclass(frozen=True)
class LinearPlan:
    """A linear layer before anything is read.

    Args:
        name: the layer's own name, e.g. `model.layers.0.self_attn.q_proj`.
        format: `exl2`, `gptq` or `dense`.
        in_features: K.
        out_features: N as the model needs it (padding columns not counted).
        specs: the tensors it will occupy, keyed by their role (`codes`, `scales`, `zeros`,
            `groups`, `perm`, `bias`, or `weight` for dense).
        source: prefix of its tensors in the checkpoint; differs from `name` for fused ones.
        rows: (first, end) output rows of a fused source tensor, None where it is whole.
        options: what the format needs to know to read it (bits, group size, layout).
    """

    name: str
    format: str
    in_features: int
    out_features: int
    specs: dict[str, TensorSpec]
    source: str
    rows: tuple[int, int] | None = None
    options: dict = field(default_factory=dict)

    @property
    def stored_rows(self) -> int:
        """Rows that a product's scratch is planned for: K, and where several groups are filled
        up to whole blocks, those rows as well."""
        filled = self.options.get("blocks", 0) * BLOCK_ROWS
        is_filled = "codes" in self.specs and filled >= self.in_features + BLOCK_ROWS
        return filled if is_filled else self.in_features


@dataclass
class PackedLinear:
    """A quantised linear layer on its device, in the layout above.

    `native` is the compiled operations' own description of it (`backends/cpu/library.py`).
    """

    in_features: int
    out_features: int
    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    native: Any = field(default=None, repr=False, compare=False)


@dataclass
class DenseLinear:
    """An unquantised linear layer on its device.

    `weight` is [tiles, in_features, 16] in the checkpoint's own dtype (float16, bfloat16 or
    float32): element (t, k, i) multiplies input k into output 16*t + i; rows beyond
    out_features are zero. `bias` is float32 [out_features] or None. `native` as above.
    """

    in_features: int
    out_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    native: Any = field(default=None, repr=False, compare=False)
