"""LoRAs of the web UI's menu and API with our loaders, in the double of the web UI."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.utils.errors import (
    InsufficientMemory,
    InvalidCall,
    InvalidCheckpoint,
    ModelNotFound,
    UnsupportedFormat,
)
from extension.webui import loading, model_tab, registration
from support.lora_folders import ATTENTION, MLP, adapted_shapes, write_adapter
from support.tiny import write_tiny_model
from support.webui_double import enter_webui, forget_webui, write_webui

STATE = {"temperature": 0, "max_new_tokens": 8, "truncation_length": 512, "add_bos_token": True,
         "ban_eos_token": True, "stream": True}
PROMPT = "Hello there"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a tokenizer, and LoRAs of it: `a`, `b`, a larger one and broken ones."""
    root = tmp_path_factory.mktemp("webui-loras")
    model = write_tiny_model(root / "models" / "tiny")
    state = load_file(next(model.glob("*.safetensors")))
    shapes = adapted_shapes({name: value.shape for name, value in state.items()},
                            (*ATTENTION, *MLP))
    for seed, name in enumerate(("a", "b")):
        write_adapter(root / "loras" / name, shapes, seed=seed, rank=4)
    write_adapter(root / "loras" / "large", shapes, seed=3, rank=32)
    write_adapter(root / "loras" / "dora", shapes, use_dora=True)
    write_adapter(root / "loras" / "other", {"model.layers.9.self_attn.q_proj": (64, 64)})
    write_adapter(root / "loras" / "nan", shapes)
    path = root / "loras" / "nan" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = float("nan")
    save_file(tensors, path)
    return root


@pytest.fixture(params=["ExLlamav2", "ExLlamav2_HF"])
def web(request, tmp_path, monkeypatch, folders):
    root = write_webui(tmp_path / "webui")
    enter_webui(monkeypatch, root, "--model-dir", str(folders / "models"),
                "--lora-dir", str(folders / "loras"))
    models = importlib.import_module("modules.models")
    menu = importlib.import_module("modules.ui_model_menu")
    registration.register()
    shared = sys.modules["modules.shared"]
    shared.generation_lock = threading.Lock()
    shared.args.ctx_size = 512
    shared.model, shared.tokenizer = models.load_model("tiny", request.param)
    yield SimpleNamespace(
        menu=menu, models=models, shared=shared, loader=request.param,
        apply=importlib.import_module("modules.LoRA").add_lora_to_model,
    )
    forget_webui()


def logits():
    return loading.current().next_logits([1, 20, 30, 40])


def names():
    return [lora.name for lora in loading.current().loras]


def test_loras_are_applied_changed_and_removed(web):
    first = loading.current()
    bare = logits()
    web.apply(["a"])
    assert web.shared.lora_names == names() == ["a"]
    # The model had no room for LoRAs, so it was loaded again, with the options that it had.
    loaded = loading.current()
    assert loaded is not first and first.allocated_bytes() == 0
    assert web.shared.model.loaded is loaded and loaded.ctx_size == 512
    assert loaded.allocated_bytes() == loaded.reservation.total_bytes
    assert loaded.reservation.lora_bytes == loaded.loras[0].nbytes
    with_a = logits()
    assert not torch.equal(with_a, bare)
    # The room of one is enough for the other.
    web.apply(["b"])
    assert loading.current() is loaded and names() == ["b"]
    assert not torch.equal(logits(), with_a)
    web.apply([])
    assert loading.current() is loaded and names() == web.shared.lora_names == []
    assert torch.equal(logits(), bare)
    web.apply(["b", "a", "a", "None"])
    assert names() == web.shared.lora_names == ["b", "a"] and loading.current() is not loaded
    both = loading.current()
    web.apply(["a", "b"])
    web.apply(["a"])
    assert loading.current() is both and names() == ["a"]
    assert torch.equal(logits(), with_a)


def test_the_gauge_shows_the_room(web):
    web.apply(["a"])
    values = {"loader": web.loader, "model_menu": "tiny", "ctx_size": 512, "cache_type": "fp16",
              "gpu_split": "", "cache_8bit": False, "cache_4bit": False, "alpha_value": 1,
              "compress_pos_emb": 1}
    shown = model_tab.draw(values)
    assert f"{loading.current().reservation.total_bytes:,} bytes" in shown
    assert "exl-loras" in shown and "LoRAs" in shown
    assert "LoRAs" not in model_tab.draw(values | {"cache_type": "q4"})


@pytest.mark.parametrize(("name", "error"), [
    ("dora", UnsupportedFormat), ("other", InvalidCheckpoint), ("none", ModelNotFound),
    ("nan", InvalidCheckpoint),
])
def test_loras_that_cannot_be_used_change_nothing(web, name, error):
    web.apply(["a"])
    before, expected = loading.current(), logits()
    with pytest.raises(error):
        web.apply(["a", name])
    assert web.shared.lora_names == names() == ["a"]
    assert torch.equal(logits(), expected)
    assert web.shared.model.loaded is loading.current()
    # A fault of a value is found after the model was loaded again.
    assert loading.current() is before or name == "nan"
    said = list(web.menu.load_lora_wrapper(["a", name]))
    assert "The LoRAs were not applied" in said[-1] and "Traceback" not in said[-1]


def test_loras_that_do_not_fit_are_refused_with_numbers(web, monkeypatch):
    web.apply(["a"])
    expected, total = logits(), loading.current().reservation.total_bytes
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", f"{total + 10_000}B")
    with pytest.raises(InsufficientMemory, match=r"\d+ bytes besides the model, found \d+ bytes"):
        web.apply(["large"])
    assert names() == ["a"] and torch.equal(logits(), expected)


def test_a_running_text_keeps_its_loras(web):
    if web.loader == "ExLlamav2":
        steps = web.shared.model.generate_with_streaming(PROMPT, STATE)
        next(steps)
        for wanted in (["a"], ["a", "b"]):
            with pytest.raises(InvalidCall):
                web.apply(wanted)
        assert loading.current() is web.shared.model.loaded and names() == []
        assert list(steps)
    else:
        with web.shared.generation_lock, pytest.raises(InvalidCall):
            web.apply(["a"])
    web.apply(["a"])
    assert names() == ["a"]


def test_an_idle_reload_has_the_same_loras(web):
    web.apply(["a", "b"])
    expected = logits()
    web.shared.args.idle_timeout = 5
    web.models.unload_model(keep_model_name=True)
    assert web.shared.lora_names == [] and loading.current() is None
    web.models.load_model_if_idle_unloaded()
    assert names() == web.shared.lora_names == ["a", "b"]
    assert torch.equal(logits(), expected)
    web.models.unload_model()
    web.shared.model, web.shared.tokenizer = web.models.load_model("tiny", web.loader)
    assert names() == []


def test_a_flag_that_names_a_broken_lora_does_not_end_the_start(web, capsys):
    web.shared.generation_lock = None
    web.apply(["dora"])
    assert "no LoRA was applied" in capsys.readouterr().err and web.shared.lora_names == []
    web.apply(["a"])
    assert names() == ["a"]


def test_other_models_keep_the_web_uis_own(web):
    web.models.unload_model()
    web.shared.model = "another loader's"
    web.apply(["anything"])
    assert web.shared.lora_names == ["anything"]


def test_the_config_of_a_lora_is_read_at_each_change(web, folders, tmp_path):
    path = folders / "loras" / "a" / "adapter_config.json"
    text = path.read_text()
    web.apply(["a"])
    before = logits()
    try:
        path.write_text(json.dumps(json.loads(text) | {"lora_alpha": 32}))
        web.apply([])
        web.apply(["a"])
        assert not torch.equal(logits(), before)
    finally:
        path.write_text(text)
