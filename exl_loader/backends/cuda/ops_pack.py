"""Quantised layers into the streams of backends/cuda/layout.py, on the device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .layout import TILE_COLUMNS
from .linear_structs import address
from .scratch_linear import staged_bytes

if TYPE_CHECKING:
    import torch

    from .launcher import Launcher

_WARP = 32
# csrc/cuda/pack.cu.
_PACK_WARPS = 4
_PACK_SHARED_BYTES = _PACK_WARPS * 32 * 9 * 4

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class PackOps:
    """Packing of layers at load: `formats.pack_cuda.StreamOps`.

    Args:
        launcher: runs kernels.

    Attributes:
        staging: uint8 [n] of the device that raw weights pass through while a model is being
            loaded, at least `scratch_linear.least_staging_bytes`; None otherwise.
    """

    def __init__(self, launcher: Launcher):
        self.launcher = launcher
        self.staging: torch.Tensor | None = None

    def pack_exl2_streams(self, q_weight: torch.Tensor, scales: torch.Tensor,
                          groups: torch.Tensor, codes: torch.Tensor) -> None:
        """Repack EXL2's codes and scales into streams (backends/cuda/layout.py).

        Args:
            q_weight: int32 [R, N] of the host, the layer's columns alone, as on disk.
            scales: float16 [G, N] of the host. groups, codes: of the device, codes written in
            full.
        """
        codes.zero_()
        for columns, words, tables, target in self._staged(q_weight, scales, None, codes):
            self._launch_pack("pack_exl2_kernel", columns, words,
                              (tables[0],), groups, target, codes.shape[1])

    def pack_gptq_streams(self, qweight: torch.Tensor, scales: torch.Tensor,
                          zeros: torch.Tensor, perm: torch.Tensor | None,
                          groups: torch.Tensor, codes: torch.Tensor) -> None:
        """Repack GPTQ's codes, scales and zero points into streams.

        Args:
            qweight: int32 [K * bits / 32, N] of the host, the layer's columns alone.
            scales: float16 [G, N], zeros: uint8 [G, N] of the host.
            perm: int32 [K] of the device, or None. groups, codes: as above.
        """
        codes.zero_()
        for columns, words, tables, target in self._staged(qweight, scales, zeros, codes):
            self._launch_pack("pack_gptq_kernel", columns, words,
                              (*tables, _P(address(perm))), groups, target, codes.shape[1])

    def _launch_pack(self, kernel: str, columns: int, words: tuple[ctypes.c_void_p, int],
                     tables: tuple[ctypes.c_void_p, ...], groups: torch.Tensor,
                     target: ctypes.c_void_p, tile_bytes: int) -> None:
        _, first, rows, _ = groups[-1].tolist()
        blocks = -(-(first + rows) // 32)
        grid = (blocks, -(-columns // (_PACK_WARPS * TILE_COLUMNS)), 1)
        self.launcher.prepare(
            kernel, grid, _PACK_WARPS * _WARP, _PACK_SHARED_BYTES, words[0], _I64(words[1]),
            _I32(columns), *tables, _P(address(groups)), _I32(groups.shape[0]), target,
            _I64(tile_bytes),
        )()

    def _staged(
        self, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
        codes: torch.Tensor,
    ) -> Iterator[tuple[int, tuple[ctypes.c_void_p, int], tuple[ctypes.c_void_p, ...],
                        ctypes.c_void_p]]:
        """Bring a layer's tensors to the device, as many tiles at a time as staging holds.

        Yields:
            (columns, (words, word rows), (scales[, zeros]), where their first tile belongs).
        """
        staging, (word_rows, out_features), num_groups = self.staging, words.shape, len(scales)
        assert staging is not None, "packing needs staging"
        step = TILE_COLUMNS
        assert staged_bytes(word_rows, num_groups, step) <= staging.nbytes, staging.nbytes
        while (step < out_features
               and staged_bytes(word_rows, num_groups, 2 * step) <= staging.nbytes):
            step *= 2
        for first in range(0, out_features, step):
            part = slice(first, min(first + step, out_features))
            place, views = 0, []
            for tensor in (words, scales, *(() if zeros is None else (zeros,))):
                piece = tensor[:, part]
                nbytes = piece.numel() * piece.element_size()
                view = staging[place : place + nbytes].view(piece.dtype).view(piece.shape)
                view.copy_(piece)
                views.append(_P(view.data_ptr()))
                place += -(-nbytes // 4) * 4
            target = _P(codes[first // TILE_COLUMNS].data_ptr())
            yield part.stop - first, (views[0], word_rows), tuple(views[1:]), target
