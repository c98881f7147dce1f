"""Models with other names: old Yi and Falcon, and the language part of models of images."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedArchitecture
from support.hf_models import expected_logits, make_model, relative_error
from support.model_builder import build_model, run_chunks

IDS = [3, 17, 200, 5, 5, 101, 44, 9, 62, 128, 7]
BOUND = 2e-5


def rename(folder, *pairs):
    """Replace parts of the names of a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(folder, hf):
    model, cache = build_model(folder, ReferenceOps())
    return relative_error(run_chunks(model, cache, IDS, 4), expected_logits(hf, IDS))


def test_yi_is_llama_with_other_names_of_its_norms(tmp_path):
    """The published `modeling_yi.py` differs from Llama's in these names and in its defaults."""
    hf = make_model("llama", 20, tmp_path)
    rename(tmp_path, ("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))
    with pytest.raises(InvalidCheckpoint, match="input_layernorm"):
        build_model(tmp_path, ReferenceOps())
    change_config(tmp_path, architectures=["YiForCausalLM"], model_type="Yi")
    assert error_of(tmp_path, hf) <= BOUND
    rename(tmp_path, ("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm"))
    assert error_of(tmp_path, hf) <= BOUND


@pytest.mark.parametrize("name", ["falcon-7b", "falcon-new"])
def test_falcon_before_it_was_in_transformers(name, tmp_path):
    """`RWForCausalLM` of 7B has one key/value head, that of 40B as many as `n_head_kv` says."""
    hf = make_model(name, 25, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {
        "architectures": ["RWForCausalLM"], "alibi": False, "parallel_attn": True,
        "n_layer": config["num_hidden_layers"], "n_head": config["num_attention_heads"],
        **{key: config[key] for key in (
            "vocab_size", "hidden_size", "layer_norm_epsilon", "bias", "ffn_hidden_size",
        )},
    }
    if name == "falcon-7b":
        old |= {"multi_query": True, "model_type": "RefinedWebModel"}
    else:
        old |= {"n_head_kv": config["num_kv_heads"], "model_type": "RefinedWeb"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert error_of(tmp_path, hf) <= BOUND


@pytest.mark.parametrize(
    "pairs",
    [[("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"),
      ("vision_tower.", "model.vision_tower."),
      ("multi_modal_projector.", "model.multi_modal_projector.")],
     [("language_model.", "")]],
    ids=["names of transformers 5", "names of a model of text"],
)
def test_the_language_part_may_have_any_of_its_prefixes(pairs, tmp_path):
    hf = make_model("llava", 21, tmp_path)
    rename(tmp_path, *pairs)
    assert error_of(tmp_path, hf) <= BOUND


def test_images_are_said_once_not_to_be_read(tmp_path, caplog):
    make_model("mistral3", 22, tmp_path)
    build_model(tmp_path, ReferenceOps())
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "without images" in text]) == 1
    assert not any("are ignored" in text for text in said)


def test_a_llava_of_llama_has_the_sizes_that_its_config_leaves_out(tmp_path):
    make_model("llava", 23, tmp_path)
    change_config(tmp_path, text_config={"model_type": "llama", "vocab_size": 331})
    with pytest.raises(InvalidCheckpoint, match=r"expected \[331, 4096\]"):
        build_model(tmp_path, ReferenceOps())


def test_an_unknown_language_part_is_refused(tmp_path):
    make_model("llava", 24, tmp_path)
    change_config(tmp_path, text_config={"model_type": "mamba"})
    with pytest.raises(UnsupportedArchitecture, match="mamba"):
        build_model(tmp_path, ReferenceOps())
