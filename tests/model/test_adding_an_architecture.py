"""docs/adding_an_architecture.md: its example runs, and it names every field."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint.architectures import ARCHITECTURES, fields
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedArchitecture
from support import REPO
from support.hf_models import expected_logits, relative_error
from support.model_builder import build_model, run_chunks

PAGE = (REPO / "docs" / "adding_an_architecture.md").read_text()
IDS = [3, 17, 200, 5, 5, 101, 44, 9, 62, 128, 7]
# How the example names what transformers' Gemma names otherwise.
NAMES = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f", "self_attn.o_proj": "attn.out", "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}  # fmt: skip


@pytest.fixture
def example(monkeypatch) -> str:
    """Register the page's entry; returns its name."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    entry = eval(source, vars(fields).copy())
    table = dict(ARCHITECTURES) | {entry.name: entry}
    for module in ("checkpoint.model_class", "checkpoint.folder", "model.builder"):
        monkeypatch.setattr(f"exl_loader.{module}.ARCHITECTURES", table)
    monkeypatch.setattr("exl_loader.checkpoint.folder._BODIES", (entry,))
    return entry.name


def write_example(folder: Path, name: str):
    """Save a random Gemma under the names of the example, and return the model itself."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=168, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 1.2 * value.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        rows = [tensors.pop(f"{prefix}self_attn.{p}_proj.weight") for p in "qkv"]
        tensors[f"{prefix}attn.qkv.weight"] = torch.cat(rows)
    for theirs, ours in NAMES.items():
        tensors = {key.replace(theirs, ours): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    own = {key: getattr(config, key) for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim",
    )}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"architectures": [name], **own}))
    return model


def test_the_example_has_the_logits_of_transformers(example, tmp_path):
    expected = expected_logits(write_example(tmp_path, example), IDS)
    model, cache = build_model(tmp_path, ReferenceOps())
    assert relative_error(run_chunks(model, cache, IDS, len(IDS)), expected) <= 2e-5
    assert relative_error(run_chunks(model, cache, IDS, 4), expected) <= 2e-5


def test_weights_in_two_forms_are_told_apart(example, tmp_path):
    """Which files are a whole model is decided by the names of the entry."""
    expected = expected_logits(write_example(tmp_path, example), IDS)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    model, cache = build_model(tmp_path, ReferenceOps())
    assert relative_error(run_chunks(model, cache, IDS, len(IDS)), expected) <= 2e-5


def test_a_config_of_fewer_layers_is_refused(example, tmp_path):
    write_example(tmp_path, example)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(InvalidCheckpoint, match=r"transformer\.h\.2\.ln_.* of 2 layers has"):
        build_model(tmp_path, ReferenceOps())


def test_the_example_is_not_registered(tmp_path):
    write_example(tmp_path, "ExampleForCausalLM")
    with pytest.raises(UnsupportedArchitecture):
        build_model(tmp_path, ReferenceOps())


def test_the_page_names_every_field():
    for record in (fields.Architecture, fields.Norms, fields.QkNorms, fields.Positions,
                   fields.Factors, fields.Mixture, fields.FusedExperts):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in PAGE, (record, field.name)
