"""Recognising a folder: the files that hold the model, their names, and `is_quantised`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader import load, plan
from exl_loader.checkpoint import Checkpoint, is_quantised
from exl_loader.utils.errors import ExlLoaderError, InvalidCheckpoint
from support import run_python
from support.makers import write_quantized_model
from support.tiny import write_tiny_model

INDEX = "model.safetensors.index.json"
SIZES = dict(hidden_size=64, intermediate_size=128)
SHARD = "model-00001-of-00002.safetensors"


def gptq(folder, **options):
    write_quantized_model(folder, "gptq", config=SIZES, group_size=32, **options)
    return folder


def edit(folder, change, file="config.json"):
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def write_index(folder, *files):
    weight_map = {f"tensor{i}": file for i, file in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def opened(folder):
    with Checkpoint.open(folder) as checkpoint:
        return [path.name for path in checkpoint.paths]


def logits(folder):
    with load(folder, ctx_size=256, cache_type="fp32", device="cpu") as model:
        return model.prompt_logits([1, 5, 9, 200, 17, 3])


def stale_index(folder):
    write_index(folder, SHARD, "model-00002-of-00002.safetensors")


def stray_shard(folder):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}, folder / SHARD)


def index_and_stray_shard(folder):
    stale_index(folder)
    stray_shard(folder)


def broken_index(folder):
    (folder / INDEX).write_text("{")


def broken_shard(folder):
    (folder / SHARD).write_bytes(b"\0" * 40)


def index_that_names_one_stray_shard(folder):
    write_index(folder, SHARD)
    stray_shard(folder)


def adapter(folder):
    save_file({"base.lora_A.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
@pytest.mark.parametrize("kind", ["gptq", "dense"])
@pytest.mark.parametrize(
    "beside",
    [stale_index, stray_shard, index_and_stray_shard, broken_index, broken_shard,
     index_that_names_one_stray_shard, adapter],
)
def test_a_whole_file_wins_over_the_files_beside_it(tmp_path, kind, name, beside, caplog):
    folder = tmp_path / "m"
    gptq(folder) if kind == "gptq" else write_tiny_model(folder)
    (folder / "model.safetensors").rename(folder / name)
    before = sorted(path.name for path in folder.glob("*.safetensors"))
    plan(folder, ctx_size=256)
    beside(folder)
    assert opened(folder) == [name]
    plan(folder, ctx_size=256)
    added = {path.name for path in folder.glob("*.safetensors")} - set(before)
    assert all(f"ignored: {file}" in caplog.text for file in added)


def test_quantised_weights_win_over_the_shards_they_were_made_from(tmp_path):
    folder = gptq(tmp_path / "m")
    write_tiny_model(tmp_path / "source")
    source = load_file(tmp_path / "source/model.safetensors")
    names = sorted(source)
    for number in (1, 2):
        part = {name: source[name] for name in names[number - 1 :: 2]}
        save_file(part, folder / f"model-{number:05}-of-00002.safetensors")
    write_index(folder, SHARD, "model-00002-of-00002.safetensors")
    assert opened(folder) == ["model.safetensors"] and is_quantised(folder)
    # The other way round: the quantised weights are the shards, the source is whole.
    whole = load_file(folder / "model.safetensors")
    save_file(source, folder / "model.safetensors")
    names = sorted(whole)
    for number in (1, 2):
        part = {name: whole[name] for name in names[number - 1 :: 2]}
        save_file(part, folder / f"model-{number:05}-of-00002.safetensors")
    assert opened(folder) == [SHARD, "model-00002-of-00002.safetensors"]
    assert is_quantised(folder) and plan(folder, ctx_size=256).format == "gptq"


@pytest.mark.parametrize(
    "missing", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1."]
)
def test_a_file_that_is_not_whole_does_not_win(tmp_path, missing):
    folder = gptq(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(missing)},
              folder / "model.safetensors")
    stale_index(folder)
    with pytest.raises(InvalidCheckpoint, match=f"{SHARD} and 1 more: listed in"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kind", ["gptq", "dense", "exl2"])
@pytest.mark.parametrize("architectures", [["LlamaModel"], [], None])
def test_weights_without_the_prefix_of_the_body(tmp_path, kind, architectures):
    folder = tmp_path / "m"
    if kind == "dense":
        write_tiny_model(folder)
    else:
        write_quantized_model(folder, kind, config=SIZES, **({"group_size": 32} if kind == "gptq"
                                                           else {}))
    right = logits(folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, path)
    edit(folder, lambda c: c.update(architectures=architectures, model_type="llama"))
    assert torch.equal(logits(folder), right)


def test_the_error_for_a_body_without_a_head_names_the_head(tmp_path):
    folder = gptq(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, path)
    with pytest.raises(InvalidCheckpoint, match="lm_head"):
        plan(folder)


def test_mixed_widths_need_no_declaration(tmp_path):
    """Layers of 4 bits, one of 8 and one of 16, as mixed-precision recipes write them."""
    folder = gptq(tmp_path / "m")
    for name, options in (("down_proj", {"bits": 8}), ("k_proj", None)):
        other = tmp_path / name
        state = gptq(other, **(options or {})) and load_file(other / "model.safetensors")
        path = folder / "model.safetensors"
        tensors = load_file(path)
        prefix = next(k for k in tensors if f"layers.1.mlp.{name}." in k or
                      f"layers.1.self_attn.{name}." in k).rsplit(".", 1)[0]
        for key in [k for k in tensors if k.startswith(prefix)]:
            del tensors[key]
        if options:
            tensors |= {k: v for k, v in state.items() if k.startswith(prefix)}
        else:
            tensors[f"{prefix}.weight"] = torch.randn(32, 64).half() / 8
        save_file(tensors, path)
    assert torch.isfinite(logits(folder)).all()


# One place decides


def exl2(folder):
    write_quantized_model(folder, "exl2")
    return folder


def awq(folder):
    gptq(folder)
    edit(folder, lambda c: c["quantization_config"].update(quant_method="awq"))


def dense(folder):
    write_tiny_model(folder)


def undeclared(folder):
    gptq(folder)
    edit(folder, lambda c: c.pop("quantization_config"))


def byte_order_mark(folder):
    gptq(folder)
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text)


def declared_apart(folder):
    undeclared(folder)
    (folder / "quantize_config.json").write_text('{"wbits": 4, "groupsize": 32}')


def auto_round(folder):
    gptq(folder)
    edit(folder, lambda c: c["quantization_config"].update(quant_method="auto-round"))


def another_models_settings(folder):
    exl2(folder)
    edit(folder, lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}))


def exl2_of_2023_in_shards(folder):
    write_quantized_model(folder, "exl2", shards=3)
    edit(folder, lambda c: c.pop("quantization_config"))


def source_beside(folder):
    exl2_of_2023_in_shards(folder)
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")


def upper_case(folder):
    gptq(folder)
    edit(folder, lambda c: c["quantization_config"].update(quant_method="GPTQ"))


@pytest.mark.parametrize(
    ("make", "ours"),
    [(gptq, True), (exl2, True), (awq, False), (dense, False), (undeclared, True),
     (byte_order_mark, True), (declared_apart, True), (auto_round, True), (upper_case, True),
     (another_models_settings, True), (exl2_of_2023_in_shards, True), (source_beside, True)],
)
def test_engine_and_web_ui_recognise_the_same_folders(tmp_path, make, ours):
    folder = tmp_path / "m"
    make(folder)
    try:
        format = plan(folder, ctx_size=256).format
    except ExlLoaderError:
        format = "refused"
    assert is_quantised(folder) == ours == (format in ("exl2", "gptq"))


def rotated(folder):
    gptq(folder)
    edit(folder, lambda c: c["quantization_config"].update(rotation="hadamard"))


def truncated_config(folder):
    gptq(folder)
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(text[: len(text) // 2])


def truncated_weights(folder):
    gptq(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def missing_shard(folder):
    gptq(folder, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


@pytest.mark.parametrize("make", [rotated, truncated_config, truncated_weights, missing_shard])
def test_a_quantised_folder_that_loading_refuses_is_recognised(tmp_path, make):
    """transformers would invent weights or raise some exception; our loader names the mistake."""
    folder = tmp_path / "m"
    make(folder)
    assert is_quantised(folder)
    with pytest.raises(ExlLoaderError):
        plan(folder)


def test_a_folder_without_weights_is_not_recognised(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/a.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").write_text("x")
    for name in ("empty", "gguf", "file", "absent", "\0"):
        assert not is_quantised(tmp_path / name)


def test_recognition_does_not_import_pytorch(tmp_path):
    folder = exl2(tmp_path / "m")
    code = (
        "import sys; from exl_loader.checkpoint import is_quantised; from pathlib import Path; "
        f"assert is_quantised(Path({str(folder)!r})); assert 'torch' not in sys.modules"
    )
    run_python(code)


def test_an_exl2_layer_may_be_in_a_model_file(tmp_path):
    folder = exl2(tmp_path / "m")
    right = logits(folder)
    shutil.move(folder / "output.safetensors", folder / "model.safetensors")
    stale_index(folder)
    assert torch.equal(logits(folder), right)


def test_a_warning_escapes_unprintable_names(tmp_path, caplog):
    folder = tmp_path / "model"
    write_quantized_model(folder, "exl2")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "f\ud800p\x1b[31m"}
    (folder / "config.json").write_text(json.dumps(config))
    assert plan(folder, ctx_size=256).fits
    (message,) = (record.getMessage() for record in caplog.records)
    assert "\\ud800" in message and "\x1b" not in message and message.encode()
