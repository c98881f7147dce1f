"""A quantised layer as its file holds it, checked: what formats hand to a device's operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..utils.integers import ceil_div

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]

# Bytes of an unquantised weight that are read at a time.
PIECE_BYTES = 16 << 20
# Rows whose codes of b bits are b whole words.
STREAM_ROWS = 32


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantised linear layer with K inputs, N outputs and G groups, on the CPU.

    A group's rows follow each other in *stored order*: stored row r takes input channel perm[r].

        value(stored row r of group g, column n) = scales[g, n] * (code - zeros[g, n])

    Args:
        folder: the model folder. source: prefix of its tensors in the checkpoint; both are for
            messages.
        in_features: K. out_features: N.
        groups: (bits, rows) of each, in stored order.
        words: int32 [R, >= N], a bit stream of codes a column, least significant bit first.
            Columns from N on are padding. Not contiguous where the layer is a part of a fused
            tensor.
        by_group: True where rows are in stored order and every group begins with a whole word
            (EXL2). False where row r is input channel r and all groups have the same bits (GPTQ).
        scales: float16 [G, N].
        zeros: uint8 [G, N]; None where every zero point is 2^(bits - 1) and values are rounded to
            float16 (EXL2).
        perm: int32 [K]; None where the file has none.
        bias: float32 [N], or None.
    """

    folder: str
    source: str
    in_features: int
    out_features: int
    groups: list[tuple[int, int]]
    words: torch.Tensor
    by_group: bool
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def permutes(self) -> bool:
        """Whether stored order differs from the order of the input channels."""
        import torch

        if self.perm is None:
            return False
        return not torch.equal(self.perm, torch.arange(self.in_features, dtype=torch.int32))

    def weight(self) -> torch.Tensor:
        """Decode the layer: float32 [K, N], rows in the order of the input channels."""
        import numpy as np
        import torch

        words = self.words[:, : self.out_features].numpy().view(np.uint32)
        order = torch.arange(self.in_features) if self.perm is None else self.perm.long()
        weight = torch.empty(self.in_features, self.out_features)
        scales = self.scales.float()
        all_codes = None
        if not self.by_group:
            all_codes = torch.from_numpy(
                unpack_stream(words, self.groups[0][0], self.in_features)
            )
        first, word = 0, 0
        for group, (bits, rows) in enumerate(self.groups):
            channels = order[first : first + rows]
            if all_codes is not None:
                codes = all_codes[channels]
            else:
                taken = ceil_div(rows * bits, 32)
                codes = torch.from_numpy(unpack_stream(words[word : word + taken], bits, rows))
                word += taken
            zero = 1 << (bits - 1) if self.zeros is None else self.zeros[group].float()
            values = (codes.float() - zero) * scales[group]
            weight[channels] = values.half().float() if self.zeros is None else values
            first += rows
        return weight


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """An unquantised linear layer with K inputs and N outputs.

    Args:
        in_features: K. out_features: N.
        dtype: of the weight, a key of `table.DTYPE_BYTES`.
        read_rows: reads output rows first..end of the weight, [end - first, K], checked. The
            weight is read in pieces of PIECE_BYTES, because a whole embedding beside its resident
            copy would double a load's peak.
        bias: float32 [N], or None.
    """

    in_features: int
    out_features: int
    dtype: str
    read_rows: Callable[[int, int], torch.Tensor]
    bias: torch.Tensor | None

    def weight(self) -> torch.Tensor:
        """Read the layer: float32 [K, N]."""
        return self.read_rows(0, self.out_features).float().t().contiguous()


def unpack_stream(words: Array, bits: int, rows: int) -> Array:
    """Read codes of `bits` bits that follow each other, least significant bit first.

    Args:
        words: uint32 [W, N], one stream a column, W >= ceil(rows * bits / 32).

    Returns:
        uint8 [rows, N].
    """
    import numpy as np

    blocks, columns = ceil_div(rows, STREAM_ROWS), words.shape[1]
    if words.shape[0] < blocks * bits:
        fill = np.zeros((blocks * bits - words.shape[0], columns), np.uint32)
        words = np.concatenate([words, fill])
    stream = words[: blocks * bits].reshape(blocks, bits, columns)
    codes = np.empty((blocks, STREAM_ROWS, columns), np.uint8)
    for row in range(STREAM_ROWS):
        word, shift = divmod(row * bits, 32)
        field = stream[:, word] >> shift
        if shift + bits > 32:
            field |= stream[:, word + 1] << (32 - shift)
        codes[:, row] = field & ((1 << bits) - 1)
    return codes.reshape(-1, columns)[:rows]
