"""Hundreds of damaged folders from end to end: a typed error, or the logits of what they hold.

A flipped bit in a code is another, equally valid weight: what loads must give the logits of
the weights that the damaged files describe. Those come from a second folder, unquantised,
decoded straight from the damaged one by `read_linear`. Seeds are fixed, but for one
round that draws its own and prints it.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import exl_loader
from exl_loader.formats import read_linear
from exl_loader.memory import buffers as memory
from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.utils.errors import ExlLoaderError
from support.makers import write_quantized_model
from support.tiny import write_tiny_model, write_tokenizer

CTX = 64
IDS = [1, 5, 77, 130, 12, 40, 41, 250, 3]
# Two orders of summation in float32, over weights that damage may have made very unequal.
TOLERANCE = 1e-3

Damage = Callable[[random.Random, Path], None]


def weights_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def split_file(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip_bytes(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header_bytes(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    for _ in range(rng.choice([1, 2])):
        data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_length(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    data = path.read_bytes()
    cut = rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1])
    path.write_bytes(data[:cut] if rng.random() < 0.7 else data + bytes(cut))


def overwrite_a_tensor(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    header, data = split_file(path)
    names = [name for name in header if name != "__metadata__"]
    first, end = header[rng.choice(names)]["data_offsets"]
    fill = rng.choice([bytes(end - first), b"\xff" * (end - first), rng.randbytes(end - first)])
    join_file(path, header, data[:first] + fill + data[end:])


def exchange_tensors(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    header, data = split_file(path)
    one, two = rng.sample([name for name in header if name != "__metadata__"], 2)
    header[one], header[two] = header[two], header[one]
    join_file(path, header, data)


def edit_entry(rng: random.Random, folder: Path) -> None:
    path = weights_file(rng, folder)
    header, data = split_file(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.choice(["drop", "rename", "dtype", "shape", "junk"])
    if kind == "drop":
        del header[name]
    elif kind == "rename":
        header[name + "x"] = header.pop(name)
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "F32", "U8", "F8_E4M3", "", 3])
    elif kind == "shape":
        entry["shape"] = rng.choice(
            [entry["shape"][::-1], [], [0], entry["shape"] + [1], [1 << 62]]
        )
    else:
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = junk(rng)
    join_file(path, header, data)


def junk(rng: random.Random) -> object:
    return rng.choice(
        [None, -1, 0, 1, 2.5, 1 << 70, "x", "", [], [1, 2], {}, {"a": 1}, True, 1e308, "64", [[0]]]
    )


def edit_config(rng: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = rng.choice(sorted(config))
    if isinstance(config[key], int) and rng.random() < 0.5:
        config[key] = rng.choice([config[key] * 2, config[key] + 1, config[key] // 2, -config[key]])
    elif rng.random() < 0.2:
        del config[key]
    else:
        config[key] = junk(rng)
    path.write_text(json.dumps(config))


def flip_text_bytes(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 3])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES: list[Damage] = [
    flip_bytes,
    flip_header_bytes,
    change_length,
    overwrite_a_tensor,
    exchange_tensors,
    edit_entry,
    edit_config,
    flip_text_bytes,
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Small models of every format; three layers to damage."""
    folder = tmp_path_factory.mktemp("fuzz")
    for format in ("exl2", "gptq"):
        write_quantized_model(folder / format, format, seed=7, tokenizer=True)
    write_tiny_model(folder / "dense", shards=2)
    return folder


def decoded_logits(folder: Path, copy: Path) -> torch.Tensor:
    """Logits of the weights that a folder describes, without its packed layout."""
    tensors = {}
    with planned(folder, LoadOptions(ctx_size=CTX, cache_type="fp32")) as planned_model:
        parts = planned_model.model.parts
        checkpoint = planned_model.model.checkpoint
        for plan in (linear.spec for linear in parts.linears()):
            if plan.source == plan.name:
                weight = read_linear(plan, checkpoint).weight()
                tensors[f"{plan.name}.weight"] = weight.t().contiguous()
                if plan.has_bias:
                    bias = checkpoint.read(f"{plan.source}.bias")
                    tensors[f"{plan.name}.bias"] = bias[: plan.out_features].float()
        plain = [norm.spec.name for norm in parts.norms()]
        for name in [*plain, "model.embed_tokens.weight"]:
            tensors[name] = checkpoint.read(name).float()
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    config = json.loads((copy / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors")
    return loaded_logits(copy)


def loaded_logits(folder: Path) -> torch.Tensor:
    with exl_loader.load(folder, ctx_size=CTX, cache_type="fp32", chunk_size=64) as model:
        vocab_size = model.config.vocab_size
        return model.prompt_logits([i for i in IDS if i < vocab_size] or [0])


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare logits; both must overflow if one does, which damage can cause."""
    if not expected.isfinite().all():
        return not actual.isfinite().all()
    scale = expected.double().norm().clamp(min=1e-6)
    return bool((actual.double() - expected.double()).norm() / scale < TOLERANCE)


def one_case(original: Path, seed: int, tmp_path: Path) -> str:
    """Damage a copy, load it, and return `error` or `loaded`."""
    rng = random.Random(seed)
    folder = shutil.copytree(original, tmp_path / f"{original.name}-{seed}")
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, 500)
    damage = rng.choice(DAMAGES)
    damage(rng, folder)
    label = f"{original.name}, seed {seed}, {damage.__name__}"
    before = memory.live_bytes()
    try:
        logits = loaded_logits(folder)
    except ExlLoaderError as error:
        assert str(error) and "\n" not in str(error), label
        outcome = "error"
    else:
        outcome = "loaded"
        assert same(logits, decoded_logits(folder, tmp_path / "decoded")), label
        shutil.rmtree(tmp_path / "decoded")
    assert memory.live_bytes() == before, label
    shutil.rmtree(folder)
    return outcome


def run(original: Path, seeds, tmp_path: Path) -> None:
    outcomes = [one_case(original, seed, tmp_path) for seed in seeds]
    # Damage that never loads, or never fails, would test half of what this is for.
    assert {"error", "loaded"} == set(outcomes)


FORMATS = ["exl2", "gptq", "dense"]
MORE = pytest.mark.exhaustive


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 100), marks=MORE)])
def test_damaged_folders_by_definition(originals, tmp_path, monkeypatch, format, seeds):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    run(originals / format, seeds, tmp_path)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=MORE)])
def test_damaged_folders_with_fresh_seeds(originals, tmp_path, monkeypatch, count):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    base = random.SystemRandom().randrange(1 << 32)
    print(f"seeds from {base}")
    run(originals / "exl2", range(base, base + count), tmp_path)


@pytest.mark.parametrize("name", ["llama-low", "llama-mid"])
@pytest.mark.parametrize("seeds", [range(1000, 1015), pytest.param(range(1015, 1030), marks=MORE)])
def test_damaged_reference_models(fixtures_dir, tmp_path, monkeypatch, name, seeds):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    run(fixtures_dir / name, seeds, tmp_path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seeds", [range(200, 230), pytest.param(range(230, 300), marks=MORE)])
def test_damaged_folders_never_crash_the_compiled_kernels(originals, tmp_path, format, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        folder = shutil.copytree(originals / format, tmp_path / str(seed))
        rng.choice([flip_bytes, overwrite_a_tensor, exchange_tensors])(rng, folder)
        before = memory.live_bytes()
        try:
            assert loaded_logits(folder).shape[1] > 0
        except ExlLoaderError as error:
            assert str(error)
        assert memory.live_bytes() == before
