"""The work folder of a conversion, from which an interrupted one continues.

It is beside the output folder, as NAME.work:

    job.json                  what is converted, and how; a conversion that differs is refused
    measuring.safetensors     hidden states before a layer, and what was measured until then
    measurement.json          all measurements
    quantising.safetensors    hidden states before a layer
    layer-00012.safetensors   a quantised layer; the head is the last

Files are written under another name and renamed, so that each is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..utils.errors import InvalidSettings, shown
from ..utils.json_keys import read_json_object_if_there

_METADATA = "exl_loader"
_THREADS = "threads"
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Checkpoint:
    """The state of a pass over the layers.

    Args:
        next_layer: the first layer that the pass has not finished.
        tensors: name -> tensor.
        values: what else the pass has found, as JSON data.
    """

    next_layer: int
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


class WorkFolder:
    """The files of a conversion that is not finished.

    Args:
        out_dir: the output folder, which is made when the conversion is finished.
    """

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir.with_name(f"{out_dir.name}.work")

    def begin(self, job: Mapping[str, Any], threads: int) -> int:
        """Make the folder, or check that it is of the same conversion.

        Args:
            job: name of a setting -> its value, as JSON data.
            threads: of this process. Sums depend on their number.

        Returns:
            The threads with which the conversion was begun.

        Raises:
            InvalidSettings: a setting differs, the path cannot be used, or the file is damaged.
        """
        target = self.path / "job.json"
        remedy = f"Repeat it with the same options, or remove {self.path}"
        known = read_json_object_if_there(target, error=InvalidSettings, remedy=remedy)
        for name, value in job.items() if known else ():
            if known.get(name) != value:
                raise InvalidSettings(
                    f"{name} of the conversion that {self.path} continues",
                    expected=shown(known.get(name)), actual=shown(value), remedy=remedy,
                )
        if not known:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if any(path.suffix != ".partial" for path in self.path.iterdir()):
                    raise InvalidSettings(
                        f"work folder {self.path}", expected="a path where nothing is yet",
                        actual="a folder with files of something else", remedy="Remove it",
                    )
            except OSError as error:
                raise InvalidSettings(
                    f"work folder {self.path}", expected="a path where a folder can be made",
                    actual=error.strerror, remedy="Choose another output folder",
                ) from None
            self.write_json("job.json", {**job, _THREADS: threads})
            return threads
        begun = known.get(_THREADS)
        if type(begun) is not int or not 1 <= begun <= _MOST_THREADS:
            raise InvalidSettings(
                f"{_THREADS} in {target}", expected=f"a number from 1 to {_MOST_THREADS}",
                actual=shown(begun), remedy=f"Remove {self.path} and convert again",
            )
        return begun

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path / name)

    def save(self, name: str, checkpoint: Checkpoint) -> None:
        """Write the state of a pass in place of the one before."""
        text = json.dumps({"next_layer": checkpoint.next_layer, "values": checkpoint.values})
        self._write_tensors(name, checkpoint.tensors, {_METADATA: text})

    def load(self, name: str) -> Checkpoint | None:
        """Read the state of a pass; None where there is none.

        Raises:
            InvalidSettings: the file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                values = json.loads(file.metadata()[_METADATA])
            return Checkpoint(values["next_layer"], load_file(path), values["values"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(path, error) from None

    def save_layer(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a quantised layer."""
        self._write_tensors(_layer_name(index), tensors, None)

    def load_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Read a quantised layer.

        Raises:
            InvalidSettings: the file is missing or damaged.
        """
        path = self.path / f"{_layer_name(index)}.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, error) from None

    def _write_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None
    ) -> None:
        partial = self.path / f"{name}.partial"
        save_file(dict(tensors), partial, metadata=metadata)
        os.replace(partial, self.path / f"{name}.safetensors")

    def _damaged(self, path: Path, error: Exception) -> InvalidSettings:
        return InvalidSettings(
            f"{path}", expected="a file that this conversion has written", actual=f"{error}",
            remedy=f"Remove {self.path} and convert again",
        )

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _layer_name(index: int) -> str:
    return f"layer-{index:05d}"
