"""Bad input from end to end: a typed error that says what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from makers import write_quantized_model
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

import exl_loader
from exl_loader import memory
from exl_loader.architectures import ARCHITECTURES
from exl_loader.errors import (
    ExlLoaderError,
    InvalidCheckpoint,
    InvalidConfig,
    InvalidSettings,
    InvalidTokenizer,
    ModelNotFound,
    PromptTooLong,
    UnsupportedArchitecture,
    UnsupportedFormat,
)

CTX = 300
SINGLE = "model.safetensors"
EXL2_FILE = "output.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def reference_operations(monkeypatch):
    """What is wrong is found by Python; no compiler is waited for."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_tiny_model(folder / "dense")
    write_tiny_model(folder / "sharded", shards=3)
    write_quantized_model(folder / "exl2", "exl2", seed=5)
    write_quantized_model(folder / "gptq", "gptq", seed=5)
    return folder


@pytest.fixture
def copy_of(originals, tmp_path):
    def make(name: str):
        return shutil.copytree(originals / name, tmp_path / name)

    return make


def rejected(folder, error, *words: str, **options) -> None:
    """Load, expect one readable line that names the thing, and look for what is left.

    Args:
        error: the type that is raised, exactly, or a tuple of those that may be.
    """
    before = memory.live_bytes()
    with pytest.raises(ExlLoaderError) as caught:
        exl_loader.load(folder, ctx_size=CTX, **options)
    found = caught.value
    assert type(found) in (error if isinstance(error, tuple) else (error,)), found
    text = str(found)
    assert "\n" not in text and len(text) < 1000
    for word in words:
        assert word in text, text
    assert memory.live_bytes() == before


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder, file: str, **changes) -> None:
    """Change tensors (names with `__` for dots); None removes one."""
    tensors = load_file(folder / file)
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / file)


def edit_header(path, edit) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# The folder and its config


def test_no_folder(tmp_path):
    rejected(tmp_path / "none", ModelNotFound, "none")
    # More than any file system takes, and still a line that can be read.
    rejected(tmp_path / ("long" * 70), ModelNotFound, "nothing there")


def test_a_file_for_a_folder(copy_of):
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
    index = {"weight_map": {"lm_head.weight": "model-00007-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rejected(folder, InvalidCheckpoint, "model-00007-of-00009.safetensors")


def test_an_exl2_folder_may_keep_the_index_of_its_source(copy_of):
    folder = copy_of("exl2")
    index = {"weight_map": {"lm_head.weight": "model-00007-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with exl_loader.load(folder, ctx_size=CTX) as model:
        assert model.prompt_logits([1, 2]).isfinite().all()


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
def test_a_header_that_lies(copy_of, key, value):
    folder = copy_of("dense")
    edit_header(folder / SINGLE, lambda header: header["lm_head.weight"].update({key: value}))
    rejected(folder, InvalidCheckpoint, SINGLE)


@pytest.mark.parametrize("length", [0, 1 << 63, (1 << 64) - 1, 10**7])
def test_a_header_length_that_lies(copy_of, length):
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


@pytest.mark.parametrize("name", ["model__norm__weight", f"{LAYER}.weight".replace(".", "__")])
def test_a_tensor_of_the_wrong_dtype(copy_of, name):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, **{name: lambda t: t.int()})
    rejected(folder, (InvalidCheckpoint, UnsupportedFormat), "int32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model__embed_tokens__weight", "model__norm__weight", "lm_head__weight"]
)
def test_numbers_that_are_none(copy_of, name, value):
    folder = copy_of("dense")
    edit_tensors(folder, SINGLE, **{name: lambda t: t.index_fill(0, t.new_zeros(1).long(), value)})
    rejected(folder, InvalidCheckpoint, name.replace("__", "."), "finite")


# EXL2 and GPTQ


def exl2_edit(copy_of, tensor: str, change):
    folder = copy_of("exl2")
    edit_tensors(folder, EXL2_FILE, **{f"{LAYER}.{tensor}".replace(".", "__"): change})
    return folder


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, -4])
def test_unknown_bits(copy_of, bits):
    def change(groups):
        groups[0] = bits
        return groups

    rejected(exl2_edit(copy_of, "q_groups", change), InvalidCheckpoint, f"{LAYER}.q_groups")


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.flip(0),
        lambda groups: groups * 0 + 4,
        lambda groups: groups + (groups.new_tensor([0, 1]).repeat(len(groups) // 2)),
        lambda groups: groups - (groups.new_tensor([0, 3]).repeat(len(groups) // 2)),
    ],
)
def test_a_group_table_that_does_not_add_up(copy_of, change):
    rejected(exl2_edit(copy_of, "q_groups", change), InvalidCheckpoint, f"{LAYER}.q_groups")


@pytest.mark.parametrize(
    "change", [lambda p: p * 0, lambda p: p + 1, lambda p: p - 1, lambda p: p | (1 << 30)]
)
def test_a_permutation_that_is_none(copy_of, change):
    folder = exl2_edit(copy_of, "q_invperm", change)
    rejected(folder, InvalidCheckpoint, f"{LAYER}.q_invperm", "permutation")


def test_nan_scales(copy_of):
    folder = exl2_edit(copy_of, "q_scale_max", lambda scales: scales * float("nan"))
    rejected(folder, InvalidCheckpoint, f"{LAYER}.q_scale_max", "finite")


@pytest.mark.parametrize("tensor", ["q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"])
def test_exl2_tensors_missing_or_cut(copy_of, tensor):
    folder = exl2_edit(copy_of, tensor, lambda values: values[:-1])
    rejected(folder, InvalidCheckpoint, LAYER)
    shutil.rmtree(folder)
    rejected(exl2_edit(copy_of, tensor, None), InvalidCheckpoint, LAYER)


def test_gptq_group_indices_out_of_range(copy_of):
    folder = copy_of("gptq")
    (file,) = (path.name for path in folder.glob("*.safetensors"))
    tensors = load_file(folder / file)
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"] + 1000
    save_file(tensors, folder / file)
    rejected(folder, InvalidCheckpoint, f"{LAYER}.g_idx")


def test_another_quantisation_is_named(copy_of):
    folder = copy_of("dense")
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    rejected(folder, UnsupportedFormat, "awq")


# Load options, prompts, settings


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


@pytest.fixture(scope="module")
def model(originals):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_REFERENCE", "1")
        loaded = exl_loader.load(originals / "dense", ctx_size=CTX)
    yield loaded
    loaded.unload()


def test_a_prompt_longer_than_the_context(model):
    for call in (model.prompt_logits, model.generate_ids, model.generate):
        with pytest.raises(PromptTooLong, match=f"{CTX}.*{CTX + 1} tokens"):
            list(call([5] * (CTX + 1)))
    assert model.prompt_logits([5] * CTX).shape[0] == CTX


def test_an_empty_prompt(model):
    with pytest.raises(InvalidSettings, match="prompt"):
        model.prompt_logits([])
    # Generation begins with the model's BOS token instead.
    assert len(list(model.generate_ids([], {"max_new_tokens": 2, "ban_eos_token": True}))) == 2


NO_TOKENS = [["x"], ["5"], [None], [1.5], [[1, 2]], b"ab", None, 5]


@pytest.mark.parametrize("ids", [*NO_TOKENS, [-1], [288], [1, 10**30]])
def test_what_is_no_token(model, ids):
    for call in (model.prompt_logits, model.generate_ids, model.generate):
        with pytest.raises(InvalidSettings):
            list(call(ids))


@pytest.mark.parametrize("ids", [*NO_TOKENS, "ab"])
def test_what_cannot_be_decoded(model, ids):
    with pytest.raises(InvalidSettings, match="ids: expected token ids"):
        model.decode(ids)


def test_integers_of_other_libraries_are_token_ids(model):
    numpy_ids, torch_ids = np.array([1, 2]), torch.tensor([1, 2])
    assert torch.equal(model.prompt_logits(numpy_ids), model.prompt_logits(torch_ids))
    assert model.decode(numpy_ids) == model.decode(torch_ids) == model.decode([1, 2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
    ],
)
def test_invalid_sampler_values(model, name, value):
    allocated = model.allocated_bytes()
    with pytest.raises(InvalidSettings, match=name):
        list(model.generate_ids([1, 2], {name: value}))
    assert model.allocated_bytes() == allocated
    assert model.prompt_logits([1, 2]).isfinite().all()


def test_a_missing_tokenizer(copy_of):
    folder = copy_of("dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with exl_loader.load(folder, ctx_size=CTX) as model:
        for call in (model.encode, lambda text: model.decode([1]), model.generate):
            with pytest.raises(InvalidTokenizer, match="tokenizer"):
                list(call("text"))
