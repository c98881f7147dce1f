"""Whole folders: converted, loaded by the engine, and compared with the original's logits."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import exl_loader
from exl_loader.commands.cli import main
from exl_loader.convert import conversion, convert, measurement
from exl_loader.convert.mixes import Mix
from exl_loader.utils.errors import (
    InvalidCheckpoint,
    InvalidSettings,
    InvalidTokenizer,
    ModelNotFound,
    UnsupportedFormat,
)
from support.exhaustive import some_of
from support.hf_models import COMMON, expected_logits, make_model, relative_error
from support.tiny import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FEW_ROWS = {"calibration_rows": 4, "calibration_row_len": 64}


@pytest.fixture(autouse=True)
def _reference_operations_and_few_options(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    # Layers this small have tables of several bits a weight.
    monkeypatch.setattr(conversion, "MOST_BITS", 16)
    monkeypatch.setattr(measurement, "MIXES", (*mixes(3, 8), measurement.PROBE))


def mixes(*widths: int) -> list[Mix]:
    return [Mix((bits,), (64,)) for bits in widths]


def logits_of(folder, ids) -> torch.Tensor:
    with exl_loader.load(folder, ctx_size=256, cache_type="fp32") as model:
        return model.prompt_logits(ids)


# Half a step of 1/256 of a range some 6 standard deviations wide is 6 / 256 / sqrt(12) = 0.7 %
# a matrix. Up to seven matrices are in sequence; products of two of them (gate and up, scores
# and values) add their errors, and random weights do nothing to damp them.
EIGHT_BIT_TOLERANCE = 7 * 0.007

# One model of each kind of layer.
CONVERTED = ["mixtral", "llama-biases", "gemma2", "phi3", "gemma3-images", "granite",
             "cohere-norms", "glm4", "olmo2", "smollm3-window", "nemotron", "mistral3",
             "gpt2", "falcon-new", "stablelm-norms", "bigcode", "neox", "phi-norms",
             "internlm2", "index", "minicpm", "starcoder2", "orion", "opt", "gpt-j",
             "qwen2moe", "qwen3moe", "dbrx", "granitemoe", "gpt-oss", "glm4moe", "ernie-moe"]


@pytest.mark.parametrize("name", some_of(CONVERTED, 3))
def test_every_kind_of_model_keeps_its_logits_at_8_bits(name, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "MIXES", mixes(8))
    monkeypatch.setattr(measurement, "PROBE", *mixes(8))
    folder = tmp_path / "source"
    original = make_model(name, seed=3, folder=folder, num_hidden_layers=1)
    write_tokenizer(folder, COMMON["vocab_size"])
    convert(folder, tmp_path / "exl2", bits=12, head_bits=8, **FEW_ROWS)
    ids = torch.randint(3, 259, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    expected = expected_logits(original, ids)
    difference = logits_of(tmp_path / "exl2", ids) - expected
    # The median row: a router's near-tie may send a row or two to another expert.
    errors = difference.norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < EIGHT_BIT_TOLERANCE


def test_converted_folder_is_complete_and_runs(tiny_model, tmp_path):
    folder, target = tiny_model(), tmp_path / "exl2"
    result = convert(folder, target, bits=5, head_bits=6, **FEW_ROWS)
    assert result.bits_per_weight <= 5
    assert len({mix.bits for mix in result.layers.values()}) > 1
    assert sorted(os.listdir(target)) == [
        "config.json", "measurement.json", "output.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert result.file_bytes == (target / "output.safetensors").stat().st_size
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "exl2", "version": exl_loader.__version__, "bits": 5, "head_bits": 6,
        "calibration": {"rows": 4, "length": 64, "dataset": "(default)"},
    }
    assert config == json.loads((folder / "config.json").read_text())
    tensors = load_file(target / "output.safetensors")
    for name, mix in result.layers.items():
        assert set(tensors[f"{name}.q_groups"][0::2].tolist()) == set(mix.bits)
    ids = list(range(3, 43))
    # Random weights at 3 and 4 bits on ids that no text has: far from noise, not close.
    assert relative_error(logits_of(target, ids), logits_of(folder, ids)) < 0.4
    with exl_loader.load(target, ctx_size=256) as model:
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "seed": 1}
        assert len(list(model.generate_ids("x", settings))) == 4


def test_more_bits_give_a_smaller_error(tiny_model, tmp_path):
    folder, ids = tiny_model(), list(range(3, 43))
    original = logits_of(folder, ids)
    errors = []
    for bits in (4.4, 12):
        convert(folder, tmp_path / f"{bits}", bits=bits, head_bits=8, **FEW_ROWS)
        errors.append(relative_error(logits_of(tmp_path / f"{bits}", ids), original))
    assert errors[0] > 3 * errors[1]


def test_command_line(tiny_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 100)
    arguments = ["convert", str(tiny_model()), str(tmp_path / "exl2"), "--bits", "5",
                 "--calibration", str(text), "--calibration-rows", "2",
                 "--calibration-row-len", "64"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out_dir"] == str(tmp_path / "exl2") and result["calibration_tokens"] == 128
    assert main(arguments) == 1
    assert "nothing is yet" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "other")
    assert main(arguments) == 0
    assert "bits per weight" in capsys.readouterr().out


def test_bad_input_is_an_error_and_leaves_no_folder(tiny_model, tmp_path):
    folder, target = tiny_model(), tmp_path / "exl2"
    cases = [
        (InvalidSettings, folder, {"bits": 1}),
        (InvalidSettings, folder, {"bits": float("nan")}),
        (InvalidSettings, folder, {"bits": 3}),
        (InvalidSettings, folder, {"head_bits": 5}),
        (InvalidSettings, folder, {"calibration": tmp_path / "missing"}),
        (ModelNotFound, tmp_path / "nowhere", {}),
        (InvalidTokenizer, tiny_model("bare", tokenizer=False), {}),
    ]
    for error, source, options in cases:
        with pytest.raises(error):
            convert(source, target, **FEW_ROWS | options)
    before = sorted(os.listdir(tmp_path))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="layers.1.mlp.up_proj"):
        convert(folder, target, bits=5, **FEW_ROWS)
    assert sorted(os.listdir(tmp_path)) == before


def test_quantised_source_is_refused(tiny_model, tmp_path):
    convert(tiny_model(), tmp_path / "exl2", bits=5, **FEW_ROWS)
    with pytest.raises(UnsupportedFormat, match="unquantised"):
        convert(tmp_path / "exl2", tmp_path / "again", **FEW_ROWS)
