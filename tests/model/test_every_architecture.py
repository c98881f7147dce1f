"""Features of a loaded model, with every architecture.

A reused prefix, concurrent requests, a draft model and layers on two devices must give the ids of
a single request, with a 4-bit cache and in the planned memory.
"""

from __future__ import annotations

import os
import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import exl_loader  # noqa: E402
from support import in_threads  # noqa: E402
from support.exhaustive import some_of  # noqa: E402
from support.hf_models import MODELS, make_model  # noqa: E402

OPTIONS = {"ctx_size": 512, "cache_type": "q4", "chunk_size": 64, "max_batch_size": 4}
NEW = 8


@pytest.fixture
def load():
    """Load a model on the CPU, whose bytes must be the planned ones."""
    def loaded(folder, device="cpu", **options):
        reservation = exl_loader.plan(folder, device=device, **OPTIONS, **options)
        model = exl_loader.load(folder, device=device, **OPTIONS, **options)
        assert model.allocated_bytes() == reservation.total_bytes
        return model

    return loaded


def split_in_two(folder) -> list[float]:
    """Return a `gpu_split` by which both of two devices have layers."""
    total = exl_loader.plan(folder, device="cpu", **OPTIONS).total_bytes
    for share in (0.9, 0.8, 0.7, 0.6):
        gpu_split = [share * total / 2**30, 1.0]
        planned = exl_loader.plan(folder, device="cpu:0,cpu:1", gpu_split=gpu_split, **OPTIONS)
        layers = [(device.first_layer, device.end_layer) for device in planned.devices]
        if len(layers) == 2 and all(first < end for first, end in layers):
            return gpu_split
    raise AssertionError(f"{folder}: no split over two devices")


@pytest.mark.parametrize("name", some_of(sorted(MODELS), 8))
def test_every_feature_gives_the_same_ids(name, tmp_path, load):
    seed = int.from_bytes(os.urandom(3), "little")
    folder = tmp_path / "m"
    make_model(name, seed, folder, "float16")
    rng = random.Random(seed)
    common = [rng.randrange(3, 331) for _ in range(300)]
    prompts = [common + [rng.randrange(3, 331) for _ in range(n)] for n in (1, 7, 20)]

    def ids(model, prompt):
        return list(model.generate_ids(
            prompt, max_new_tokens=NEW, temperature=0, ban_eos_token=True
        ))

    alone = []
    for prompt in prompts:
        with load(folder) as model:
            alone.append(ids(model, prompt))
    assert all(len(found) == NEW for found in alone)
    with load(folder) as model:
        # The second and third request find the pages of the first 256 ids.
        assert [ids(model, prompt) for prompt in prompts] == alone, seed
    with load(folder) as model:
        assert in_threads(lambda prompt: ids(model, prompt), prompts) == alone, seed
    with load(folder, device="cpu:0,cpu:1", gpu_split=split_in_two(folder)) as model:
        assert in_threads(lambda prompt: ids(model, prompt), prompts) == alone, seed
    with load(folder, model_draft=folder) as model:
        assert in_threads(lambda prompt: ids(model, prompt), prompts) == alone, seed
