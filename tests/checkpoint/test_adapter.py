"""Adapter folders: PEFT's rules of scale and rank, and one typed error for every fault."""

from __future__ import annotations

import json
import math
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.checkpoint.adapter import Adapter
from exl_loader.utils.errors import (
    ExlLoaderError,
    InvalidCheckpoint,
    InvalidConfig,
    ModelNotFound,
    UnsupportedFormat,
)
from support.lora_folders import PREFIX, write_adapter
from support.odd_values import odd_values

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
}
Q0, Q1, DOWN = SHAPES


def scales(folder):
    with Adapter.open(folder) as adapter:
        return {module.name: (module.rank, module.scale) for module in adapter.modules}


def test_scale_is_alpha_by_rank_or_by_its_root(tmp_path):
    write_adapter(tmp_path / "plain", SHAPES, rank=4, lora_alpha=6)
    assert scales(tmp_path / "plain") == dict.fromkeys(SHAPES, (4, 1.5))
    write_adapter(tmp_path / "rs", SHAPES, rank=4, lora_alpha=6, use_rslora=True)
    assert scales(tmp_path / "rs") == dict.fromkeys(SHAPES, (4, 3.0))


def test_patterns_match_the_end_of_a_name_and_the_first_one_wins(tmp_path):
    write_adapter(
        tmp_path / "a", SHAPES, rank=4, lora_alpha=8, use_rslora=True,
        rank_pattern={r"layers\.\d+\.mlp\.(up|down)_proj": 2, "q_proj": 9, Q0: 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 3, "proj": 100, r".*\.q_proj": 12},
    )
    assert scales(tmp_path / "a") == {
        Q0: (9, 12 / 3), Q1: (9, 3 / 3), DOWN: (2, 8 / math.sqrt(2)),
    }


@pytest.mark.parametrize("targets", [
    ["q_proj", "down_proj", "k_proj"], [Q0, Q1, "mlp.down_proj"], "all-linear", ["all-linear"],
    r"model\.layers\.\d+\.(mlp|self_attn)\..*_proj", r"(.*)*(.*)*x", None,
])
def test_target_modules_in_every_form(tmp_path, targets):
    write_adapter(tmp_path / "a", SHAPES, target_modules=targets)
    assert set(scales(tmp_path / "a")) == set(SHAPES)


def test_names_without_prefix_and_with_the_adapters_name(tmp_path):
    def renamed(saved):
        return {name.removeprefix(PREFIX).replace(".weight", ".default.weight"): value
                for name, value in saved.items()}

    write_adapter(tmp_path / "a", SHAPES, tensors=renamed)
    assert set(scales(tmp_path / "a")) == set(SHAPES)


def test_embeddings_and_the_copy_of_their_weight(tmp_path, caplog):
    def with_copy(saved):
        return saved | {f"{PREFIX}model.embed_tokens.base_layer.weight": torch.ones(50, 16)}

    shapes = SHAPES | {"model.embed_tokens": (50, 16)}
    write_adapter(tmp_path / "a", shapes, embeddings=["model.embed_tokens"], tensors=with_copy)
    with Adapter.open(tmp_path / "a") as adapter:
        (embedding,) = [module for module in adapter.modules if module.is_embedding]
        assert embedding.a.shape == (4, 50) and embedding.b.shape == (16, 4)
    assert "model.embed_tokens" in caplog.text and "ignored" in caplog.text


@pytest.mark.parametrize(("change", "word"), [
    ({"peft_type": "LOHA"}, "LOHA"), ({"peft_type": "IA3"}, "IA3"),
    ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "bias"), ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "bias of B"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts.gate_up"]}, "target_parameters"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa"), ({"init_lora_weights": "loftq"}, "loftq"),
    ({"use_qalora": True}, "QALoRA"), ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"alora_invocation_tokens": [5]}, "alora"),
])
def test_other_methods_are_refused_by_name(tmp_path, change, word):
    write_adapter(tmp_path / "a", SHAPES, **change)
    with pytest.raises(UnsupportedFormat) as caught:
        Adapter.open(tmp_path / "a")
    assert word in str(caught.value) and "Merge" in str(caught.value)


@pytest.mark.parametrize(("change", "error"), [
    ({"peft_type": None}, InvalidConfig), ({"peft_type": 3}, InvalidConfig),
    ({"r": 0}, InvalidConfig), ({"r": 4.0}, InvalidConfig), ({"r": None}, InvalidConfig),
    ({"r": True}, InvalidConfig), ({"lora_alpha": "16"}, InvalidConfig),
    ({"lora_alpha": 1e300}, InvalidConfig), ({"use_rslora": 1}, InvalidConfig),
    ({"target_modules": {"q_proj": 1}}, InvalidConfig), ({"target_modules": [3]}, InvalidConfig),
    ({"rank_pattern": ["q_proj"]}, InvalidConfig), ({"rank_pattern": {"q": 0}}, InvalidConfig),
    ({"rank_pattern": {"q": "8"}}, InvalidConfig), ({"alpha_pattern": {"q": []}}, InvalidConfig),
    ({"alpha_pattern": {"[q": 1}}, InvalidConfig), ({"auto_mapping": 7}, InvalidConfig),
    ({"auto_mapping": {"base_model_class": 7}}, InvalidConfig),
    ({"alpha_pattern": {"(a+)+q_proj": 1}}, UnsupportedFormat),
    ({"alpha_pattern": {"a?" * 40 + "a" * 40: 1}}, UnsupportedFormat),
    ({"alpha_pattern": {r"(.)\1": 1}}, UnsupportedFormat),
    ({"alpha_pattern": {"x" * 600: 1}}, UnsupportedFormat),
    ({"target_modules": ["k_proj"]}, InvalidCheckpoint),
    ({"rank_pattern": {"down_proj": 3}}, InvalidCheckpoint),
])
def test_settings_that_make_no_sense(tmp_path, change, error):
    write_adapter(tmp_path / "a", SHAPES)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error):
        Adapter.open(tmp_path / "a")


A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


@pytest.mark.parametrize(("change", "error", "word"), [
    (lambda s: {n: v for n, v in s.items() if n != B0}, InvalidCheckpoint, "lora_A alone"),
    (lambda s: s | {A0: torch.zeros(5, 16)}, InvalidCheckpoint, "[5, 16]"),
    (lambda s: s | {B0: torch.zeros(24, 3)}, InvalidCheckpoint, "[24, 3]"),
    (lambda s: s | {A0: torch.zeros(4, 16, 1)}, InvalidCheckpoint, "a matrix"),
    (lambda s: s | {A0: torch.zeros(4, 0)}, InvalidCheckpoint, "a matrix"),
    (lambda s: s | {A0: torch.zeros(4, 16, dtype=torch.int8)}, UnsupportedFormat, "int8"),
    (lambda s: {}, InvalidCheckpoint, "none"),
    (lambda s: s | {f"{PREFIX}lm_head.weight": torch.zeros(8, 16)}, UnsupportedFormat, "lm_head"),
    (lambda s: s | {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.zeros(24)}, UnsupportedFormat,
     "magnitude"),
    (lambda s: s | {f"{PREFIX}x.base_layer.weight": torch.zeros(8, 16)}, UnsupportedFormat, "x"),
    (lambda s: s | {A0.removeprefix(PREFIX): torch.zeros(4, 16)}, InvalidCheckpoint, "two"),
    (lambda s: s | {f"{PREFIX}{Q0}.lora_embedding_A": torch.zeros(4, 16)}, InvalidCheckpoint,
     "both"),
    (lambda s: s | {f"{'m.' * 200}q_proj.lora_A.weight": torch.zeros(4, 16)}, InvalidCheckpoint,
     "200"),
])
def test_tensors_that_do_not_fit_each_other(tmp_path, change, error, word):
    write_adapter(tmp_path / "a", SHAPES, tensors=change)
    with pytest.raises(error) as caught:
        Adapter.open(tmp_path / "a")
    assert word in str(caught.value)


def test_folders_without_an_adapter(tmp_path):
    with pytest.raises(ModelNotFound):
        Adapter.open(tmp_path / "none")
    with pytest.raises(ModelNotFound):
        Adapter.open(tmp_path)
    write_adapter(tmp_path / "a", SHAPES)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model\.safetensors"):
        Adapter.open(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedFormat, match="pickle"):
        Adapter.open(tmp_path / "a")
    weights.write_bytes(data[:-1])
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        Adapter.open(tmp_path / "a")


def test_unknown_settings_are_ignored_and_said(tmp_path, caplog):
    write_adapter(tmp_path / "a", SHAPES, some_new_setting=[1], another=None)
    Adapter.open(tmp_path / "a").close()
    assert "some_new_setting" in caplog.text and "another" not in caplog.text


def test_any_value_of_any_setting_is_read_or_refused(tmp_path):
    seed = time.time_ns()
    rng, odd = random.Random(seed), odd_values()
    write_adapter(tmp_path / "a", SHAPES)
    path = tmp_path / "a" / "adapter_config.json"
    good = json.loads(path.read_text())
    for _ in range(150):
        name = rng.choice(sorted(good))
        value = rng.choice(odd)
        try:
            path.write_text(json.dumps(good | {name: value}))
        except (TypeError, ValueError, RecursionError):
            continue
        try:
            Adapter.open(tmp_path / "a").close()
        except ExlLoaderError:
            pass
        except BaseException as error:
            raise AssertionError((seed, name, value)) from error


def test_damaged_weights_are_refused(tmp_path):
    write_adapter(tmp_path / "a", SHAPES)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {A0: tensors[A0].double()}, path)
    with pytest.raises(UnsupportedFormat, match="float64"):
        Adapter.open(tmp_path / "a")
