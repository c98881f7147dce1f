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
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import exl_loader
from exl_loader.formats import read_linear
from exl_loader.memory import buffers as memory
from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.utils.errors import ExlLoaderError
from support import damage as damages
from support.makers import write_quantized_model
from support.tiny import write_tiny_model, write_tokenizer

CTX = 64
IDS = [1, 5, 77, 130, 12, 40, 41, 250, 3]
# Two orders of summation in float32, over weights that damage may have made very unequal.
TOLERANCE = 1e-3

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
    damage = rng.choice(damages.ALL)
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
        rng.choice(damages.OF_VALUES)(rng, folder)
        before = memory.live_bytes()
        try:
            assert loaded_logits(folder).shape[1] > 0
        except ExlLoaderError as error:
            assert str(error)
        assert memory.live_bytes() == before
