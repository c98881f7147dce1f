"""Which files of a model folder hold its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..utils.errors import InvalidCheckpoint, ModelNotFound, UnsupportedFormat, shown
from ..utils.json_keys import read_json_object_if_there
from ..utils.untrusted_files import INDEX_BYTES, is_there

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"
SERIES = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
# Exists in a folder while `python -m exl_loader download` is not done with it.
UNFINISHED_NAME = "exl_loader-download.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_finished(model_dir: Path) -> None:
    """Refuse a folder whose download has not ended; its files may look like a whole model."""
    if is_there(model_dir / UNFINISHED_NAME):
        raise InvalidCheckpoint(
            str(model_dir), expected="a complete download",
            actual=f"an unfinished one (it has the file {UNFINISHED_NAME})",
            remedy="Run the same `python -m exl_loader download` again: it goes on where it was",
        )


def refuse_other_formats(names: Iterable[str]) -> None:
    """Raise UnsupportedFormat for the first file of weights that are no safetensors."""
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise UnsupportedFormat(
                f"{name}: a pickle file, which can run code when it is opened: refused, never "
                "opened",
                expected="*.safetensors",
                remedy="Convert the weights to safetensors",
            )
        if suffix == ".gguf":
            raise UnsupportedFormat(
                name, expected="*.safetensors", actual="GGUF", remedy="Use llama.cpp for this file"
            )


def index_files(model_dir: Path) -> list[str]:
    """Return the names of the files in `model.safetensors.index.json`; empty without an index.

    Raises:
        InvalidCheckpoint: the index is not a JSON object, or names a file outside the folder.
    """
    index = read_json_object_if_there(
        model_dir / INDEX_NAME, limit=INDEX_BYTES, error=InvalidCheckpoint
    )
    weight_map = index.get("weight_map", {})
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidCheckpoint(
                f"{INDEX_NAME}: weight_map",
                expected="names of files in this folder",
                actual=shown(name),
                remedy="Download the file again",
            )
    return sorted(set(names))


def weight_names(model_dir: Path) -> list[str]:
    """Return the names of a folder's safetensors files, sorted.

    Raises:
        ModelNotFound: there is no folder, or no weights in it.
        UnsupportedFormat: the weights are pickle files or GGUF.
        InvalidCheckpoint: an index lists files, but there are none.
    """
    if not os.path.isdir(model_dir):
        raise ModelNotFound(
            str(model_dir),
            expected="a model folder",
            actual="a file" if os.path.exists(model_dir) else "nothing",
            remedy="Check the path",
        )
    names = folder_names(model_dir)
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        missing_shards(_readable_index(model_dir), [])
        refuse_other_formats(names)
        raise ModelNotFound(
            str(model_dir),
            expected="*.safetensors with the model's weights",
            actual="none",
            remedy="Check the folder, or download the model again",
        )
    return found


def converter_output(found: Iterable[str]) -> list[str]:
    """Return the files that EXL2's converter wrote; the source model's may be beside them."""
    return [name for name in found if name == "output.safetensors" or name.startswith("output-")]


def candidates(model_dir: Path, found: list[str]) -> Iterator[list[str]]:
    """Yield sets of files that may hold a whole model, the most likely first.

    The order is that of transformers: `model.safetensors`, then the files of an index. After
    these come every complete series of numbered files and every other single file, such as
    AutoGPTQ's `gptq_model-4bit-128g.safetensors`.
    """
    if WHOLE_NAME in found:
        yield [WHOLE_NAME]
    listed = _readable_index(model_dir)
    if listed and set(listed) <= set(found):
        yield listed
    series: dict[tuple[str, str], list[str]] = {}
    single = []
    for name in found:
        match = SERIES.fullmatch(name)
        if match:
            series.setdefault((match[1], match[3]), []).append(name)
        elif name != WHOLE_NAME:
            single.append(name)
    for (_, total), members in series.items():
        if len(members) == int(total):
            yield members
    for name in single:
        yield [name]


def all_files(model_dir: Path, found: list[str]) -> list[str]:
    """Choose the files of a folder in which no candidate holds a whole model.

    These are the files of the index if all of them exist, otherwise all files.

    Raises:
        InvalidCheckpoint: a numbered series of files has gaps.
    """
    listed = _readable_index(model_dir)
    chosen = listed if listed and set(listed) <= set(found) else found
    check_series(chosen)
    return chosen


def _readable_index(model_dir: Path) -> list[str]:
    """Return the names in the index; empty where it cannot be read.

    EXL2 folders keep outdated indexes. `check_index` raises the error where the index matters.
    """
    try:
        return index_files(model_dir)
    except InvalidCheckpoint:
        return []


def folder_names(model_dir: Path) -> list[str]:
    """Return the names of a folder's files, sorted."""
    try:
        return sorted(os.listdir(model_dir))
    except OSError as error:
        raise ModelNotFound(
            str(model_dir), expected="a folder that can be read", actual=error.strerror,
            remedy="Check who may read it",
        ) from None


def missing_shards(listed: Iterable[str], found: Iterable[str]) -> None:
    """Raise InvalidCheckpoint where the index lists files that do not exist."""
    missing = sorted(set(listed) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidCheckpoint(
            f"{missing[0]}{more}: listed in {INDEX_NAME}",
            expected="the file",
            actual="nothing",
            remedy="Download the missing files",
        )


def check_index(model_dir: Path) -> None:
    """Check that every file of the index exists. EXL2 has no index of its own."""
    missing_shards(index_files(model_dir), folder_names(model_dir))


def check_series(names: list[str]) -> None:
    """Check that every file of a series `NAME-00001-of-0000N.safetensors` exists."""
    present = set(names)
    matches = (SERIES.fullmatch(name) for name in names)
    series = {(match[1], len(match[2]), match[3]) for match in matches if match}
    for stem, digits, total in sorted(series):
        for number in range(1, int(total) + 1):
            member = f"{stem}-{number:0{digits}}-of-{total}.safetensors"
            if member not in present:
                raise InvalidCheckpoint(
                    f"{member}: one of a series of {int(total)} files",
                    expected="the file",
                    actual="nothing",
                    remedy="Download the missing file",
                )
