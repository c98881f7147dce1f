"""Linear layers as launches of compiled kernels.

Few rows are decoded: passes of up to 16 rows, each reading all weights. Many rows go through
tensor cores. A row's result is the same bits either way, so where one ends and the other
begins is a matter of speed alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...formats.packed import DenseLinear
from ...formats.packed_cuda import (
    StreamLinear,
    blocks_for,
    tiles_for,
    windows_for,
)
from .linear_structs import (
    MAX_LAYERS,
    DecodeStruct,
    LayerStruct,
    RowsStruct,
    address,
    layer_struct,
)
from .ops_pack import PackOps
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

Launch = Callable[[], None]

_WARP = 32
# csrc/cuda/linear_quantize.cu: windows a block, threads.
_QUANTIZE_WINDOWS = 4
_QUANTIZE_THREADS = 128
# csrc/cuda/linear_decode.cu: bytes of a warp's ring. Cards that give a block so much shared
# memory have room for deep rings without fewer warps; others keep enough under way without.
_RING_BYTES = 4096
_DEEP_RING_BYTES = 8192
_DEEP_SHARED_BYTES = 160 << 10
_LEAST_DECODE_WARPS = 8
_DECODE_PASSES = (4, 8, 16)
# Up to here a pass more costs less than what prefill leaves idle; beyond, where it has blocks
# for every multiprocessor.
_MOST_DECODE_ROWS = 32
# csrc/cuda/linear_prefill.cu.
_PREFILL_THREADS = 256
_PREFILL_TILES = 4
_PREFILL_ROWS = (64, 32)
_PREFILL_ROW_BYTES = 256 + 32
# csrc/cuda/linear_dense.cu.
_DENSE_THREADS = 256
_DENSE_PARTS = 32
_DENSE_PASSES = (1, 4, 8)
_DENSE_MOST_DECODE_ROWS = 32
_DENSE_TILE_COLUMNS = 16
_DENSE_PREFILL_TILES = 4
_DENSE_PREFILL_ROWS = 64
_DENSE_PREFILL_BYTES = 16 * (64 + 64 + 4) * 4

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class LinearOps(PackOps):
    """Matrix products with resident layers, and packing of layers at load.

    Args:
        launcher: runs kernels.
    """

    def prepare_linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor,
                       scratch: torch.Tensor, add: bool = False) -> Launch:
        """Prepare out = x @ W + bias, or out += ... where `add`; `interface.Ops.linear`."""
        if isinstance(w, DenseLinear):
            return self._prepare_dense(x, w, out, add)
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
        return _in_order(launches)

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
            return _in_order([])
        codes, notes = _carve(scratch, pairs, features)
        quantize = self.launcher.prepare(
            "quantize_pairs_kernel", _quantize_grid(features, pairs), _QUANTIZE_THREADS, 0,
            _P(x.data_ptr()), layers.address, _P(address(experts)), _I32(share), _I32(features),
            codes, notes,
        )
        warps = max(_LEAST_DECODE_WARPS, layers.splits)
        blocks = -(-tiles_for(layers.out_features) * layers.splits // warps)
        multiply = self.launcher.prepare(
            "linear_decode_pairs_kernel", (blocks, pairs, 1), warps * _WARP, warps * _RING_BYTES,
            layers.address, _P(address(experts)), codes, notes, _P(out.data_ptr()),
            _I64(out.stride(0)),
        )
        return _in_order([quantize, multiply])

    def _pass(self, x: torch.Tensor, layers: Sequence[StreamLinear],
              outs: Sequence[torch.Tensor], scratch: torch.Tensor, add: bool) -> list[Launch]:
        """Prepare the launches of up to PASS_ROWS rows."""
        rows, features = x.shape
        structs = [layer_struct(w) for w in layers]
        assert x.is_contiguous() and 0 < len(layers) == len(outs) <= MAX_LAYERS
        for w, out in zip(layers, outs, strict=True):
            assert w.in_features == features and w.perm is layers[0].perm
            assert out.shape[0] == rows and out.shape[1] >= w.out_features and out.stride(1) == 1
        codes, notes = _carve(scratch, rows, features)
        if rows == 1 and self._fits_beside_rings(structs):
            return [self._decode(structs, outs, RowsStruct(None, None, 1), add, raw=x)]
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

    def _fits_beside_rings(self, layers: Sequence[LayerStruct]) -> bool:
        """Whether a block has shared memory for a row of activations as well."""
        needed = _decode_warps(layers) * self._ring_bytes() + _row_bytes(layers[0].in_features)
        return needed <= self.launcher.shared_limit_bytes

    def _decode(self, layers: Sequence[LayerStruct], outs: Sequence[torch.Tensor],
                x: RowsStruct, add: bool, raw: torch.Tensor | None = None) -> Launch:
        """Prepare the launch that decodes; `raw` is a single row that it quantises itself."""
        pass_rows = next((n for n in _DECODE_PASSES if n >= x.rows), _DECODE_PASSES[-1])
        passes = -(-x.rows // pass_rows)
        warps, ring_bytes = _decode_warps(layers), self._ring_bytes()
        shared_bytes = warps * ring_bytes
        if raw is not None:
            pass_rows, shared_bytes = 1, shared_bytes + _row_bytes(layers[0].in_features)
        first_block = [0]
        for layer in layers:
            tiles_a_block = warps // layer.splits
            first_block.append(first_block[-1] + -(-tiles_for(layer.out_features) // tiles_a_block))
        call = DecodeStruct(
            (LayerStruct * MAX_LAYERS)(*layers),
            (_P * MAX_LAYERS)(*(out.data_ptr() for out in outs)),
            (_I64 * MAX_LAYERS)(*(out.stride(0) for out in outs)),
            (_I32 * (MAX_LAYERS + 1))(*first_block),
            passes, add, x, address(raw),
        )  # fmt: skip
        depth = "_deep" if ring_bytes == _DEEP_RING_BYTES else ""
        return self.launcher.prepare(
            f"linear_decode_{pass_rows}{depth}_kernel", (first_block[-1] * passes, 1, 1),
            warps * _WARP, shared_bytes, call,
        )

    def _prefill(self, layer: LayerStruct, out: torch.Tensor, x: RowsStruct,
                 add: bool) -> Launch:
        columns = -(-tiles_for(layer.out_features) // _PREFILL_TILES)
        for block_rows in _PREFILL_ROWS:
            shared_bytes = 2 * (
                block_rows * _PREFILL_ROW_BYTES + _PREFILL_TILES * layer.window_bytes
            )
            blocks = -(-x.rows // block_rows)
            fills = blocks * columns >= self.launcher.multiprocessors
            if fills and shared_bytes <= self.launcher.shared_limit_bytes:
                break
        return self.launcher.prepare(
            f"linear_prefill_{block_rows}_kernel", (blocks, columns, 1), _PREFILL_THREADS,
            shared_bytes, layer, x, _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )

    def _prepare_dense(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                       add: bool) -> Launch:
        rows, features = x.shape
        tiles = -(-w.out_features // _DENSE_TILE_COLUMNS)
        assert x.is_contiguous() and features == w.in_features and out.stride(1) == 1
        assert out.shape[0] == rows and out.shape[1] >= w.out_features
        assert w.weight.shape == (tiles, features, _DENSE_TILE_COLUMNS)
        if rows == 0:
            return _in_order([])
        dtype = str(w.weight.dtype).removeprefix("torch.")
        if rows <= _DENSE_MOST_DECODE_ROWS:
            pass_rows = next((n for n in _DENSE_PASSES if n >= rows), _DENSE_PASSES[-1])
            name, grid = f"dense_decode_{pass_rows}", (tiles, -(-rows // pass_rows), 1)
            shared_bytes = _DENSE_PARTS * pass_rows * _DENSE_TILE_COLUMNS * 4
        else:
            name, shared_bytes = "dense_prefill", _DENSE_PREFILL_BYTES
            grid = (-(-rows // _DENSE_PREFILL_ROWS), -(-tiles // _DENSE_PREFILL_TILES), 1)
        return self.launcher.prepare(
            f"{name}_{dtype}_kernel", grid, _DENSE_THREADS, shared_bytes,
            _P(x.data_ptr()), _I32(rows), _I32(features), _I32(w.out_features),
            _P(address(w.weight)), _P(address(w.bias)), _P(out.data_ptr()),
            _I64(out.stride(0)), _I32(add),
        )


class ExpertLayers:
    """The layers of one projection of all experts, for kernels that choose one themselves.

    Args:
        layers: of the same shape, in the order of experts.
        table: uint8 [>= len(layers) * LAYER_BYTES] of the device, written here.
    """

    def __init__(self, layers: Sequence[StreamLinear], table: torch.Tensor):
        import torch

        structs = (LayerStruct * len(layers))(*(layer_struct(w) for w in layers))
        self.in_features, self.out_features = layers[0].in_features, layers[0].out_features
        self.splits = structs[0].splits
        assert all(w.in_features == self.in_features for w in layers)
        assert all(w.out_features == self.out_features for w in layers)
        raw = torch.frombuffer(bytearray(structs), dtype=torch.uint8)
        table[: len(raw)].copy_(raw)
        # Kernels read the layers' tensors and the table by address.
        self.layers, self.table = tuple(layers), table
        self.address = _P(address(table))


def _decode_warps(layers: Sequence[LayerStruct]) -> int:
    """Warps of a block that decodes: one a split, and several tiles where there are few."""
    return max(_LEAST_DECODE_WARPS, *(layer.splits for layer in layers))


def _row_bytes(in_features: int) -> int:
    """Shared memory of one quantised row: its notes and its integers."""
    return windows_for(in_features) * NOTE_BYTES + blocks_for(in_features) * BLOCK_CODE_BYTES


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


def _in_order(launches: Sequence[Launch]) -> Launch:
    if len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for run in launches:
            run()

    return launch
