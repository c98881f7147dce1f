"""Write the quantised folder so that an interrupted conversion leaves nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoint.weight_files import folder_names
from ..utils.errors import InvalidSettings
from ..utils.output import warn
from ..utils.untrusted_files import TOKENIZER_BYTES, open_regular

# What exllamav2 writes at most into one file.
DEFAULT_SHARD_BYTES = 8192 << 20
# Weights in any form, their indices, and settings of other quantisations: a folder that held
# them beside the new weights would contradict itself.
_LEFT_BEHIND_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .partial".split()
)
_LEFT_BEHIND_NAMES = frozenset(
    {"config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"}
)


def check_out_dir(out_dir: Path) -> None:
    """Refuse a target that holds something already.

    Raises:
        InvalidSettings: `out_dir` is a file or a folder that is not empty.
    """
    try:
        if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
            return
    except OSError as error:
        raise InvalidSettings(
            f"output folder {out_dir}", expected="a path where a folder can be made",
            actual=error.strerror, remedy="Choose another folder",
        ) from None
    raise InvalidSettings(
        f"output folder {out_dir}",
        expected="a path where nothing is yet",
        actual="a folder with files in it" if out_dir.is_dir() else "a file",
        remedy="Remove it or choose another folder",
    )


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out_dir` if the block ends without an error.

    It lies beside `out_dir`, so that the rename stays within one file system.
    """
    check_out_dir(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".partial",
                                    dir=out_dir.parent))
    try:
        yield partial
        _open_up(partial)
        if out_dir.exists():
            out_dir.rmdir()  # Windows puts no folder in the place of another, empty or not
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_up(folder: Path) -> None:
    """Give a folder and its files the usual modes: mkdtemp and safetensors make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


class ShardWriter:
    """Collect tensors and write them as `output.safetensors`, or as numbered shards.

    Args:
        folder: where the files go.
        shard_bytes: a file is closed before it would hold more than this.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, torch.Tensor] = {}
        self._nbytes = 0
        self._paths: list[Path] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors that belong into the same file."""
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        if self._tensors and self._nbytes + nbytes > self._shard_bytes:
            self._flush()
        self._tensors.update(tensors)
        self._nbytes += nbytes

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._paths)}.partial"
        save_file(self._tensors, str(path))
        self._paths.append(path)
        self._tensors, self._nbytes = {}, 0

    def finish(self) -> None:
        """Write what is left and give the files their final names."""
        if self._tensors:
            self._flush()
        count = len(self._paths)
        for number, path in enumerate(self._paths, start=1):
            name = f"output-{number:05d}-of-{count:05d}" if count > 1 else "output"
            os.replace(path, self._folder / f"{name}.safetensors")


def copy_other_files(model_dir: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and whatever else lies beside the weights."""
    for path in _other_files(model_dir):
        if path.stat().st_size > TOKENIZER_BYTES:
            warn(
                f"{path} was not copied: {path.stat().st_size} bytes are more than any file of a "
                "tokenizer has"
            )
            continue
        shutil.copyfile(path, folder / path.name)


def check_other_files(model_dir: Path) -> None:
    """Check that `copy_other_files` can read its files, before hours of work.

    Raises:
        InvalidSettings: one of them cannot be read, or is no regular file.
    """
    for path in _other_files(model_dir):
        open_regular(
            path, error=InvalidSettings, missing=InvalidSettings,
            remedy="Take it out of the model's folder",
        ).close()


def _other_files(model_dir: Path) -> list[Path]:
    return [
        path for path in (model_dir / name for name in folder_names(model_dir))
        if not (os.path.isdir(path) or path.name.startswith("."))
        and not (path.suffix in _LEFT_BEHIND_SUFFIXES or path.name.endswith(".index.json"))
        and path.name not in _LEFT_BEHIND_NAMES
    ]


def write_config(config: Mapping[str, Any], quantization: Mapping[str, Any], folder: Path) -> None:
    """Write the source's config.json with the quantisation described in it."""
    config = {**config, "torch_dtype": "float16", "quantization_config": dict(quantization)}
    # transformers 5 calls the same thing so; two answers would contradict each other.
    config.pop("dtype", None)
    # In ASCII: a lone surrogate, which a path in the source's file may hold, has no UTF-8.
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
