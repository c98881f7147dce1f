"""Linear layers as launches of compiled kernels.

Few rows are decoded: passes of up to 8 rows, each reading all weights. Many rows go through
tensor cores. A row's result is the same bits either way, so where one ends and the other
begins is a matter of speed alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...formats.packed import DenseLinear
from .layout import MAX_SPLITS, StreamLinear, blocks_for, tiles_for, windows_for
from .linear_structs import (
    MAX_LAYERS,
    DecodeStruct,
    ExpertLayers,
    LayerStruct,
    RowSourceStruct,
    RowsStruct,
    address,
    layer_struct,
)
from .ops_dense import DenseOps
from .ops_pack import PackOps
from .ops_rows import ACTIVATIONS, NORM_HEAD_SIZE, Launch, in_order, nothing
from .scratch_linear import (
    BLOCK_CODE_BYTES,
    NOTE_BYTES,
    PASS_ROWS,
    code_bytes,
    note_bytes,
)

if TYPE_CHECKING:
    import torch

    Linear = StreamLinear | DenseLinear

_WARP = 32
# csrc/cuda/linear_quantize.cu: windows a block, threads.
_QUANTIZE_WINDOWS = 4
_QUANTIZE_THREADS = 128
# csrc/cuda/linear_decode.cu: bytes of a warp's ring. Cards that give a block so much shared
# memory have room for deep rings without fewer warps; others keep enough under way without.
_CHUNK_BYTES = 1024
_RING_BYTES = 4 * _CHUNK_BYTES
_DEEP_RING_BYTES = 8 * _CHUNK_BYTES
_DEEP_SHARED_BYTES = 160 << 10
_LEAST_DECODE_WARPS = 8
_DECODE_PASSES = (4, 8)
_PLAIN_ROW, _NORM_ROW, _GATED_ROW = 0, 1, 2
_NORM_PART_BYTES = 64
# Up to here a pass more costs less than what prefill leaves idle; beyond, where it has blocks
# for every multiprocessor.
_MOST_DECODE_ROWS = 32
# csrc/cuda/linear_prefill.cu.
_PREFILL_THREADS = 256
_PREFILL_TILES = 4
_PREFILL_ROWS = (64, 32)
_PREFILL_ROW_BYTES = 256 + 32

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p

_ONE_ROW = RowsStruct(None, None, 1)


class LinearOps(PackOps, DenseOps):
    """Matrix products with resident layers, and packing of layers at load.

    Args:
        launcher: runs kernels.
    """

    def prepare_linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor,
                       scratch: torch.Tensor, add: bool = False) -> Launch:
        """Prepare out = x @ W + bias, or out += ... where `add`; `interface.Ops.linear`."""
        if isinstance(w, DenseLinear):
            return self.prepare_dense_linear(x, w, out, scratch, add)
        return self.prepare_linears(x, [w], [out], scratch, add)

    def prepare_linears(self, x: torch.Tensor, layers: Sequence[StreamLinear],
                        outs: Sequence[torch.Tensor], scratch: torch.Tensor,
                        add: bool = False) -> Launch:
        """Prepare up to 3 products of one input, whose layers have the same permutation.

        The input is quantised once, and few rows take one launch for all layers.

        Args:
            x: float32 [T, in_features]. outs: of each layer, float32 [T, >= out_features].
        """
        launches = []
        for first in range(0, x.shape[0], PASS_ROWS):
            rows = slice(first, first + PASS_ROWS)
            launches += self._pass(x[rows], layers, [out[rows] for out in outs], scratch, add)
        return in_order(launches)

    def prepare_normed_linears(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                               normed: torch.Tensor, layers: Sequence[StreamLinear],
                               outs: Sequence[torch.Tensor], add: bool = False) -> Launch | None:
        """Prepare `rms_norm` of a single row and products with it, in one launch.

        Args:
            x, normed: float32 [1, in_features], not the same. weight: float32 [in_features].

        Returns:
            None where it cannot be one launch; then the operations are to be run by themselves.
        """
        narrow = x.shape[1] <= NORM_HEAD_SIZE  # these have a norm of another order of sums
        if narrow or normed.data_ptr() == x.data_ptr() or not self._takes_row(x, layers):
            return None
        row = RowSourceStruct(address(x), address(weight), address(normed), eps, _NORM_ROW)
        return self._decode(_checked_structs(x, layers, outs), outs, _ONE_ROW, add, row)

    def prepare_gated_linear(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
                             w: StreamLinear, out: torch.Tensor,
                             add: bool = False) -> Launch | None:
        """Prepare a product with activation(gate) * up of a single row, in one launch.

        `gate` stays as it is. Arguments as `Ops.gate`'s and `Ops.linear`'s; returns as above.
        """
        if gate.shape != up.shape or not self._takes_row(gate, [w]):
            return None
        kind = _GATED_ROW + ACTIVATIONS[activation]
        row = RowSourceStruct(address(gate), address(up), None, 0.0, kind)
        return self._decode(_checked_structs(gate, [w], [out]), [out], _ONE_ROW, add, row)

    def prepare_linear_pairs(self, x: torch.Tensor, layers: ExpertLayers,
                             experts: torch.Tensor, out: torch.Tensor,
                             scratch: torch.Tensor) -> Launch:
        """Prepare out[p] = x[p // share] @ W of expert experts[p], chosen on the device.

        Args:
            x: float32 [T, in_features]. experts: int32 [T, k] or [P]. out: float32
            [P, out_features], P pairs; share is P / T: 1 where each pair has a row of its own.
        """
        pairs, features = experts.numel(), layers.in_features
        share = pairs // max(1, x.shape[0])
        assert x.is_contiguous() and x.shape == (pairs // max(1, share), features)
        assert out.is_contiguous() and out.shape == (pairs, layers.out_features)
        if pairs == 0:
            return nothing
        codes, notes = _carve(scratch, pairs, features)
        quantize = self.launcher.prepare(
            "quantize_pairs_kernel", _quantize_grid(features, pairs), _QUANTIZE_THREADS, 0,
            _P(x.data_ptr()), layers.address, _P(address(experts)), _I32(share), _I32(features),
            codes, notes,
        )
        warps = max(_LEAST_DECODE_WARPS, layers.row_splits)
        blocks = -(-tiles_for(layers.out_features) * layers.row_splits // warps)
        multiply = self.launcher.prepare(
            "linear_decode_pairs_kernel", (blocks, pairs, 1), warps * _WARP, warps * _RING_BYTES,
            layers.address, _P(address(experts)), codes, notes, _P(out.data_ptr()),
            _I64(out.stride(0)),
        )
        return in_order([quantize, multiply])

    def _pass(self, x: torch.Tensor, layers: Sequence[StreamLinear],
              outs: Sequence[torch.Tensor], scratch: torch.Tensor, add: bool) -> list[Launch]:
        """Prepare the launches of up to PASS_ROWS rows."""
        rows, features = x.shape
        structs = _checked_structs(x, layers, outs)
        if self._takes_row(x, layers):
            row = RowSourceStruct(address(x), None, None, 0.0, _PLAIN_ROW)
            return [self._decode(structs, outs, _ONE_ROW, add, row)]
        codes, notes = _carve(scratch, rows, features)
        quantize = self.launcher.prepare(
            "quantize_rows_kernel", _quantize_grid(features, rows), _QUANTIZE_THREADS, 0,
            _P(x.data_ptr()), _P(address(layers[0].perm)), _I32(features), codes, notes,
        )
        activations = RowsStruct(codes.value, notes.value, rows)
        if rows <= _MOST_DECODE_ROWS:
            return [quantize, self._decode(structs, outs, activations, add)]
        return [quantize] + [
            self._prefill(struct, out, activations, add)
            for struct, out in zip(structs, outs, strict=True)
        ]

    def _ring_bytes(self) -> int:
        deep = self.launcher.shared_limit_bytes >= _DEEP_SHARED_BYTES
        return _DEEP_RING_BYTES if deep else _RING_BYTES

    def _takes_row(self, x: torch.Tensor, layers: Sequence[StreamLinear]) -> bool:
        """Whether this is a single row, and a block has shared memory for it beside its rings."""
        warps = _decode_warps(list(map(layer_struct, layers)))
        return x.shape[0] == 1 and self._row_fits(warps, x.shape[1])

    def _row_fits(self, warps: int, in_features: int) -> bool:
        needed = warps * self._ring_bytes() + _row_bytes(in_features)
        return needed <= self.launcher.shared_limit_bytes

    def _row_warps(self, layers: Sequence[LayerStruct]) -> int:
        """Warps of a block that makes a row: many, since each block makes all of it.

        With twice as many blocks as multiprocessors, larger ones leave none without work.
        """
        blocks = sum(-(-tiles_for(w.out_features) * w.row_splits // MAX_SPLITS) for w in layers)
        enough = blocks >= 2 * self.launcher.multiprocessors
        fits = self._row_fits(MAX_SPLITS, layers[0].in_features)
        return MAX_SPLITS if enough and fits else _decode_warps(layers)

    def _decode(self, layers: Sequence[LayerStruct], outs: Sequence[torch.Tensor],
                x: RowsStruct, add: bool, row: RowSourceStruct | None = None) -> Launch:
        """Prepare the launch that decodes; `row` is a single one that it makes itself."""
        pass_rows = next((n for n in _DECODE_PASSES if n >= x.rows), _DECODE_PASSES[-1])
        passes = -(-x.rows // pass_rows)
        warps, ring_bytes = _decode_warps(layers), self._ring_bytes()
        row_bytes = 0
        if row is not None:
            pass_rows, warps = 1, self._row_warps(layers)
            row_bytes = _row_bytes(layers[0].in_features)
        first_block = [0]
        for layer in layers:
            tiles_a_block = warps // layer.row_splits
            first_block.append(first_block[-1] + -(-tiles_for(layer.out_features) // tiles_a_block))
        call = DecodeStruct(
            (LayerStruct * MAX_LAYERS)(*layers),
            (_P * MAX_LAYERS)(*(out.data_ptr() for out in outs)),
            (_I64 * MAX_LAYERS)(*(out.stride(0) for out in outs)),
            (_I32 * (MAX_LAYERS + 1))(*first_block),
            passes, add, ring_bytes // _CHUNK_BYTES, x, row or RowSourceStruct(),
        )  # fmt: skip
        return self.launcher.prepare(
            f"linear_decode_{pass_rows}_kernel", (first_block[-1] * passes, 1, 1),
            warps * _WARP, warps * ring_bytes + row_bytes, call,
        )

    def _prefill(self, layer: LayerStruct, out: torch.Tensor, x: RowsStruct,
                 add: bool) -> Launch:
        columns = -(-tiles_for(layer.out_features) // _PREFILL_TILES)
        for block_rows in _PREFILL_ROWS:
            shared_bytes = 2 * (
                block_rows * _PREFILL_ROW_BYTES + _PREFILL_TILES * layer.row_block_bytes
            )
            blocks = -(-x.rows // block_rows)
            fills = blocks * columns >= self.launcher.multiprocessors
            if fills and shared_bytes <= self.launcher.shared_limit_bytes:
                break
        return self.launcher.prepare(
            f"linear_prefill_{block_rows}_kernel", (blocks, columns, 1), _PREFILL_THREADS,
            shared_bytes, layer, x, _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )


def _checked_structs(x: torch.Tensor, layers: Sequence[StreamLinear],
                     outs: Sequence[torch.Tensor]) -> list[LayerStruct]:
    """Describe layers that are to multiply one input."""
    rows, features = x.shape
    assert x.is_contiguous() and 0 < len(layers) == len(outs) <= MAX_LAYERS
    for w, out in zip(layers, outs, strict=True):
        assert w.in_features == features and w.perm is layers[0].perm
        assert out.shape[0] == rows and out.shape[1] >= w.out_features and out.stride(1) == 1
    return [layer_struct(w) for w in layers]


def _decode_warps(layers: Sequence[LayerStruct]) -> int:
    """Warps of a block that decodes: one a split, and several tiles where there are few."""
    return max(_LEAST_DECODE_WARPS, *(layer.row_splits for layer in layers))


def _row_bytes(in_features: int) -> int:
    """Shared memory of one quantised row: parts of its norm, its notes and its integers."""
    notes = windows_for(in_features) * NOTE_BYTES
    return _NORM_PART_BYTES + notes + blocks_for(in_features) * BLOCK_CODE_BYTES


def _quantize_grid(in_features: int, rows: int) -> tuple[int, int, int]:
    return -(-windows_for(in_features) // _QUANTIZE_WINDOWS), rows, 1


def _carve(scratch: torch.Tensor, rows: int, in_features: int
           ) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Find places for the integers and the notes of `rows` rows in scratch."""
    from .scratch import COUNTER_BYTES

    codes = code_bytes(rows, in_features)
    assert COUNTER_BYTES + codes + note_bytes(rows, in_features) <= scratch.nbytes
    start = scratch.data_ptr() + COUNTER_BYTES
    return _P(start), _P(start + codes)
