"""Mixtures whose choice has a correction: Glm4Moe (sigmoid) and Ernie4_5_Moe (softmax)."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.model.builder import build_parts
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedArchitecture
from support.hf_models import expected_logits, load_model, make_model, relative_error
from support.model_builder import build_model, run_chunks

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [random.Random(i).randrange(331) for i in range(30)]
CORRECTION = "e_score_correction_bias"


def change(folder, function):
    """Rewrite the weights of a folder of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


def set_key(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("open_ops", [ReferenceOps, get_ops], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", ["glm4moe", "ernie-moe"])
def test_a_correction_chooses_the_experts_and_does_not_weigh_them(name, open_ops, tmp_path):
    make_model(name, 21, tmp_path / "m")

    def only_last(tensors):
        """Choose the last two experts for every row."""
        for name in tensors:
            if name.endswith(CORRECTION):
                tensors[name][..., :-2] = -3.0
                tensors[name][..., -2:] = 3.0

    before = expected_logits(load_model(tmp_path / "m"), IDS)
    change(tmp_path / "m", only_last)
    expected = expected_logits(load_model(tmp_path / "m"), IDS)
    model, cache = build_model(tmp_path / "m", open_ops())
    assert relative_error(run_chunks(model, cache, IDS, 7), expected) <= 2e-5
    assert relative_error(before, expected) > 0.1


@pytest.mark.parametrize("name", ["glm4moe", "ernie-moe"])
def test_a_correction_of_another_length_is_refused(name, tmp_path):
    make_model(name, 22, tmp_path / "m")

    def shorten(tensors):
        for name in tensors:
            if name.endswith(CORRECTION):
                tensors[name] = tensors[name][..., :-1].contiguous()

    change(tmp_path / "m", shorten)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        with pytest.raises(InvalidCheckpoint, match=f"{CORRECTION}: shape"):
            build_parts(ModelConfig.from_dir(tmp_path / "m"), checkpoint)


def test_groups_of_experts_are_refused(tmp_path):
    make_model("glm4moe", 23, tmp_path / "m")
    set_key(tmp_path / "m", n_group=2)
    with pytest.raises(UnsupportedArchitecture, match="n_group"):
        ModelConfig.from_dir(tmp_path / "m")


def test_layers_that_predict_later_tokens_are_not_loaded(tmp_path, caplog):
    """GLM-4.5's folders have one, with norms and an embedding of its own."""
    hf = make_model("glm4moe", 24, tmp_path / "m")

    def add_layer(tensors):
        last = {name.replace("layers.2.", "layers.3."): tensor.clone()
                for name, tensor in tensors.items() if ".layers.2." in name}
        tensors |= last
        tensors["model.layers.3.enorm.weight"] = torch.ones(96)
        tensors["model.layers.3.embed_tokens.weight"] = torch.ones(331, 96)

    change(tmp_path / "m", add_layer)
    set_key(tmp_path / "m", num_nextn_predict_layers=1)
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    error = relative_error(run_chunks(model, cache, IDS, 30), expected_logits(hf, IDS))
    assert error <= 2e-5
    assert "further layers" in caplog.text
    set_key(tmp_path / "m", num_nextn_predict_layers=0)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        with pytest.raises(InvalidCheckpoint, match=r"layers\.3"):
            build_parts(ModelConfig.from_dir(tmp_path / "m"), checkpoint)
