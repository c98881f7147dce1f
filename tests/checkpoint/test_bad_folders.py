"""Bad model folders and load options are typed errors and leave nothing in memory."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from exl_loader.utils.errors import (
    InvalidCheckpoint,
    ModelNotFound,
    UnsupportedFormat,
)
from support.broken import edit_config, edit_tensors, rejected
from support.tiny import write_tiny_model

SINGLE = "model.safetensors"
Q_PROJ = "model__layers__0__self_attn__q_proj__weight"


pytestmark = pytest.mark.usefixtures("reference_operations")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_tiny_model(folder / "dense")
    write_tiny_model(folder / "sharded", shards=3)
    return folder


# The folder and its config


def test_no_folder(tmp_path):
    rejected(tmp_path / "none", ModelNotFound, "none")
    # More than any file system takes, and still a line that can be read.
    rejected(tmp_path / ("long" * 70), ModelNotFound, "nothing there")


def test_a_file_instead_of_a_folder(copy_of):
    rejected(copy_of("dense") / "config.json", ModelNotFound, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 96), ("vocab_size", 289), ("num_hidden_layers", 3), ("head_dim", 64)],
)
def test_a_config_of_another_model(copy_of, key, value):
    folder = copy_of("dense")
    edit_config(folder, **{key: value})
    rejected(folder, InvalidCheckpoint, "model")


# Weight files


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_a_truncated_shard(copy_of, keep):
    folder = copy_of("sharded")
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    rejected(folder, InvalidCheckpoint, path.name)


def test_an_index_that_names_files_which_are_not_there(copy_of):
    folder = copy_of("dense")
    index = {"weight_map": {"model.norm.weight": "model-00007-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    rejected(folder, InvalidCheckpoint, "model-00007-of-00009.safetensors")


def test_a_missing_tensor(copy_of):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, model__layers__1__mlp__up_proj__weight=None)
    rejected(folder, InvalidCheckpoint, "model.layers.1.mlp.up_proj")


def test_a_tensor_of_the_wrong_shape(copy_of):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, model__norm__weight=lambda t: t[:-1])
    rejected(folder, InvalidCheckpoint, "model.norm.weight", "[64]", "[63]")


@pytest.mark.parametrize("name", ["model__norm__weight", Q_PROJ])
def test_a_tensor_of_the_wrong_dtype(copy_of, name):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, **{name: lambda t: t.int()})
    rejected(folder, (InvalidCheckpoint, UnsupportedFormat), "int32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model__embed_tokens__weight", "model__norm__weight", "lm_head__weight"]
)
def test_tensors_with_nan_or_infinity(copy_of, name, value):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, **{name: lambda t: t.index_fill(0, t.new_zeros(1).long(), value)})
    rejected(folder, InvalidCheckpoint, name.replace("__", "."), "finite")
