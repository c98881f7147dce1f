"""Linear layers as their files hold them: specs from headers, and layers read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..utils.integers import ceil_div

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]

# Threads on which layers are read at once, at most. Each holds a piece of a layer, so more threads
# would take more memory beside the buffers.
LOAD_THREADS = 4
# Bytes of unquantised weights that are read at a time, by all threads of a load together.
PIECE_BYTES = 16 << 20
# Bytes of codes and of tables that are read at a time. They stay in the second level cache until
# they are packed.
READ_BYTES = 768 << 10
# Rows of a block: their codes of b bits are b whole words. Devices keep whole blocks.
BLOCK_ROWS = 32


# The output rows of a layer in a fused source tensor, in the layer's order.
RowRanges = tuple[range, ...]


@dataclass(frozen=True)
class QuantizedSizes:
    """How large a quantised layer is: what the size of its resident tensors depends on.

    Args:
        in_features: K. out_features: N, without padding.
        code_words: 32-bit words of codes a column, with the rows that fill groups up to whole
            blocks.
        num_groups: G.
        zero_bits: bits of a zero point on a device, 4 or 8; 0 where the layer has none.
        perm: it has a permutation.
        blocks: blocks of stored rows, where every group has whole blocks.
        whole_blocks: False where groups before the last are no whole blocks.
    """

    out_features: int
    in_features: int
    code_words: int
    num_groups: int
    zero_bits: int
    perm: bool
    blocks: int = 0
    whole_blocks: bool = True

    @property
    def stored_rows(self) -> int:
        """K, or where several groups are filled up to whole blocks, their rows with the fill."""
        filled = self.blocks * BLOCK_ROWS
        return filled if filled >= self.in_features + BLOCK_ROWS else self.in_features


@dataclass(frozen=True)
class DenseSizes:
    """How large an unquantised layer is; `dtype` is that of its weight."""

    out_features: int
    in_features: int
    dtype: str


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer before its values are read.

    Args:
        name: the layer's own name, e.g. `model.layers.0.self_attn.q_proj`.
        format: `exl2`, `gptq` or `dense`.
        in_features: K.
        out_features: N as the model needs it (padding columns not counted).
        sizes: what its resident tensors depend on.
        has_bias: whether it has a bias, float32 [N].
        source: prefix of its tensors in the checkpoint; differs from `name` for fused ones.
        rows: output rows of a fused source tensor, None where it is whole.
        options: what the format needs to know to read it (bits, group size, layout; for an
            unquantised layer whether it is stored transposed).
    """

    name: str
    format: str
    in_features: int
    out_features: int
    sizes: QuantizedSizes | DenseSizes
    has_bias: bool
    source: str
    rows: RowRanges | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantised linear layer with K inputs, N outputs and G groups, on the CPU.

    A group's rows follow each other in *stored order*: stored row r takes input channel perm[r].

        value(stored row r of group g, column n) = scale[g, n] * (code - zeros[g, n])

    Scales are those of the file. GPTQ stores each as a float16. EXL2 stores a level of 4 bits for
    each, and a unit for each group (`scale_values`).

    Args:
        folder: the model folder. source: prefix of its tensors in the checkpoint; both are for
            messages.
        in_features: K. out_features: N.
        groups: (bits, rows) of each, in stored order.
        word_rows: R.
        read_words: reads rows first..end of the codes, int32 [end - first, >= N] of int32
            [R, >= N]: a bit stream a column, least significant bit first. Columns from N on are
            padding. Not contiguous where the layer is a part of a fused tensor.
        by_group: True where rows are in stored order and every group begins with a whole word
            (EXL2). False where row r is input channel r and all groups have the same bits (GPTQ).
        scales: float16 [G, N]; with `scale_units`, levels from 0 to 15, uint8 [G, N] (EXL2).
        scale_units: float16 [G]; None where scales are float16 (GPTQ).
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
    word_rows: int
    read_words: Callable[[int, int], torch.Tensor]
    by_group: bool
    scales: torch.Tensor
    scale_units: torch.Tensor | None
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def words(self) -> torch.Tensor:
        """Read all codes, int32 [R, >= N]."""
        return self.read_words(0, self.word_rows)

    @property
    def has_whole_blocks(self) -> bool:
        """Whether only the last group may end within a block of stored rows."""
        return all(rows % BLOCK_ROWS == 0 for _, rows in self.groups[:-1])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Cut the codes into ranges (first, end) of rows of about READ_BYTES, each between
        blocks of stored rows.
        """
        row_bytes = 4 * self.out_features
        begin = end = 0
        for bits, rows in self.groups:
            blocks = ceil_div(rows, BLOCK_ROWS)
            for _ in range(blocks):
                if end > begin and (end + bits - begin) * row_bytes > READ_BYTES:
                    yield begin, end
                    begin = end
                end += bits
        yield begin, self.word_rows

    @property
    def zero_bits(self) -> int:
        """Bits of a zero point on a device; 0 where the layer has none."""
        if self.zeros is None:
            return 0
        return max(zero_bits_for(bits) for bits, _ in self.groups)

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
        if self.scale_units is not None:
            scales = scale_values(self.scales, self.scale_units[:, None]).float()
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
        reads_whole: each call of `read_rows` reads the whole layer, because its rows are strewn
            over the file.
    """

    in_features: int
    out_features: int
    dtype: str
    read_rows: Callable[[int, int], torch.Tensor]
    bias: torch.Tensor | None
    reads_whole: bool = False

    def weight(self) -> torch.Tensor:
        """Read the layer: float32 [K, N]."""
        return self.read_rows(0, self.out_features).float().t().contiguous()


def zero_bits_for(bits: int) -> int:
    """Return the bits in which a device keeps a zero point of `bits` bits."""
    return 4 if bits <= 4 else 8


def scale_values(levels: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Return the scales of EXL2 levels: half((level + 1)^2 * unit).

    Args:
        levels: integers from 0 to 15.
        units: float16, broadcast against `levels`.

    Returns:
        float16.
    """
    roots = levels.short() + 1
    return (roots * roots).half() * units


def unpack_stream(words: Array, bits: int, rows: int) -> Array:
    """Read codes of `bits` bits that follow each other, least significant bit first.

    Args:
        words: uint32 [W, N], one stream a column, W >= ceil(rows * bits / 32).

    Returns:
        uint8 [rows, N].
    """
    import numpy as np

    blocks, columns = ceil_div(rows, BLOCK_ROWS), words.shape[1]
    if words.shape[0] < blocks * bits:
        fill = np.zeros((blocks * bits - words.shape[0], columns), np.uint32)
        words = np.concatenate([words, fill])
    stream = words[: blocks * bits].reshape(blocks, bits, columns)
    codes = np.empty((blocks, BLOCK_ROWS, columns), np.uint8)
    for row in range(BLOCK_ROWS):
        word, shift = divmod(row * bits, 32)
        field = stream[:, word] >> shift
        if shift + bits > 32:
            field |= stream[:, word + 1] << (32 - shift)
        codes[:, row] = field & ((1 << bits) - 1)
    return codes.reshape(-1, columns)[:rows]
