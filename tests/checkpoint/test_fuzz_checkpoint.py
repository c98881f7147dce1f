"""Hundreds of damaged checkpoints: each is a typed error or loads as it decodes.

Damage is done to the reference models and to small GPTQ and unquantised ones: on the bytes of
the file, on what the header says, on the values of a tensor, on the settings. What loads is
compared with `QuantizedLayer.weight`, and has to be finite. Seeds are fixed but for one round,
which draws its own and prints it.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu.layout import PackedLinear
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.backends.reference.planes import dequantize
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import read_linear
from exl_loader.utils.errors import ExlLoaderError
from support.makers import allocate, linear_part, write_folder, write_quantized_model

ROUNDS = 12


class Model:
    """The parts of a checkpoint in one file: header entries, data, settings, dimensions."""

    def __init__(self, folder: Path):
        (path,) = folder.glob("*.safetensors")
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.file = path.name
        self.header = json.loads(content[8 : 8 + length])
        self.header.pop("__metadata__", None)
        self.data = content[8 + length :]
        self.config = json.loads((folder / "config.json").read_text())
        self.linears = {}
        for name, entry in self.header.items():
            layer, _, kind = name.rpartition(".")
            shape = entry["shape"]
            if kind == "q_weight":
                in_features = self.header[f"{layer}.q_invperm"]["shape"][0]
                out_features = self.config["vocab_size"] if layer == "lm_head" else shape[1]
                self.linears[layer] = (in_features, out_features)
            elif kind == "qweight":
                bits = self.config["quantization_config"]["bits"]
                self.linears[layer] = (shape[0] * 32 // bits, shape[1])
            elif kind == "weight" and len(shape) == 2:
                self.linears[layer] = (shape[1], shape[0])

    def content(self) -> bytes:
        header = json.dumps(self.header).encode()
        return struct.pack("<Q", len(header)) + header + self.data


def truncated(model, rng, path):
    content = model.content()
    path.write_bytes(content[: rng.randrange(len(content))])


def header_bytes_flipped(model, rng, path):
    content = bytearray(model.content())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def length_changed(model, rng, path):
    content = model.content()
    length = rng.choice([rng.randrange(1 << 64), rng.randrange(len(content)), 0, (1 << 64) - 1])
    path.write_bytes(struct.pack("<Q", length) + content[8:])


def shape_changed(model, rng, path):
    entry = model.header[rng.choice(list(model.header))]
    shape = list(entry["shape"])
    place = rng.randrange(len(shape))
    change = rng.choice(["other", "swapped", "flattened", "split"])
    if change == "other":
        wild = [0, -1, 1 << 62, 1 << 40, None, "1", 2.5, shape[place] + 1, shape[place] * 2]
        shape[place] = rng.choice(wild)
    elif change == "swapped":
        shape.reverse()
    elif change == "flattened":
        shape = [int(np.prod(shape))]
    else:
        shape[place : place + 1] = [shape[place] // 2, 2]
    entry["shape"] = shape
    path.write_bytes(model.content())


def dtype_changed(model, rng, path):
    entry = model.header[rng.choice(list(model.header))]
    entry["dtype"] = rng.choice(
        ["F16", "BF16", "I16", "U16", "I32", "F32", "U32", "F64", "X", None]
    )
    path.write_bytes(model.content())


def offsets_changed(model, rng, path):
    entry = model.header[rng.choice(list(model.header))]
    begin, end = entry["data_offsets"]
    step = rng.choice([1, 2, -2, 64, -64, 1 << 40, 1 << 63])
    entry["data_offsets"] = rng.choice(
        [[begin + step, end + step], [begin, end + step], [end, begin], [begin], None, [0, 0]]
    )
    path.write_bytes(model.content())


def tensors_exchanged(model, rng, path):
    first, second = rng.sample(list(model.header), 2)
    model.header[first], model.header[second] = model.header[second], model.header[first]
    path.write_bytes(model.content())


def tensors_of_one_size_exchanged(model, rng, path):
    first = rng.choice(list(model.header))
    size = np.diff(model.header[first]["data_offsets"])
    same = [n for n, e in model.header.items() if np.diff(e["data_offsets"]) == size]
    second = rng.choice(same)
    one, other = model.header[first], model.header[second]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    path.write_bytes(model.content())


def tensor_renamed(model, rng, path):
    name = rng.choice(list(model.header))
    model.header[name + "x"] = model.header.pop(name)
    path.write_bytes(model.content())


def tensor_removed(model, rng, path):
    del model.header[rng.choice(list(model.header))]
    place, data = 0, []
    for entry in sorted(model.header.values(), key=lambda e: e["data_offsets"]):
        begin, end = entry["data_offsets"]
        data.append(model.data[begin:end])
        entry["data_offsets"] = [place, place + end - begin]
        place += end - begin
    model.data = b"".join(data)
    path.write_bytes(model.content())


def bits_flipped(model, rng, path):
    begin, end = model.header[rng.choice(list(model.header))]["data_offsets"]
    data = bytearray(model.data)
    for _ in range(rng.choice([1, 1, 2, 100])):
        data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    model.data = bytes(data)
    path.write_bytes(model.content())


def tensor_filled(model, rng, path):
    begin, end = model.header[rng.choice(list(model.header))]["data_offsets"]
    pattern = rng.choice([b"\0", b"\xff", b"\x00\x7e", b"\x00\x7c", b"\x80", None])
    fill = rng.randbytes(end - begin) if pattern is None else (pattern * (end - begin))
    model.data = model.data[:begin] + fill[: end - begin] + model.data[end:]
    path.write_bytes(model.content())


def values_permuted(model, rng, path):
    begin, end = model.header[rng.choice(list(model.header))]["data_offsets"]
    values = np.frombuffer(model.data[begin:end], np.uint16).copy()
    np.random.default_rng(rng.randrange(1 << 30)).shuffle(values)
    model.data = model.data[:begin] + values.tobytes() + model.data[end:]
    path.write_bytes(model.content())


def settings_changed(model, rng, path):
    settings = model.config.setdefault("quantization_config", {})
    key = rng.choice(["quant_method", "bits", "group_size", "checkpoint_format", "dynamic"])
    settings[key] = rng.choice([None, 0, -1, 3, 8, 64, 1 << 70, "4", [], {}, "gptq", "gptq_v2"])
    path.write_bytes(model.content())


DAMAGES = [
    truncated,
    header_bytes_flipped,
    length_changed,
    shape_changed,
    dtype_changed,
    offsets_changed,
    tensors_exchanged,
    tensors_of_one_size_exchanged,
    tensor_renamed,
    tensor_removed,
    bits_flipped,
    tensor_filled,
    values_permuted,
    settings_changed,
]
# After these something is wrong for certain; the others may hit what does not matter.
FATAL = {truncated, length_changed}


def load_everything(folder: Path, linears: dict) -> None:
    """Read every linear layer, and compare the packed weights with the stored ones."""
    with Checkpoint.open(folder) as checkpoint:
        parts = [linear_part(checkpoint, name, *shape) for name, shape in linears.items()]
        for part in parts:
            stored = read_linear(part.spec, checkpoint)
            layer = ReferenceOps().pack(stored, allocate(part))
            expected = stored.weight()
            assert torch.isfinite(expected).all(), part.name
            if isinstance(layer, PackedLinear):
                assert torch.equal(dequantize(layer), expected), part.name


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread, because for thousands of small tensors a second one costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory, request):
    """Folders of every format, by name, with the reference models if they exist."""
    root = tmp_path_factory.mktemp("models")
    small = {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 160}
    write_quantized_model(root / "gptq", "gptq", config=small, group_size=32, act_order=True)
    write_quantized_model(root / "exl2", "exl2", config=small | {"intermediate_size": 100})
    dense = {
        f"layer{i}.weight": torch.randn(40, 24).to(dtype)
        for i, dtype in enumerate([torch.float16, torch.bfloat16, torch.float32])
    }
    write_folder(root / "dense", dense)
    folders = {path.name: path for path in root.iterdir()}
    try:
        fixtures = request.getfixturevalue("fixtures_dir")
    except pytest.skip.Exception:
        return folders
    return folders | {name: fixtures / name for name in ("llama-low", "llama-mid")}


def run(folders, damage, seed: int, tmp_path: Path) -> tuple[int, int]:
    """Damage one model after the other.

    Returns:
        how many were refused and how many loaded.
    """
    rng = random.Random(f"{damage.__name__} {seed}")
    refused = loaded = 0
    # The large models take most of the time and find nothing more than the small ones.
    names = sorted(folders) if seed % 6 == 0 else ["dense", "exl2", "gptq"]
    for name in names:
        model = Model(folders[name])
        damage(model, rng, tmp_path / model.file)
        (tmp_path / "config.json").write_text(json.dumps(model.config))
        try:
            load_everything(tmp_path, model.linears)
            loaded += 1
        except ExlLoaderError as error:
            assert error.thing and (error.expected or error.actual or error.remedy), repr(error)
            assert len(str(error)) < 1000
            refused += 1
        (tmp_path / model.file).unlink()
    return refused, loaded


@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_or_harmless(models, damage, tmp_path):
    refused = loaded = 0
    for seed in range(ROUNDS):
        counts = run(models, damage, seed, tmp_path)
        refused, loaded = refused + counts[0], loaded + counts[1]
    assert refused, "damage of this kind is never noticed"
    if damage in FATAL:
        assert not loaded


def test_damage_with_a_fresh_seed(models, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30) * 6 + 1
    print(f"seed {seed}")
    for damage in DAMAGES:
        run(models, damage, seed, tmp_path)


def test_undamaged_models_load(models):
    for folder in models.values():
        load_everything(folder, Model(folder).linears)
