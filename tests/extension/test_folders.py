"""What the web UI learns of a folder: our loader, and a context that the model has."""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.checkpoint.architectures.multimodal import MULTIMODAL
from extension.panel.panel import ModelChoice, slider_end
from extension.webui import registration
from support.folder_configs import BY_CODE, PUBLISHED, config_of
from support.tiny import CONFIG
from support.webui_double import enter_webui, forget_webui, write_webui

CLASSES = (*ARCHITECTURES, *MULTIMODAL)
# The tensor that a format's linear layers are recognised by.
QUANTISED = {"exl2": "q_weight", "gptq": "qweight"}
UNKNOWN = {"architectures": ["FrobForCausalLM"], "model_type": "frob"}


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """The double of the web UI with the plugin, and its folder of models."""
    root = write_webui(tmp_path_factory.mktemp("folders") / "webui")
    with pytest.MonkeyPatch.context() as patch:
        enter_webui(patch, root, "--model-dir", str(root / "models"))
        settings = importlib.import_module("modules.models_settings")
        importlib.import_module("modules.models")
        assert registration.register()
        yield settings
        forget_webui()


@pytest.fixture
def write(web):
    """Return a function that writes a folder of the config and a few tensors of a model."""
    models = Path(sys.modules["modules.shared"].args.model_dir)

    def folder(config, kind="dense", linear="model.layers.0.self_attn.q_proj") -> str:
        name = f"model-{len(os.listdir(models)) if models.exists() else 0}"
        (models / name).mkdir(parents=True)
        if kind in QUANTISED:
            config = config | {"quantization_config": {"quant_method": kind, "bits": 4}}
        (models / name / "config.json").write_text(json.dumps(config))
        ending = QUANTISED.get(kind, "weight")
        save_file({
            f"{linear}.{ending}": torch.zeros(4, 8, dtype=torch.int32),
            "vision_tower.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2),
        }, models / name / "model.safetensors")
        return name

    return folder


def length_of(name: str) -> int | None:
    return slider_end(ModelChoice(str(Path(sys.modules["modules.shared"].args.model_dir) / name)))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("architecture", CLASSES)
def test_quantised_folders_of_every_architecture_choose_our_loader(web, write, architecture, kind):
    linear = "language_model.model.layers.0.self_attn.o_proj"
    if architecture in ARCHITECTURES:
        entry = ARCHITECTURES[architecture]
        linear = f"{entry.layers}.0.{entry.o_proj}"
    name = write(config_of(architecture, 4096), kind, linear)
    assert web.infer_loader(name, {}) == "ExLlamav2"


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("linear", [
    "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.experts.3.gate_proj", "model.layers.0.block_sparse_moe.experts.0.w1",
    "transformer.h.0.attn.c_attn", "gpt_neox.layers.0.mlp.dense_h_to_4h", "model.tok_embeddings",
])
def test_the_tensors_names_do_not_matter(web, write, linear, kind):
    assert web.infer_loader(write(CONFIG, kind, linear), {}) == "ExLlamav2"
    assert web.infer_loader(write(CONFIG, "dense", linear), {}) == "Transformers"


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_context_ends_at_the_own_length_of_every_architecture(web, write, architecture):
    """The web UI reads neither `n_positions` nor any other name than its three."""
    seed = int.from_bytes(os.urandom(3), "little")
    length = 256 * random.Random(seed).choice([4, 8, 31, 33, 128, 512])
    name = write(config_of(architecture, length), "exl2")
    found = web.get_model_metadata(name)
    assert length_of(name) == length, seed
    assert found["loader"] == "ExLlamav2" and found["ctx_size"] == min(length, 8192)
    assert found["truncation_length"] == found["truncation_length_info"] == length


@pytest.mark.parametrize("model", [
    model for model, (config, _) in PUBLISHED.items() if config["architectures"][0] in CLASSES])
def test_the_context_ends_at_the_own_length_of_published_folders(web, write, model):
    config, length = PUBLISHED[model]
    name = write(config, "gptq")
    found = web.get_model_metadata(name)
    assert found["loader"] == "ExLlamav2" and found["ctx_size"] == min(length, 8192)
    assert length_of(name) == found["truncation_length"] == length


def test_rope_scaling_of_the_config_counts(web, write):
    scaled = CONFIG | {"max_position_embeddings": 2048,
                       "rope_scaling": {"type": "linear", "factor": 2.0}}
    name = write(scaled, "exl2")
    assert length_of(name) == web.get_model_metadata(name)["ctx_size"] == 4096


def test_saved_settings_win_and_their_rope_scaling_counts(web, write):
    config = sys.modules["modules.shared"].user_config
    name = write(CONFIG | {"max_position_embeddings": 1024}, "exl2")
    try:
        config[f"{name}$"] = {"loader": "ExLlamav2_HF", "alpha_value": 2.0}
        assert web.get_model_metadata(name)["ctx_size"] == 2048
        config[f"{name}$"] |= {"ctx_size": 512}
        found = web.get_model_metadata(name)
        assert (found["ctx_size"], found["truncation_length"]) == (512, 2048)
    finally:
        del config[f"{name}$"]


def test_other_loaders_keep_what_the_web_ui_says(web, write):
    """But for the context, which Transformers has no use for and our loaders may be chosen with."""
    name = write(CONFIG | {"max_position_embeddings": 1024, "rope_scaling": {
        "type": "linear", "factor": 2.0}})
    found = web.get_model_metadata(name)
    assert (found["loader"], found["truncation_length"], found["ctx_size"]) == (
        "Transformers", 1024, 2048)


@pytest.mark.parametrize("config", [UNKNOWN, UNKNOWN | {"auto_map": {"AutoConfig": "x.X"}}, {}])
def test_folders_of_unknown_classes(web, write, config):
    """EXL2 chooses our loader, which says what is wrong; unquantised is left to Transformers."""
    quantised, dense = write(CONFIG | config, "exl2"), write(CONFIG | config)
    assert web.infer_loader(quantised, {}) == "ExLlamav2"
    assert web.infer_loader(dense, {}) == "Transformers"


def test_the_length_of_an_unknown_class_is_read_where_it_may_run_as_llama(web, write):
    name = write(CONFIG | UNKNOWN | {"max_position_embeddings": 1280}, "exl2")
    assert length_of(name) is None
    shared = sys.modules["modules.shared"]
    shared.user_config[f"{name}$"] = {"as_llama": True, "loader": "ExLlamav2"}
    try:
        assert web.get_model_metadata(name)["truncation_length"] == 1280
    finally:
        del shared.user_config[f"{name}$"]


BY_CODE_HERE = sorted(BY_CODE.keys() & ARCHITECTURES.keys())


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", *BY_CODE_HERE])
def test_unquantised_folders_that_transformers_cannot_load_choose_our_loader(
    web, write, monkeypatch, architecture
):
    own = {"model_type": "frob", "auto_map": {"AutoConfig": "configuration_frob.FrobConfig"}}
    config = config_of(architecture, 4096) | (own if architecture not in BY_CODE else {})
    name = write(config)
    assert web.infer_loader(name, {}) == "ExLlamav2"
    assert web.get_model_metadata(name)["truncation_length"] == 4096
    # With the folder's code trusted, Transformers can load it.
    args = sys.modules["modules.shared"].args
    monkeypatch.setattr(args, "trust_remote_code", True, raising=False)
    assert web.infer_loader(name, {}) == "Transformers"


def test_unquantised_folders_that_transformers_knows_stay_with_it(web, write):
    """Older folders bring code although transformers has the class by now."""
    for more in ({}, {"auto_map": {"AutoConfig": "x.X"}}):
        assert web.infer_loader(write(CONFIG | more), {}) == "Transformers"


@pytest.mark.parametrize("architecture", CLASSES)
def test_transformers_samplers_get_a_config_of_every_architecture(tmp_path, architecture):
    """`ExLlamav2_HF` is a model of transformers, which reads its sizes from one flat config."""
    from extension.webui.hf_model import text_config

    (tmp_path / "config.json").write_text(json.dumps(config_of(architecture, 4096)))
    config = text_config(str(tmp_path))
    assert config.get_text_config() is config
    assert not [key for key in config.to_dict() if key.endswith("_config")]
    assert type(config.vocab_size) is int
