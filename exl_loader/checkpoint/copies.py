"""The same model folder on several machines: finding a machine's own copy, and comparing it.

PyTorch is not imported and no weight is read.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..utils.errors import InvalidCheckpoint, InvalidSettings, ModelNotFound, shown, shown_name
from ..utils.untrusted_files import JSON_BYTES, is_there, read_bytes
from . import Checkpoint

CONFIG_NAME = "config.json"
# The files beside the weights that decide how weights are read and multiplied.
_CONFIG_NAMES = (CONFIG_NAME, "quantize_config.json", "quantization_config.json")


def folder_name(model_dir: str | os.PathLike[str]) -> str:
    """Return the name under which other machines look for their copy of a folder."""
    return Path(os.path.abspath(model_dir)).name


def folder_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of a folder's config files and of the headers of its weight files.

    Copies of a folder have the same digest. Folders of equal headers have it too, whatever their
    weights are: two trainings of one model in the same format cannot be told apart. Comparing
    the weights would mean reading all of them.

    Args:
        checkpoint: the folder's, open.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            data = part
            if not isinstance(data, bytes):
                data = str(part).encode("utf-8", "backslashreplace")
            # With its length, so that no two lists of parts have the same bytes.
            digest.update(len(data).to_bytes(8, "little") + data)

    for name in _CONFIG_NAMES:
        path = checkpoint.model_dir / name
        if is_there(path):
            add(name, read_bytes(path, JSON_BYTES))
    for header in sorted(checkpoint.headers.values(), key=lambda header: header.name):
        add(header.name, header.dtype, header.shape, header.path.name, header.offset)
    return digest.hexdigest()


def find_folder(models: Path, name: str) -> Path:
    """Return a machine's own copy of a model folder, by its name.

    Args:
        models: the folder itself, under any name, or a folder of models.
        name: the folder's name on the first machine. It comes from there and is not trusted.

    Raises:
        ModelNotFound: there is no such folder.
        InvalidSettings: the name is no name of a folder.
    """
    if is_there(models / CONFIG_NAME):
        return models
    if not name or name in (".", "..") or "\0" in name or Path(name).name != name:
        raise InvalidSettings("the model folder's name", expected="a name without a path",
                              actual=shown(name))
    folder = models / name
    if not is_there(folder / CONFIG_NAME):
        raise ModelNotFound(
            f"{shown_name(name)}: not among the models of {models}",
            expected=f"a folder of this name with a {CONFIG_NAME}, or a model folder in its place",
            actual="nothing" if not is_there(folder) else f"a folder without {CONFIG_NAME}",
            remedy="Copy the model's folder there",
        )
    return folder


def check_copy(checkpoint: Checkpoint, digest: str) -> None:
    """Refuse a folder that is no copy of the first machine's.

    Args:
        checkpoint: this machine's folder, open.
        digest: `folder_digest` of the first machine's.

    Raises:
        InvalidCheckpoint: the config files or the headers of the weight files differ.
    """
    found = folder_digest(checkpoint)
    if found != digest:
        raise InvalidCheckpoint(
            f"{checkpoint.model_dir}: another model than the first machine's",
            expected=f"config and headers of weights with the digest {shown_name(digest, 12)}",
            actual=found[:9] + "...",
            remedy="Copy the first machine's folder",
        )
