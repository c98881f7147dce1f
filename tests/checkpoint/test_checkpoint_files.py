"""Which files of a folder hold the weights, and in which format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import (
    InvalidCheckpoint,
    InvalidConfig,
    ModelNotFound,
    UnsupportedFormat,
)
from support.makers import quantization_config, write_folder

INDEX = "model.safetensors.index.json"


def names(folder: Path) -> list[str]:
    with Checkpoint.open(folder) as checkpoint:
        return sorted(checkpoint.headers)


def save(folder: Path, file: str, **tensors: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(tensors or {file: torch.zeros(1)}, folder / file)


# Which files count


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFound, match="nothing"):
        Checkpoint.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelNotFound, match="a file"):
        Checkpoint.open(tmp_path / "file")
    with pytest.raises(ModelNotFound, match="safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.PKL"])
def test_pickles_are_refused_and_never_opened(tmp_path, file):
    os.mkfifo(tmp_path / file)  # opening it would wait for ever
    with pytest.raises(UnsupportedFormat, match="refused, never opened.*safetensors"):
        Checkpoint.open(tmp_path)


def test_the_error_names_gguf(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedFormat, match="GGUF"):
        Checkpoint.open(tmp_path)


def test_pickles_beside_safetensors_do_not_matter(tmp_path):
    save(tmp_path, "model.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"\x80")
    assert names(tmp_path) == ["model.safetensors"]


def test_output_files_win_over_the_source_model(tmp_path):
    save(tmp_path, "output.safetensors", a__q_weight=torch.zeros(1))
    save(tmp_path, "model.safetensors", a__weight=torch.zeros(1))
    assert names(tmp_path) == ["a.q_weight"]


@pytest.mark.parametrize("stem", ["output", "model"])
def test_a_series_is_read_whole_or_not_at_all(tmp_path, stem):
    for i in (1, 2, 3):
        save(tmp_path, f"{stem}-{i:05}-of-00003.safetensors")
    assert len(names(tmp_path)) == 3
    (tmp_path / f"{stem}-00002-of-00003.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=f"{stem}-00002-of-00003.*nothing"):
        Checkpoint.open(tmp_path)


def test_a_series_of_absurd_length_is_refused_at_once(tmp_path):
    save(tmp_path, "model-1-of-99999999999999999999.safetensors")
    with pytest.raises(InvalidCheckpoint, match="model-2-of-"):
        Checkpoint.open(tmp_path)


def write_index(folder: Path, *files: object) -> None:
    weight_map = {f"tensor{i}": file for i, file in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_exl2_ignores_an_outdated_index(tmp_path):
    save(tmp_path, "output.safetensors", a__q_weight=torch.zeros(1))
    write_index(tmp_path, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert names(tmp_path) == ["a.q_weight"]
    (tmp_path / "output.safetensors").rename(tmp_path / "model.safetensors")
    assert names(tmp_path) == ["a.q_weight"]
    (tmp_path / INDEX).write_text("{broken")
    assert names(tmp_path) == ["a.q_weight"]


def test_files_missing_from_an_index_are_an_error(tmp_path):
    save(tmp_path, "weights-a.safetensors")
    write_index(tmp_path, "weights-a.safetensors", "weights-b.safetensors")
    with pytest.raises(InvalidCheckpoint, match="weights-b.*listed in model.safetensors.index"):
        Checkpoint.open(tmp_path)
    (tmp_path / "weights-a.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match="weights-a.*and 1 more"):
        Checkpoint.open(tmp_path)


def test_a_complete_index_selects_the_files(tmp_path):
    save(tmp_path, "model-00001-of-00001.safetensors", x=torch.zeros(1))
    save(tmp_path, "consolidated.safetensors", x=torch.zeros(1))
    write_index(tmp_path, "model-00001-of-00001.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert [path.name for path in checkpoint.paths] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    "index",
    ["{broken", "[]", '{"weight_map": "x/y"}', '{"weight_map": {"x": 3}}'],
)
def test_a_broken_index_is_refused(tmp_path, index):
    save(tmp_path, "model.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(InvalidCheckpoint, match="index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_cannot_name_files_outside_the_folder(tmp_path, file):
    save(tmp_path, "model.safetensors")
    write_index(tmp_path, file)
    with pytest.raises(InvalidCheckpoint, match="files in this folder"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        save(tmp_path, file, x=torch.zeros(1))
    with pytest.raises(InvalidCheckpoint, match=r"x: is in a\.safetensors and in b\.saf"):
        Checkpoint.open(tmp_path)


# Which format it is


def format_of(folder: Path, tensor: str, config: dict | None = None, old: dict | None = None):
    write_folder(folder, {tensor: torch.zeros(1)}, config)
    if old is not None:
        (folder / "quantize_config.json").write_text(json.dumps(old))
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.format, checkpoint.quantization.values


def test_formats_are_recognised_by_names_and_settings(tmp_path):
    gptq = {"quantization_config": quantization_config("gptq")}
    assert format_of(tmp_path / "1", "a.q_weight")[0] == "exl2"
    assert format_of(tmp_path / "2", "a.q_weight", gptq)[0] == "exl2"
    assert format_of(tmp_path / "3", "a.qweight", gptq)[0] == "gptq"
    assert format_of(tmp_path / "4", "a.qweight")[0] == "gptq"
    assert format_of(tmp_path / "5", "a.qweight", old={"bits": 4})[0] == "gptq"
    assert format_of(tmp_path / "6", "a.weight") == ("dense", {})
    assert format_of(tmp_path / "7", "a.weight", {"quantization_config": None}) == ("dense", {})


def test_settings_of_both_files_are_merged(tmp_path):
    config = {"quantization_config": {"quant_method": "GPTQ", "bits": 4}}
    _, merged = format_of(tmp_path / "m", "a.qweight", config, {"bits": 8, "group_size": 64})
    assert merged == {"quant_method": "GPTQ", "bits": 4, "group_size": 64}


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "exl3", "fp8", "compressed-tensors"])
def test_other_methods_are_refused_by_name(tmp_path, method):
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedFormat, match=f"quant_method {method}"):
        format_of(tmp_path / "m", "a.qweight", config)


@pytest.mark.parametrize("method", [5, ["gptq"], {"a": 1}, "x" * 5000])
def test_a_method_that_is_not_text_is_refused(tmp_path, method):
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(UnsupportedFormat, match="^quant_method .") as caught:
        format_of(tmp_path / "m", "a.qweight", config)
    assert len(str(caught.value)) < 400


def test_exl3_is_recognised_by_its_tensors(tmp_path):
    with pytest.raises(UnsupportedFormat, match="exl3"):
        format_of(tmp_path / "m", "a.trellis")


@pytest.mark.parametrize(
    "settings",
    [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}],
)
def test_other_layouts_of_gptq_are_refused(tmp_path, settings):
    config = {"quantization_config": quantization_config("gptq", **settings)}
    with pytest.raises(UnsupportedFormat, match="marlin"):
        format_of(tmp_path / "m", "a.qweight", config)


@pytest.mark.parametrize("method", ["exl2", "gptq"])
def test_a_method_without_its_tensors_is_refused(tmp_path, method):
    config = {"quantization_config": quantization_config(method)}
    with pytest.raises(InvalidCheckpoint, match=r"tensors named \*\.q"):
        format_of(tmp_path / "m", "a.weight", config)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b'{"quantization_config": 3}'),
        ("quantize_config.json", b"{"),
        ("quantize_config.json", b"[1]"),
        ("quantize_config.json", b'{"bits": "\xff"}'),
    ],
)
def test_broken_settings_are_refused(tmp_path, file, text):
    write_folder(tmp_path / "m", {"a.weight": torch.zeros(1)})
    (tmp_path / "m" / file).write_bytes(text)
    with pytest.raises(InvalidConfig, match=file):
        Checkpoint.open(tmp_path / "m")
