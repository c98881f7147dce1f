"""The models of the golden record, and the folder in which its cases find them.

Models are small and random, written from fixed seeds; besides them the demo model and, where the
machine has them, the reference models.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exl_loader
from support.makers import (
    make_exl2_layer,
    make_gptq_layer,
    quantization_config,
    write_folder,
)
from support.sparse import LLAMA_2_7B, write_sparse_exl2
from support.tiny import CONFIG, tensor_shapes, write_tokenizer

DEMO = Path(exl_loader.__file__).parent / "demo_model"
SHARED_FIXTURES = DEMO.parents[2] / "shared" / "fixtures"
FIXTURES = ("llama-low", "llama-mid")
CARD = "cuda:0"
EMULATED_DEVICES = {"emulated": CARD, "two-cards": f"{CARD},cuda:1", "cpu-card": f"cpu,{CARD}"}
GIB = 1 << 30


class NotHere(Exception):
    """A case needs files that this machine does not have."""


class Bench:
    """Where cases find their models: each is written when first asked for.

    Args:
        folder: for files; empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, name: str) -> Path:
        """Return the folder of one of `MODELS`, of the demo model, or of a reference model.

        Raises:
            NotHere: the reference models are not on this machine.
        """
        if name == "demo":
            return DEMO
        if name in FIXTURES:
            named = os.environ.get("EXL_LOADER_FIXTURES")
            folder = (Path(named) if named else SHARED_FIXTURES) / name
            if not folder.is_dir():
                raise NotHere(f"no reference models at {folder.parent}; set EXL_LOADER_FIXTURES")
            return folder
        folder = self.folder / name
        if not folder.exists():
            MODELS[name](folder)
        return folder

    @contextlib.contextmanager
    def backend(self, name: str) -> Iterator[str]:
        """Compute on a backend; yields the names of its devices.

        Args:
            name: `cpu`, `reference`, `emulated` (a card), `two-cards` or `cpu-card`.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("EXL_LOADER_REFERENCE", raising=False)
            if name == "reference":
                patch.setenv("EXL_LOADER_REFERENCE", "1")
            if name in EMULATED_DEVICES:
                from support.emulated_cuda import EmulatedCards

                EmulatedCards(2).install(patch)
            yield EMULATED_DEVICES.get(name, "cpu")


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"type": "longrope", "short_factor": [1.0 + i / 160 for i in range(16)],
                 "long_factor": [1.0 + i / 4 for i in range(16)]},
}

# Hidden sizes are no multiples of 128 on purpose.
SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}

# Architecture -> its part of the config.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},
    "Mixtral": {"sliding_window": None, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True,
              "sliding_window": 24, "max_window_layers": 1},
    "Qwen3": {"head_dim": 64, "num_attention_heads": 2},
    "Gemma2": {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 24, "sliding_window": 24,
               "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    "Phi3": {"sliding_window": None},
}

# Format -> per architecture, changes of the config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "exl2": {"Llama": {}, "Qwen2": {"rope_scaling": ROPE["yarn"]}},
    "gptq": {"Llama": {"rope_scaling": ROPE["linear"]},
             "Mistral": {"rope_scaling": ROPE["dynamic"], "max_position_embeddings": 32}},
    "dense": {"Llama": {"rope_scaling": ROPE["llama3"], "attention_bias": True,
                        "mlp_bias": True},
              "Mistral": {"torch_dtype": "float32"},
              "Qwen3": {"torch_dtype": "bfloat16"},
              "Phi3": {"rope_scaling": ROPE["longrope"], "max_position_embeddings": 512,
                       "original_max_position_embeddings": 32}},
}

# GPTQ layouts, spread over the architectures.
GPTQ = {
    "Llama": {"bits": 4, "group_size": 32},
    "Mistral": {"bits": 3, "group_size": 32, "act_order": True},
    "Mixtral": {"bits": 4, "group_size": 32},
    "Qwen2": {"bits": 8, "group_size": 32, "v2": True},
    "Qwen3": {"bits": 2, "group_size": 16},
    "Gemma2": {"bits": 4, "group_size": -1},
    "Phi3": {"bits": 4, "group_size": 32, "act_order": True},
}


def write_model(folder: Path, architecture: str, kind: str, seed: int) -> None:
    """Write a random model of an architecture, `kind` being exl2, gptq or dense."""
    config = CONFIG | SIZES | ARCHITECTURES[architecture]
    config |= VARIANTS[kind].get(architecture, {})
    config |= {"architectures": [f"{architecture}ForCausalLM"],
               "model_type": architecture.lower()}
    rng = np.random.default_rng(seed)
    dtype = getattr(torch, config["torch_dtype"])
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(architecture, config).items():
        layer = name.removesuffix(".weight")
        quantised = "_proj" in name or ".experts." in name or (
            kind == "exl2" and layer == "lm_head")
        has_bias = _has_bias(architecture, config, layer)
        if quantised and kind != "dense":
            if kind == "exl2":
                stored, _ = make_exl2_layer(rng, shape[1], shape[0], bias=has_bias)
            else:
                stored, _ = make_gptq_layer(
                    rng, shape[1], shape[0], bias=has_bias, **GPTQ[architecture])
            tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
            continue
        is_norm = len(shape) == 1
        values = rng.normal(size=shape) * (0.2 if is_norm else shape[-1] ** -0.5)
        if is_norm and architecture != "Gemma2":
            values += 1
        tensors[name] = torch.from_numpy(values).to(dtype)
        if has_bias:
            tensors[f"{layer}.bias"] = torch.from_numpy(rng.normal(size=shape[0])).to(dtype)
    if kind == "gptq":
        options = GPTQ[architecture]
        config["quantization_config"] = quantization_config(
            "gptq", bits=options["bits"], group_size=options["group_size"],
            desc_act=options.get("act_order", False),
            checkpoint_format="gptq_v2" if options.get("v2") else "gptq",
        )
    elif kind == "exl2":
        config["quantization_config"] = quantization_config("exl2")
    write_folder(folder, tensors, config, shards=2 if kind == "dense" else 1)
    write_tokenizer(folder, config["vocab_size"])


def _shapes(architecture: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of an architecture, biases left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for name, shape in tensor_shapes(config).items():
        layer, _, last = name.rpartition(".mlp.")
        prefix, _, projection = name.rpartition(".self_attn.")
        if architecture == "Mixtral" and layer:
            block = f"{layer}.block_sparse_moe"
            shapes.setdefault(f"{block}.gate.weight", (config["num_local_experts"], hidden))
            part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[last.split(".")[0]]
            for expert in range(config["num_local_experts"]):
                shapes[f"{block}.experts.{expert}.{part}.weight"] = shape
        elif architecture == "Phi3" and layer and "down_proj" not in name:
            shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        elif architecture == "Phi3" and prefix and "o_proj" not in name:
            heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (heads * config["head_dim"], hidden)
        else:
            shapes[name] = shape
        if architecture == "Qwen3" and projection in ("q_proj.weight", "k_proj.weight"):
            shapes[f"{prefix}.self_attn.{projection[0]}_norm.weight"] = (config["head_dim"],)
        if architecture == "Gemma2" and name.endswith("post_attention_layernorm.weight"):
            stem = name.removesuffix("post_attention_layernorm.weight")
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                shapes[f"{stem}{norm}.weight"] = shape
    return shapes


def _has_bias(architecture: str, config: dict[str, Any], layer: str) -> bool:
    if architecture == "Qwen2":
        return layer.endswith(("q_proj", "k_proj", "v_proj"))
    if ".self_attn." in layer and layer.endswith("_proj"):
        return bool(config.get("attention_bias"))
    return ".mlp." in layer and bool(config.get("mlp_bias"))


def _model_name(architecture: str, kind: str) -> str:
    return f"{architecture.lower()}-{kind}"


MODELS: dict[str, Callable[[Path], Any]] = {
    _model_name(architecture, kind): partial(
        write_model, architecture=architecture, kind=kind, seed=100 * i + j)
    for i, architecture in enumerate(ARCHITECTURES)
    for j, kind in enumerate(VARIANTS)
}
RANDOM_MODELS = tuple(MODELS)
# Headers alone: it can be planned, not loaded.
MODELS["llama-2-7b"] = partial(write_sparse_exl2, **LLAMA_2_7B)
