"""Damage model folders: the bytes of their files, what headers and settings say, and values."""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Header = dict[str, dict[str, Any]]
Damage = Callable[[random.Random, Path], None]

ODD = [None, -1, 0, 1, 2.5, 1 << 70, "x", "", [], [1, 2], {}, {"a": 1}, True, 1e308, "64", [[0]]]


def split_file(path: Path) -> tuple[Header, bytearray]:
    """Return the entries of a safetensors file's header, and its data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, bytearray(content[8 + length :])


def _weights_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _in_weights(change: Callable[[random.Random, Header, bytearray], None]) -> Damage:
    """Turn a change of a file's header and data, in place, into a damage of a folder."""

    @functools.wraps(change)
    def damage(rng: random.Random, folder: Path) -> None:
        path = _weights_file(rng, folder)
        header, data = split_file(path)
        change(rng, header, data)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def _span(rng: random.Random, header: Header) -> slice:
    return slice(*header[rng.choice(list(header))]["data_offsets"])


def _flip_bits(rng: random.Random, path: Path, count: int, end: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(end or len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncated(rng: random.Random, folder: Path) -> None:
    path = _weights_file(rng, folder)
    content = path.read_bytes()
    cut = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content)), len(content) - 1])
    path.write_bytes(content[:cut])


def lengthened(rng: random.Random, folder: Path) -> None:
    path = _weights_file(rng, folder)
    path.write_bytes(path.read_bytes() + bytes(rng.choice([1, 8, 5000])))


def header_length_changed(rng: random.Random, folder: Path) -> None:
    path = _weights_file(rng, folder)
    content = path.read_bytes()
    length = rng.choice([rng.randrange(1 << 64), rng.randrange(len(content)), 0, (1 << 64) - 1])
    path.write_bytes(struct.pack("<Q", length) + content[8:])


def file_bits_flipped(rng: random.Random, folder: Path) -> None:
    _flip_bits(rng, _weights_file(rng, folder), rng.choice([1, 1, 4, 64]))


def header_bits_flipped(rng: random.Random, folder: Path) -> None:
    path = _weights_file(rng, folder)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    _flip_bits(rng, path, rng.randint(1, 4), 8 + length)


@_in_weights
def shape_changed(rng: random.Random, header: Header, data: bytearray) -> None:
    entry = header[rng.choice(list(header))]
    shape = list(entry["shape"])
    place = rng.randrange(len(shape))
    wild = [0, -1, 1 << 62, 1 << 40, None, "1", 2.5, shape[place] + 1, shape[place] * 2]
    entry["shape"] = rng.choice([
        [*shape[:place], rng.choice(wild), *shape[place + 1 :]], shape[::-1], [*shape, 1], [], [0],
        [int(np.prod(shape))], [*shape[:place], shape[place] // 2, 2, *shape[place + 1 :]],
    ])


@_in_weights
def dtype_changed(rng: random.Random, header: Header, data: bytearray) -> None:
    header[rng.choice(list(header))]["dtype"] = rng.choice(
        ["F16", "BF16", "I16", "U16", "I32", "F32", "U32", "F64", "U8", "F8_E4M3", "X", "", 3, None]
    )


@_in_weights
def offsets_changed(rng: random.Random, header: Header, data: bytearray) -> None:
    entry = header[rng.choice(list(header))]
    begin, end = entry["data_offsets"]
    step = rng.choice([1, 2, -2, 64, -64, 1 << 40, 1 << 63])
    entry["data_offsets"] = rng.choice(
        [[begin + step, end + step], [begin, end + step], [end, begin], [begin], None, [0, 0]]
    )


@_in_weights
def entry_replaced(rng: random.Random, header: Header, data: bytearray) -> None:
    key = rng.choice(["dtype", "shape", "data_offsets"])
    header[rng.choice(list(header))][key] = rng.choice(ODD)


@_in_weights
def tensors_exchanged(rng: random.Random, header: Header, data: bytearray) -> None:
    first, second = rng.sample(list(header), 2)
    header[first], header[second] = header[second], header[first]


@_in_weights
def tensors_of_one_size_exchanged(rng: random.Random, header: Header, data: bytearray) -> None:
    one = header[rng.choice(list(header))]
    size = np.diff(one["data_offsets"])
    other = rng.choice([e for e in header.values() if np.diff(e["data_offsets"]) == size])
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


@_in_weights
def tensor_renamed(rng: random.Random, header: Header, data: bytearray) -> None:
    name = rng.choice(list(header))
    header[name + "x"] = header.pop(name)


@_in_weights
def entry_removed(rng: random.Random, header: Header, data: bytearray) -> None:
    del header[rng.choice(list(header))]


@_in_weights
def tensor_removed(rng: random.Random, header: Header, data: bytearray) -> None:
    del header[rng.choice(list(header))]
    kept = bytearray()
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [len(kept), len(kept) + end - begin]
        kept += data[begin:end]
    data[:] = kept


@_in_weights
def values_flipped(rng: random.Random, header: Header, data: bytearray) -> None:
    span = _span(rng, header)
    for _ in range(rng.choice([1, 1, 2, 100])):
        data[rng.randrange(span.start, span.stop)] ^= 1 << rng.randrange(8)


@_in_weights
def tensor_filled(rng: random.Random, header: Header, data: bytearray) -> None:
    span = _span(rng, header)
    size = span.stop - span.start
    pattern = rng.choice([b"\0", b"\xff", b"\x00\x7e", b"\x00\x7c", b"\x80", rng.randbytes(size)])
    data[span] = (pattern * size)[:size]


@_in_weights
def values_permuted(rng: random.Random, header: Header, data: bytearray) -> None:
    span = _span(rng, header)
    values = np.frombuffer(bytes(data[span]), np.uint16).copy()
    np.random.default_rng(rng.randrange(1 << 30)).shuffle(values)
    data[span] = values.tobytes()


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def quantization_changed(rng: random.Random, folder: Path) -> None:
    key = rng.choice(["quant_method", "bits", "group_size", "checkpoint_format", "dynamic"])
    value = rng.choice([None, 0, -1, 3, 8, 64, 1 << 70, "4", [], {}, "gptq", "gptq_v2"])
    _edit_config(folder, lambda c: c.setdefault("quantization_config", {}).update({key: value}))


def config_changed(rng: random.Random, folder: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        key = rng.choice(sorted(config))
        value = config[key]
        if isinstance(value, int) and rng.random() < 0.5:
            config[key] = rng.choice([value * 2, value + 1, value // 2, -value])
        elif rng.random() < 0.2:
            del config[key]
        else:
            config[key] = rng.choice(ODD)

    _edit_config(folder, edit)


def text_bits_flipped(rng: random.Random, folder: Path) -> None:
    name = rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    _flip_bits(rng, folder / name, rng.choice([1, 3]))


OF_VALUES: list[Damage] = [
    file_bits_flipped, values_flipped, tensor_filled, values_permuted, tensors_exchanged,
    tensors_of_one_size_exchanged,
]
OF_WEIGHTS: list[Damage] = [
    *OF_VALUES, truncated, lengthened, header_length_changed, header_bits_flipped, shape_changed,
    dtype_changed, offsets_changed, entry_replaced, tensor_renamed, entry_removed, tensor_removed,
    quantization_changed,
]
ALL: list[Damage] = [*OF_WEIGHTS, config_changed, text_bits_flipped]
# After these something is wrong for certain; the others may hit what does not matter.
FATAL: list[Damage] = [truncated, lengthened, header_length_changed, entry_removed]
