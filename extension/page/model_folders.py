"""The models below a folder: what a picker shows of each, and why some cannot be loaded.

Headers are read, weights are not, and PyTorch is not imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exl_loader import ExlLoaderError
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.checkpoint.model_class import has_unknown_class
from exl_loader.checkpoint.weight_files import UNFINISHED_NAME
from exl_loader.utils.byte_counts import amount

# Models are in the folder itself, in its folders, or one level deeper, as in OWNER/NAME.
MAX_DEPTH = 2
# A folder of models has fewer; a folder such as / has more than anyone wants to wait for.
MAX_FOLDERS = 2000

# Format of a checkpoint -> what the picker calls it.
FORMATS = {"exl2": "EXL2", "gptq": "GPTQ", "dense": "unquantised"}

GGUF_PROBLEM = "a GGUF file, which is llama.cpp's"


@dataclass(frozen=True)
class FoundModel:
    """A model that was found.

    Args:
        path: the folder, or a file of another program.
        name: its path below the folder that was searched.
        format: such as `EXL2`; empty if it is unknown.
        nbytes: size of the weights on the disk.
        problem: why it cannot be loaded; empty if nothing speaks against it.
    """

    path: str
    name: str
    format: str
    nbytes: int
    problem: str

    @property
    def label(self) -> str:
        """Name, format and size for a list."""
        return " · ".join(filter(None, (self.name, self.format, amount(self.nbytes))))


@dataclass(frozen=True)
class FoundModels:
    """The models below a folder.

    Args:
        loadable: by name. A model of an unknown class is among them, because it can be tried as
            a Llama.
        others: those that cannot be loaded, by name.
        whole: False if the search ended after MAX_FOLDERS folders.
    """

    loadable: tuple[FoundModel, ...] = ()
    others: tuple[FoundModel, ...] = ()
    whole: bool = True


def find_models(folder: str) -> FoundModels:
    """Find the models below a folder, at most MAX_DEPTH levels deep.

    Hidden folders are left out, links to folders are followed, and what cannot be read counts as
    empty.

    Raises:
        OSError: the folder itself cannot be read.
    """
    os.scandir(folder).close()
    search = _Search(Path(folder))
    search.visit(search.top, MAX_DEPTH)
    found = sorted(search.found, key=lambda model: model.name.lower())
    return FoundModels(tuple(m for m in found if not m.problem),
                       tuple(m for m in found if m.problem), search.folders <= MAX_FOLDERS)


class _Search:
    """Collects the models below a folder."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.found: list[FoundModel] = []
        self.folders = 0

    def visit(self, folder: Path, depth: int) -> None:
        """Look at a folder, and so many levels of the folders in it."""
        self.folders += 1
        if self.folders > MAX_FOLDERS:
            return
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            return
        names = [entry.name for entry in entries]
        for name in names:
            if name.endswith(".gguf"):
                path = folder / name
                self._add(path, "GGUF", _bytes([path]), GGUF_PROBLEM)
        is_model = any(_is_weights(name) for name in names) or UNFINISHED_NAME in names
        if is_model:
            self._look_at(folder, [folder / name for name in names if _is_weights(name)])
        if depth and (not is_model or folder == self.top):
            for entry in entries:
                if not entry.name.startswith(".") and _is_folder(entry):
                    self.visit(folder / entry.name, depth - 1)

    def _look_at(self, path: Path, weights: list[Path]) -> None:
        format, problem = "", ""
        is_unknown = has_unknown_class(path)
        try:
            config = None if is_unknown else ModelConfig.from_dir(path)
            with Checkpoint.open(path, config) as checkpoint:
                format = FORMATS[checkpoint.format]
                if is_unknown:
                    format += ", unknown architecture"
        except (ExlLoaderError, OSError) as error:
            problem = str(error)
        self._add(path, format, _bytes(weights), problem)

    def _add(self, path: Path, format: str, nbytes: int, problem: str) -> None:
        name = path.name if path == self.top else path.relative_to(self.top).as_posix()
        self.found.append(FoundModel(str(path), name, format, nbytes, problem))


def _is_weights(name: str) -> bool:
    pickled = name.startswith("pytorch_model") and name.endswith(".bin")
    return name.endswith(".safetensors") or pickled


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _bytes(paths: list[Path]) -> int:
    """Return the size of files together; 0 for those that cannot be read."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def folder_bytes(folder: str | Path) -> int:
    """Return the size of the files of a folder, without those of folders in it."""
    return _bytes([path for path in Path(folder).iterdir() if path.is_file()])
