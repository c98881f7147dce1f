"""What the operations in main memory have in common, compiled or by definition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats.layer import DenseLayer, QuantizedLayer
from . import top_logits
from .cpu.layout import PackedLinear, check_room, fill_tiles, group_table
from .cpu_access import CpuAccess, InPlaceAccess
from .layouts import pack_dense, place_bias, whole_layer

if TYPE_CHECKING:
    import torch

    from .base import ExpertTable, Linear

@dataclass(frozen=True)
class ExpertLayers:
    """One projection of all experts.

    Args:
        layers: in the order of experts.
    """

    layers: tuple[Linear, ...]
    in_features: int
    out_features: int


class MainMemoryOps(ABC):
    """Operations of `base.DeviceOps` that need no kernel, because the CPU can read all values."""

    adds_key_bias = True
    decode_rows: int | None = None
    cpu_access: CpuAccess = InPlaceAccess()
    needs_upload_buffer = False
    upload_buffer: torch.Tensor | None = None
    load_threads = 1

    @abstractmethod
    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        """See `base.Ops.linear`."""

    @abstractmethod
    def pack_words(self, words: torch.Tensor, first: int, groups: torch.Tensor,
                   codes: torch.Tensor) -> None:
        """Repack blocks of codes whose stored rows are in the order of the file.

        The parts of a layer may be packed in any order. Together they write `codes` in full.

        Args:
            words: int32 [R, N], word rows of the file from `first` on, which begin and end
                between blocks.
            first: the first of these word rows.
            groups: int32 [G, 4], the packed layout's group table.
            codes: uint8 [tiles, tile_bytes] (`cpu/layout.py`).
        """

    @abstractmethod
    def pack_gptq(self, qweight: torch.Tensor, bits: int, perm: torch.Tensor | None,
                  groups: torch.Tensor, codes: torch.Tensor) -> None:
        """Repack codes whose stored rows are in any order.

        Args:
            qweight: int32 [K * bits / 32, N], as on disk.
            perm: int32 [K], stored row r takes input channel perm[r]; None is the identity.
            groups, codes: as those of `pack_words`; `codes` is written in full.
        """

    def pack(self, layer: QuantizedLayer | DenseLayer, views: dict[str, torch.Tensor]) -> Linear:
        if isinstance(layer, DenseLayer):
            return pack_dense(layer, views)
        import torch

        codes, perm = views["codes"], None
        table = group_table(layer.groups)
        check_room(layer, table, codes.shape[1])
        if layer.perm is not None:
            views["perm"].copy_(layer.perm)
            perm = views["perm"] if layer.permutes else None
        views["groups"].copy_(torch.tensor(table, dtype=torch.int32))
        fill_tiles(layer.scales, views["scales"])
        if layer.by_group or (perm is None and layer.has_whole_blocks):
            for first, end in layer.pieces():
                words = layer.read_words(first, end).contiguous()
                self.pack_words(words, first, views["groups"], codes)
        else:
            # `pack_gptq` itself uses all threads.
            with whole_layer:
                words = layer.words.contiguous()
                self.pack_gptq(words, layer.groups[0][0], perm, views["groups"], codes)
        units, zeros = None, None
        if layer.scale_units is not None:
            units = views["scale_units"].copy_(layer.scale_units)
        if layer.zeros is not None:
            zeros = views["zeros"]
            fill_tiles(layer.zeros, zeros)
        return PackedLinear(
            layer.in_features, layer.out_features, codes, views["scales"], views["groups"],
            scale_units=units, zeros=zeros, perm=perm, bias=place_bias(layer.bias, views),
        )

    def expert_table(self, layers: Sequence[Linear], room: torch.Tensor) -> ExpertTable | None:
        return ExpertLayers(tuple(layers), layers[0].in_features, layers[0].out_features)

    def linear_pairs(self, x: torch.Tensor, table: ExpertTable, experts: torch.Tensor,
                     out: torch.Tensor, scratch: torch.Tensor) -> None:
        assert isinstance(table, ExpertLayers)
        share = experts.numel() // max(1, x.shape[0])
        for pair, expert in enumerate(experts.reshape(-1).tolist()):
            row = pair // share
            self.linear(x[row : row + 1], table.layers[expert], out[pair : pair + 1], scratch)

    def moe_sum(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
                out: torch.Tensor) -> None:
        rows, top_k = experts.shape
        order = experts.argsort(dim=1, stable=True)
        pairs = x.view(rows, top_k, -1)
        for k in order.unbind(dim=1):
            index = k[:, None]
            chosen = pairs.gather(1, index[:, :, None].expand(-1, -1, pairs.shape[2]))
            out += weights.gather(1, index) * chosen[:, 0]

    def top_logits(self, logits: torch.Tensor, vocab_size: int, out: torch.Tensor,
                   scratch: torch.Tensor) -> None:
        for row, words in zip(logits.numpy(), out.numpy(), strict=True):
            top_logits.write_result(row[:vocab_size], words)

    def read_through(self, buffer: torch.Tensor) -> int:
        import torch

        buffer.view(torch.int32).sum()
        nbytes: int = buffer.nbytes
        return nbytes

    def share_permutations(self, layers: Sequence[Linear]) -> None:
        """Do nothing: each product permutes its input."""
        return
