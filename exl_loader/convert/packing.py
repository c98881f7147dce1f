"""Pack a quantised linear layer into EXL2 tensors.

`formats/exl2.py` describes the layout and reads it: the codes of a column in one group are a bit
stream, least significant bit first, that starts on a new word; a scale is 4 bits, stored as
qs - 1; q_invperm is the inverse of the order in which the rows are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..formats.exl2 import COLUMN_PADDING, effective_scales
from ..utils.integers import ceil_div, round_up
from .mixes import Group


@dataclass
class QuantizedLinear:
    """A linear layer as codes.

    Args:
        groups: (bits, rows) of each group, in stored order. The rows of a group share a scale and
            a width. Only the last group may have a number of rows that is no multiple of 32.
        codes: uint8 [K, N] in stored (permuted) row order.
        qs: integers [G, N], 1 to 16.
        scale_max: float16 [G].
        perm: int64 [K]; stored row r is input channel perm[r].
        out_features: columns of the model; N is out_features rounded up to a multiple of 32.
        bias: [out_features] or None.
    """

    groups: list[Group]
    codes: torch.Tensor
    qs: torch.Tensor
    scale_max: torch.Tensor
    perm: torch.Tensor
    out_features: int
    bias: torch.Tensor | None = None


    def in_main_memory(self) -> QuantizedLinear:
        """Return the layer with its tensors in main memory."""
        return replace(
            self, codes=self.codes.cpu(), qs=self.qs.cpu(), scale_max=self.scale_max.cpu(),
            perm=self.perm.cpu(),
        )


def padded_columns(out_features: int) -> int:
    """Return the number of stored columns, a multiple of 32."""
    return round_up(out_features, COLUMN_PADDING)


def _to_int32(words: torch.Tensor) -> torch.Tensor:
    """Convert the low 32 bits of int64 words to int32, without relying on how casts wrap."""
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack the codes of one group.

    Args:
        codes: integers [rows, N] below 2^bits.
        bits: bits of a code, 1 to 16.

    Returns:
        int32 [ceil(rows * bits / 32), N].
    """
    rows, columns = codes.shape
    num_words = ceil_div(rows * bits, 32)
    bit_starts = torch.arange(rows) * bits
    shifted = codes.to(torch.int64) << (bit_starts % 32)[:, None]
    # One more word for the high half, which is empty, of a last code that ends on a word.
    words = torch.zeros(num_words + 1, columns, dtype=torch.int64)
    # Fields do not overlap, so their sum is their bitwise or.
    words.index_add_(0, bit_starts // 32, shifted & 0xFFFFFFFF)
    words.index_add_(0, bit_starts // 32 + 1, shifted >> 32)
    return _to_int32(words[:num_words])


def pack_scales(qs: torch.Tensor) -> torch.Tensor:
    """Pack scales.

    Args:
        qs: integers [G, N], 1 to 16; N a multiple of 8.

    Returns:
        int32 [G, N / 8].
    """
    nibbles = (qs.to(torch.int64) - 1).view(qs.shape[0], -1, 8)
    return _to_int32((nibbles << (4 * torch.arange(8))).sum(-1))


def exl2_tensors(name: str, layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return all tensors of a layer by their names in the file.

    Args:
        name: the layer's name, e.g. `model.layers.0.self_attn.q_proj`.
        layer: the layer as codes.

    Returns:
        q_weight, q_groups, q_scale, q_scale_max, q_invperm and, if the layer has one, bias.
    """
    by_group = layer.codes.split([group.rows for group in layer.groups])
    packed, first_row, q_groups = [], 0, []
    for group, codes in zip(layer.groups, by_group, strict=True):
        words = pack_codes(codes, group.bits)
        q_groups += [group.bits, first_row]
        first_row += words.shape[0]
        packed.append(words)
    assert first_row < 2**15, f"{name}: {first_row} rows of words do not fit q_groups"
    tensors = {
        "q_weight": torch.cat(packed),
        "q_groups": torch.tensor(q_groups, dtype=torch.int16),
        "q_scale": pack_scales(layer.qs),
        "q_scale_max": layer.scale_max.to(torch.float16),
        "q_invperm": torch.argsort(layer.perm).to(torch.int32),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.to(torch.float16)
    return {f"{name}.{role}": tensor.contiguous() for role, tensor in tensors.items()}


def dequantize(layer: QuantizedLinear) -> torch.Tensor:
    """Decode a layer as the engine does: float16 [in_features, out_features], not permuted."""
    device = layer.codes.device
    rows = torch.tensor([group.rows for group in layer.groups], device=device)
    zeros = torch.tensor([2.0 ** (group.bits - 1) for group in layer.groups], device=device)
    scales = effective_scales(layer.qs, layer.scale_max[:, None]).float()
    centred = layer.codes.float().sub_(zeros.repeat_interleave(rows)[:, None])
    stored = centred.mul_(scales.repeat_interleave(rows, 0)).to(torch.float16)
    weight = torch.empty_like(stored)
    weight[layer.perm] = stored
    return weight[:, : layer.out_features].contiguous()
