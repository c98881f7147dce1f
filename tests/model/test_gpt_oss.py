"""GPT-OSS: the limits of its gate, attention sinks, and experts in all forms in which they come."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.model.builder import build_parts
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedArchitecture, UnsupportedFormat
from support.emulated_cuda import emulated_ops, install
from support.hf_models import (
    error_of_most_rows,
    expected_logits,
    load_model,
    make_model,
    relative_error,
)
from support.makers import make_gptq_layer
from support.model_builder import build_model, run_chunks
from support.quantized_folder import quantize_folder

pytestmark = pytest.mark.usefixtures("one_thread")

REFERENCE_BOUND = 2e-5
COMPILED_BOUND = 2e-2
NUM_IDS = 40
EXPERTS = 5
FIRST = "model.layers.0."


def random_ids(seed):
    return [random.Random(seed + i).randrange(331) for i in range(NUM_IDS)]


def change(folder, function):
    """Rewrite the weights of a folder of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


def open_parts(folder):
    with Checkpoint.open(folder) as checkpoint:
        return build_parts(ModelConfig.from_dir(folder), checkpoint)


@pytest.fixture
def folder(tmp_path):
    make_model("gpt-oss", 11, tmp_path / "m")
    return tmp_path / "m"


def test_the_limits_of_the_gate_are_those_of_transformers(folder):
    """Most gates and factors of this model are beyond the limit."""
    def enlarge(tensors):
        for name in tensors:
            if name.endswith("gate_up_proj_bias"):
                tensors[name] *= 80

    change(folder, enlarge)
    ids, hf = random_ids(11), load_model(folder)
    expected = expected_logits(hf, ids)
    model, cache = build_model(folder, ReferenceOps())
    assert relative_error(run_chunks(model, cache, ids, NUM_IDS), expected) <= REFERENCE_BOUND
    model, cache = build_model(folder, get_ops(), cache_type="fp16")
    assert relative_error(run_chunks(model, cache, ids, NUM_IDS), expected) <= COMPILED_BOUND
    for layer in hf.model.layers:
        layer.mlp.experts.limit = 1e30
    assert relative_error(expected_logits(hf, ids), expected) > 0.1


@pytest.mark.parametrize("format", ["dense", "exl2", "gptq"])
def test_an_emulated_card_agrees_with_transformers(format, tmp_path, monkeypatch):
    """Its experts have biases, also where the card chooses them without the CPU."""
    seed = int.from_bytes(os.urandom(3), "little")
    make_model("gpt-oss", seed, tmp_path / "m", "float16", intermediate_size=192)
    folder = twin = tmp_path / "m"
    if format != "dense":
        folder = tmp_path / "quantised"
        twin = quantize_folder(tmp_path / "m", folder, format, seed)
    ids = random_ids(seed)
    expected = expected_logits(load_model(twin), ids)
    ops = emulated_ops()
    install(monkeypatch, ops)
    model, cache = build_model(folder, ops, cache_type="fp16", device="cuda:0")
    for chunk in (NUM_IDS, 7, 1):
        error = error_of_most_rows(run_chunks(model, cache, ids, chunk), expected)
        assert error <= COMPILED_BOUND, (seed, chunk)


# Bounds of the relative error with a cache of these bits (measured: 6e-5, 9e-3, 3e-2, 0.12).
CACHE_BOUNDS = {"fp16": 2e-4, "q8": 2e-2, "q6": 7e-2, "q4": 0.3}


@pytest.mark.parametrize("cache_type", CACHE_BOUNDS)
def test_sinks_take_part_with_every_cache(cache_type, tmp_path):
    # All experts, because rounding a key could choose another one.
    folder, ids = tmp_path / "m", random_ids(12)
    make_model("gpt-oss", 11, folder, num_experts_per_tok=EXPERTS)
    expected = expected_logits(load_model(folder), ids)

    def logits():
        model, cache = build_model(folder, get_ops(), cache_type=cache_type)
        return run_chunks(model, cache, ids, 7)

    assert relative_error(logits(), expected) <= CACHE_BOUNDS[cache_type]

    def raise_sinks(tensors):
        for name in tensors:
            if name.endswith(".sinks"):
                tensors[name] += 4

    change(folder, raise_sinks)
    expected = expected_logits(load_model(folder), ids)
    higher = logits()
    assert relative_error(higher, expected) <= CACHE_BOUNDS[cache_type]
    change(folder, lambda tensors: [
        tensors[name].fill_(-1e4) for name in tensors if name.endswith(".sinks")])
    assert relative_error(logits(), expected) > 2 * CACHE_BOUNDS[cache_type]


def test_sinks_are_reserved_as_float32(folder):
    parts = open_parts(folder)
    specs = {spec.name: spec for spec in parts.specs()}
    names = [f"model.layers.{i}.self_attn.sinks" for i in range(3)]
    assert [vector.spec.name for vector in parts.vectors()] == names
    assert all(specs[name].shape == (4,) and specs[name].dtype == "float32" for name in names)


@pytest.mark.parametrize(("sinks", "message"), [
    (None, "sinks"), (torch.zeros(3), "sinks: shape"), (torch.zeros(4).int(), "sinks: dtype"),
])
def test_wrong_sinks_are_refused_from_headers(sinks, message, folder):
    def replace(tensors):
        del tensors[f"{FIRST}self_attn.sinks"]
        if sinks is not None:
            tensors[f"{FIRST}self_attn.sinks"] = sinks

    change(folder, replace)
    with pytest.raises((InvalidCheckpoint, UnsupportedFormat), match=message):
        open_parts(folder)


@pytest.mark.parametrize("name", ["self_attn.sinks", "mlp.experts.down_proj_bias"])
def test_values_that_are_not_finite_are_refused(name, folder):
    change(folder, lambda tensors: tensors[FIRST + name].view(-1)[-1].fill_(float("nan")))
    with pytest.raises(InvalidCheckpoint, match=name):
        build_model(folder, ReferenceOps())


@pytest.mark.parametrize(("name", "kept"), [
    ("gate_up_proj", 4), ("down_proj", 4), ("gate_up_proj_bias", 4), ("down_proj_bias", 0),
])
def test_tensors_of_fewer_experts_are_refused(name, kept, folder):
    def cut(tensors):
        tensor = tensors.pop(f"{FIRST}mlp.experts.{name}")
        if kept:
            tensors[f"{FIRST}mlp.experts.{name}"] = tensor[:kept].contiguous()

    change(folder, cut)
    with pytest.raises(InvalidCheckpoint, match="experts"):
        open_parts(folder)


@pytest.mark.parametrize("declared", [True, False])
def test_mxfp4_is_refused_with_a_remedy(declared, folder):
    def pack(tensors):
        tensor = tensors.pop(f"{FIRST}mlp.experts.gate_up_proj")
        tensors[f"{FIRST}mlp.experts.gate_up_proj_blocks"] = tensor.byte()
        tensors[f"{FIRST}mlp.experts.gate_up_proj_scales"] = tensor[:, :, 0].byte()

    change(folder, pack)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if declared:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedFormat, match=r"MXFP4.*dequantize=True"):
        Checkpoint.open(folder)


def test_gptq_experts_that_were_cut_in_halves_are_refused(tmp_path):
    """In such folders a `gate_proj` has gate rows and up rows."""
    import numpy as np

    make_model("gpt-oss", 13, tmp_path / "m", "float16", intermediate_size=192)
    folder = tmp_path / "gptq"
    quantize_folder(tmp_path / "m", folder, "gptq", 13)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    rng = np.random.default_rng(13)

    def cut(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        for layer in range(3):
            for expert in range(5):
                for part, sizes in (("gate", (96, 192)), ("up", (96, 192)), ("down", (192, 96))):
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                    made, _ = make_gptq_layer(
                        rng, *sizes, bits=settings["bits"], group_size=settings["group_size"],
                        act_order=settings["desc_act"],
                    )
                    tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
                    tensors[f"{name}.bias"] = torch.zeros(sizes[1])

    change(folder, cut)
    with pytest.raises(UnsupportedFormat, match=r"half of the gate rows.*gate_up\.N"):
        open_parts(folder)


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha"])
def test_another_gate_is_refused(key, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 3.0}))
    with pytest.raises(UnsupportedArchitecture, match=key):
        ModelConfig.from_dir(folder)
