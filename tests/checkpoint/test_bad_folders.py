"""Bad model folders and load options are typed errors and leave nothing in memory."""

from __future__ import annotations

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.utils.errors import (
    InvalidCheckpoint,
    InvalidConfig,
    InvalidSettings,
    ModelNotFound,
    UnsupportedArchitecture,
    UnsupportedFormat,
)
from support.broken import edit_config, edit_header, edit_tensors, rejected
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


def test_no_config(copy_of):
    folder = copy_of("dense")
    (folder / "config.json").unlink()
    rejected(folder, ModelNotFound, "config.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"x"', "{'a': 1}", "\x00\xff", "[" * 9999]
)
def test_broken_json(copy_of, text):
    folder = copy_of("dense")
    (folder / "config.json").write_text(text, encoding="latin-1")
    rejected(folder, InvalidConfig, "config.json")


def test_an_unknown_architecture_lists_the_known_ones(copy_of):
    folder = copy_of("dense")
    edit_config(folder, architectures=["BertForMaskedLM"], model_type="bert")
    rejected(folder, UnsupportedArchitecture, "BertForMaskedLM", *ARCHITECTURES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**12),
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 7),
        ("head_dim", 1 << 40),
        ("vocab_size", 1 << 50),
        ("intermediate_size", 2.5),
        ("rms_norm_eps", "small"),
        ("max_position_embeddings", 0),
        ("rope_theta", -1),
        ("rope_scaling", {"rope_type": "linear", "factor": -2}),
        ("hidden_act", "swirl"),
    ],
)
def test_absurd_dimensions(copy_of, key, value):
    folder = copy_of("dense")
    edit_config(folder, **{key: value})
    rejected(folder, InvalidConfig, "factor" if key == "rope_scaling" else key)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 96), ("vocab_size", 289), ("num_hidden_layers", 3), ("head_dim", 64)],
)
def test_a_config_of_another_model(copy_of, key, value):
    folder = copy_of("dense")
    edit_config(folder, **{key: value})
    rejected(folder, InvalidCheckpoint, "model")


# Weight files


def test_no_weights(copy_of):
    folder = copy_of("dense")
    (folder / SINGLE).unlink()
    rejected(folder, ModelNotFound, "safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_and_never_opened(copy_of, tmp_path, name):
    folder, witness = copy_of("dense"), tmp_path / "opened"
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(f"cos\nsystem\n(S'touch {witness}'\ntR.".encode())
    rejected(folder, UnsupportedFormat, name, "pickle")
    assert not witness.exists()


def test_a_missing_shard(copy_of):
    folder = copy_of("sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    rejected(folder, InvalidCheckpoint, "model-00002-of-00003.safetensors")


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [0, 10**15]),
        ("data_offsets", [100, 0]),
        ("data_offsets", [-8, 0]),
        ("data_offsets", "all"),
        ("data_offsets", [0]),
        ("shape", [10**9, 10**9, 10**9]),
        ("shape", [-1, -64]),
        ("shape", [64, 65]),
        ("dtype", "F32"),
        ("dtype", "F7"),
    ],
)
def test_a_wrong_header(copy_of, key, value):
    folder = copy_of("dense")
    edit_header(folder / SINGLE, lambda header: header["lm_head.weight"].update({key: value}))
    rejected(folder, InvalidCheckpoint, SINGLE)


@pytest.mark.parametrize("length", [0, 1 << 63, (1 << 64) - 1, 10**7])
def test_a_wrong_header_length(copy_of, length):
    path = copy_of("dense") / SINGLE
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    rejected(path.parent, InvalidCheckpoint, SINGLE)


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


# Load options



@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"cache_type": "q5"}, "cache_type"),
        ({"device": "abacus"}, "device"),
        ({"device": None}, "device"),
        ({"device": ["cpu", 0]}, "device"),
        ({"memory_limit": "-1GiB"}, "memory_limit"),
        ({"alpha_value": 0.0}, "alpha_value"),
        ({"alpha_value": float("inf")}, "alpha_value"),
        ({"alpha_value": "2"}, "alpha_value"),
        ({"compress_pos_emb": float("nan")}, "compress_pos_emb"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_load_options(originals, options, word):
    rejected(originals / "dense", InvalidSettings, word, **options)
