"""Hundreds of damaged checkpoints: each is a typed error or loads as it decodes.

The reference models and small GPTQ and unquantised ones are damaged. What loads is compared with
`QuantizedLayer.weight`, and has to be finite. Seeds are fixed but for one round, which draws its
own and prints it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from exl_loader.backends.cpu.layout import PackedLinear
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.backends.reference.planes import dequantize
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import read_linear
from exl_loader.utils.errors import ExlLoaderError
from support import damage as damages
from support.makers import allocate, linear_part, write_folder, write_quantized_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 12


def linears_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> (in_features, out_features) of the linear layers of an undamaged folder."""
    (path,) = folder.glob("*.safetensors")
    header, _ = damages.split_file(path)
    config = json.loads((folder / "config.json").read_text())
    linears = {}
    for name, entry in header.items():
        layer, _, kind = name.rpartition(".")
        shape = entry["shape"]
        if kind == "q_weight":
            in_features = header[f"{layer}.q_invperm"]["shape"][0]
            linears[layer] = (
                in_features, config["vocab_size"] if layer == "lm_head" else shape[1])
        elif kind == "qweight":
            linears[layer] = (shape[0] * 32 // config["quantization_config"]["bits"], shape[1])
        elif kind == "weight" and len(shape) == 2:
            linears[layer] = (shape[1], shape[0])
    return linears


def load_everything(folder: Path, linears: dict[str, tuple[int, int]]) -> None:
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
        folder = tmp_path / name
        folder.mkdir()
        for path in [*folders[name].glob("*.safetensors"), folders[name] / "config.json"]:
            (folder / path.name).write_bytes(path.read_bytes())
        damage(rng, folder)
        try:
            load_everything(folder, linears_of(folders[name]))
            loaded += 1
        except ExlLoaderError as error:
            assert error.thing and (error.expected or error.actual or error.remedy), repr(error)
            assert len(str(error)) < 1000
            refused += 1
        shutil.rmtree(folder)
    return refused, loaded


@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", damages.OF_WEIGHTS, ids=lambda damage: damage.__name__)
def test_damage_is_refused_or_harmless(models, damage, tmp_path):
    refused = loaded = 0
    for seed in range(ROUNDS):
        counts = run(models, damage, seed, tmp_path)
        refused, loaded = refused + counts[0], loaded + counts[1]
    assert refused, "damage of this kind is never noticed"
    if damage in damages.FATAL:
        assert not loaded


def test_damage_with_a_fresh_seed(models, tmp_path):
    seed = random.SystemRandom().randrange(1 << 30) * 6 + 1
    print(f"seed {seed}")
    for damage in damages.OF_WEIGHTS:
        _, loaded = run(models, damage, seed, tmp_path)
        assert not loaded or damage not in damages.FATAL, damage.__name__


def test_undamaged_models_load(models):
    for folder in models.values():
        load_everything(folder, linears_of(folder))
