"""Write the quantised folder. An interrupted conversion leaves no incomplete folder."""

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

# The largest file that exllamav2 writes.
DEFAULT_SHARD_BYTES = 8192 << 20
# Weights in any format, their indexes, and settings of other quantisations. With them beside the
# new weights a folder would contradict itself.
_LEFT_BEHIND_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .partial".split()
)
_LEFT_BEHIND_NAMES = frozenset(
    {"config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"}
)


def check_out_dir(out_dir: Path) -> None:
    """Refuse a target folder that is not empty.

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

    It is beside `out_dir`, because a folder can only be renamed within one file system.
    """
    check_out_dir(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", suffix=".partial",
                                    dir=out_dir.parent))
    try:
        yield partial
        _open_up(partial)
        if out_dir.exists():
            out_dir.rmdir()  # Windows does not replace a folder by renaming, not even an empty one
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_up(folder: Path) -> None:
    """Set the default modes of a folder and its files, which mkdtemp and safetensors restrict."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


class ShardWriter:
    """Writes tensors to `output.safetensors`, or to numbered shards.

    Args:
        folder: the folder of the files.
        shard_bytes: most bytes of tensors in a file.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, torch.Tensor] = {}
        self._nbytes = 0
        self._paths: list[Path] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors that must be in the same file."""
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
        """Write the remaining tensors and rename the files to their final names."""
        if self._tensors:
            self._flush()
        count = len(self._paths)
        for number, path in enumerate(self._paths, start=1):
            name = f"output-{number:05d}-of-{count:05d}" if count > 1 else "output"
            os.replace(path, self._folder / f"{name}.safetensors")


def copy_other_files(model_dir: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and the other files beside the weights."""
    for path in _other_files(model_dir):
        if path.stat().st_size > TOKENIZER_BYTES:
            warn(
                f"{path} was not copied: its {path.stat().st_size} bytes are more than any file of "
                "a tokenizer has"
            )
            continue
        shutil.copyfile(path, folder / path.name)


def check_other_files(model_dir: Path) -> None:
    """Check before hours of work that `copy_other_files` can read its files.

    Raises:
        InvalidSettings: a file cannot be read or is not a regular file.
    """
    for path in _other_files(model_dir):
        open_regular(
            path, error=InvalidSettings, missing=InvalidSettings,
            remedy="Move it out of the model's folder",
        ).close()


def _other_files(model_dir: Path) -> list[Path]:
    return [
        path for path in (model_dir / name for name in folder_names(model_dir))
        if not (os.path.isdir(path) or path.name.startswith("."))
        and not (path.suffix in _LEFT_BEHIND_SUFFIXES or path.name.endswith(".index.json"))
        and path.name not in _LEFT_BEHIND_NAMES
    ]


def write_config(config: Mapping[str, Any], quantization: Mapping[str, Any], folder: Path) -> None:
    """Write the source's config.json with `quantization_config` added."""
    config = {**config, "torch_dtype": "float16", "quantization_config": dict(quantization)}
    # The name of torch_dtype in transformers 5. The two could contradict each other.
    config.pop("dtype", None)
    # In ASCII, because a lone surrogate in a path of the source's file has no UTF-8 encoding.
    text = json.dumps(config, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
