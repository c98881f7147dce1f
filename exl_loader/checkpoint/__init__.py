"""The weights of a model folder. Opening reads the headers of its files; tensors are read later.

Opening does not import PyTorch. Tensors are read with plain file reads, because with a memory map
a file that shrinks would end the process with SIGBUS.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from ..utils.errors import InvalidCheckpoint, UnsupportedFormat
from ..utils.system.files import read_at
from .folder import is_quantised, read_folder
from .quantization import Quantization
from .safetensors_header import (
    DOWNLOAD_AGAIN,
    FileIdentity,
    TensorHeader,
    invalid,
    open_weights,
)

if TYPE_CHECKING:
    import torch

    from .config import ModelConfig

__all__ = ["Checkpoint", "TensorHeader", "is_quantised"]


class Checkpoint:
    """The weights of a model folder. Use it as a context manager, or call `close()`.

    Several threads may read tensors at once.

    Attributes:
        model_dir: the folder.
        headers: tensor name -> TensorHeader.
        format: `exl2`, `gptq` or `dense`.
        quantization: the settings of a quantised model; see `Quantization`.
        paths: the files, in order.
    """

    def __init__(
        self,
        model_dir: Path,
        headers: dict[str, TensorHeader],
        identities: dict[Path, FileIdentity],
        format: str,
        quantization: Quantization,
    ) -> None:
        self.model_dir = model_dir
        self.headers = headers
        self.format = format
        self.quantization = quantization
        self.paths = list(identities)
        self._identities = identities
        self._files: dict[Path, BinaryIO] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(
        cls, model_dir: str | os.PathLike[str], config: ModelConfig | None = None
    ) -> Checkpoint:
        """Read and validate the headers of a model folder's weight files.

        Args:
            model_dir: the folder.
            config: the folder's configuration if it has been read already. Otherwise config.json
                is read for the number of layers and the quantization config.

        Raises:
            ExlLoaderError: see `folder.read_folder`.
        """
        folder = Path(model_dir)
        found = read_folder(folder, config)
        return cls(folder, found.headers, found.identities, found.format, found.quantization)

    def header(self, name: str) -> TensorHeader:
        """Return the header of a tensor.

        Raises:
            InvalidCheckpoint: there is no tensor of this name.
        """
        header = self.headers.get(name)
        if header is None:
            raise InvalidCheckpoint(
                f"{name}: not in the checkpoint",
                expected=f"a tensor of this name in {', '.join(p.name for p in self.paths[:4])}",
                remedy="Check that all weight files are there and belong to this config.json",
            )
        return header

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into new memory on the CPU.

        Returns:
            A tensor of the header's dtype and shape.

        Raises:
            InvalidCheckpoint: no such tensor, the file ends early, or it changed since its
                header was read.
            UnsupportedFormat: PyTorch has no such dtype.
        """
        header = self.header(name)
        return self._read(header, header.shape, header.offset, header.nbytes)

    def read_rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Read rows [first, end) of a tensor; see `read`.

        The tensor is taken as a matrix, whose columns are those of its last dimension.
        """
        header = self.header(name)
        rows = math.prod(header.shape[:-1])
        assert header.shape and 0 <= first <= end <= rows, (header, first, end)
        row_bytes = header.nbytes // rows if rows else 0
        shape = (end - first, header.shape[-1])
        offset = header.offset + first * row_bytes
        return self._read(header, shape, offset, (end - first) * row_bytes)

    def _read(
        self, header: TensorHeader, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> torch.Tensor:
        import torch

        dtype = getattr(torch, header.dtype, None)
        if dtype is None:
            raise UnsupportedFormat(f"{header.name}: dtype {header.dtype}")
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._fill(header, offset, data.numpy().data)
        return data.view(dtype).reshape(shape)

    def _fill(self, header: TensorHeader, offset: int, target: memoryview) -> None:
        path = header.path
        try:
            with self._opening:
                file = self._files.get(path)
                if file is None:
                    file = self._files[path] = open_weights(path)
            done = read_at(file, offset, target)
            identity = FileIdentity.of(os.fstat(file.fileno()))
        except OSError as error:
            raise InvalidCheckpoint(
                f"{path.name}: cannot read {header.name}",
                actual=error.strerror or error,
                remedy="Check the disk and the file",
            ) from error
        if done < len(target):
            invalid(path, f"bytes of {header.name}", len(target), f"{done} (truncated)")
        if identity != self._identities[path]:
            raise InvalidCheckpoint(
                f"{path.name}: changed after its header was read",
                remedy=f"Load the model again when nothing writes to it. {DOWNLOAD_AGAIN} if "
                "this persists",
            )

    def close(self) -> None:
        """Close the files. `read` opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
