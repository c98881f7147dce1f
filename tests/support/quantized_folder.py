"""Quantised folders of any architecture, made from the unquantised ones that transformers saves.

The writer knows nothing of the engine's table of architectures: names, fused tensors and their
orders below are those of the model's own files and of the folders that exllamav2 writes.

    twin = quantize_folder(source, target, "exl2", seed)

`target` has random codes, `twin` the weights that they encode, under the names of `source`, so that
transformers computes the logits to expect from `target`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from exl_loader.utils.integers import round_up
from support.hf_models import COMMON, MODELS, load_model, make_model
from support.makers import (
    Tensors,
    make_exl2_layer,
    make_gptq_layer,
    quantization_config,
    write_folder,
)

# Sizes that are inputs of a linear layer somewhere.
SIZES = ("hidden_size", "intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")

HEAD = re.compile(r"(language_model\.)?(lm_head|output|embed_out)")
# Matrices that are no linear layers: tables of tokens and positions, norms with a weight a head.
TABLES = re.compile(
    r"(embed_tokens|embed_positions|tok_embeddings|embed_in|word_embeddings|w[tp]e|\w*norm)$"
)
# DBRX's tensors of all experts. GPTQ folders are written with them as they are.
EXPERTS = re.compile(r"(.*\.ffn\.experts\.mlp)\.(w1|v1|w2)")
# Layers that stay as they are: routers and what weighs a shared expert, and what reads images.
KEPT = re.compile(
    r"\.(gate|router|router\.layer|shared_expert_gate)$"
    r"|(^|\.)(visual|vision_tower|multi_modal_projector)\."
)
# Tensors of all experts of GPT-OSS. GPTQModel cuts them by expert; the engine's own converter
# writes EXL2 layers of gate, up and down.
ALTERNATING = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
# Fused tensor -> the layers in it. They are quantised apart in EXL2 folders.
QKV = ("q_proj", "k_proj", "v_proj")
FUSED = {
    **dict.fromkeys(("qkv_proj", "c_attn", "Wqkv", "wqkv", "query_key_value"), QKV),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Fused tensors whose rows are [key/value heads, (queries, key, value), head_dim].
BY_GROUP = ("wqkv", "query_key_value")
# Model type -> how exllamav2 renames its tensors: pattern and replacement, one after the other.
GPT2_NAMES = (
    (r"^transformer\.", ""), (r"^h\.", "model.layers."), (r"^ln_f\.", "model.norm."),
    (r"^wte\.", "model.embed_tokens."), (r"^wpe\.", "model.wpe."),
    (r"\.attn\.c_proj\.", ".self_attn.o_proj."), (r"\.attn\.", ".self_attn."),
)  # fmt: skip
EXL2_NAMES = {
    "dbrx": (
        (r"^transformer\.", "model."), (r"\.blocks\.", ".layers."),
        (r"\.ffn\.experts\.mlp\.", ".block_sparse_moe.experts."),
        (r"\.ffn\.router\.layer\.", ".block_sparse_moe.gate."),
        (r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
        (r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
        (r"\.norm_attn_norm\.attn\.", ".self_attn."), (r"\.out_proj\.", ".o_proj."),
        (r"\.norm_f\.", ".norm."), (r"\.wte\.", ".embed_tokens."),
    ),
    "gpt2": GPT2_NAMES,
    "gpt_bigcode": GPT2_NAMES,
    "internlm2": (
        (r"^output\.", "lm_head."), (r"^model\.tok_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.", ".self_attn."), (r"\.wo\.", ".o_proj."),
    ),
}  # fmt: skip


def make_quantized_model(name: str, format: str, seed: int, folder: Path) -> Any:
    """Write a random model of `hf_models.MODELS` in a format to `folder`/m.

    Its sizes are rounded up to multiples of 32, which quantised layers need.

    Args:
        name: of the model.
        format, seed: as those of `quantize_folder`.
        folder: an empty one.

    Returns:
        the model with the decoded weights, in transformers or by our definition.
    """
    sizes = {key: value for key, value in (COMMON | MODELS[name][1]).items() if key in SIZES}
    whole = {key: round_up(value, 32) for key, value in sizes.items()}
    make_model(name, seed, folder / "source", **whole)
    return load_model(quantize_folder(folder / "source", folder / "m", format, seed))


def quantize_folder(source: Path, target: Path, format: str, seed: int) -> Path:
    """Write a quantised folder with the names and sizes of an unquantised one.

    Args:
        source: a folder that transformers saved; in_features are multiples of 32.
        target: where to write.
        format: `gptq`: a fused tensor stays one, and the head as it is. `exl2`: exllamav2's names,
            a fused tensor in its parts, and a head of its own, also where it is tied.
        seed: of the codes.

    Returns:
        the folder beside `target` with the weights that it encodes, for transformers.
    """
    config = json.loads((source / "config.json").read_text())
    stored = {
        name: tensor.half()
        for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    writer = _Writer(config, format, seed)
    if format == "exl2" and not any(HEAD.fullmatch(_layer(name)) for name in stored):
        (table,) = (name for name in stored if re.search(r"(embed(?!_pos)\w*|wte)\.weight$", name))
        prefix = "language_model." if table.startswith("language_model.") else ""
        stored[f"{prefix}lm_head.weight"] = stored[table]
    quantised, decoded = writer.write(stored)
    names = {name: _exl2_name(name, config) if format == "exl2" else name for name in quantised}
    assert len(set(names.values())) == len(names)
    settings = quantization_config(format, **writer.settings)
    write_folder(
        target, {names[name]: tensor for name, tensor in quantised.items()},
        config | {"quantization_config": settings},
        file="output.safetensors" if format == "exl2" else "model.safetensors",
    )
    # A quantised head is Index's own head already, divided by the length of its rows.
    untied = {"tie_word_embeddings": False, "norm_head": 0} if format == "exl2" else {}
    if "text_config" in config:
        untied = untied and untied | {"text_config": config["text_config"] | untied}
    twin = target.with_name(f"{target.name}-decoded")
    return write_folder(twin, decoded, config | untied | {"dtype": "float32"})


class _Writer:
    """Replaces the linear layers of a model with random ones.

    Attributes:
        settings: of the `quantization_config`.
    """

    def __init__(self, config: dict, format: str, seed: int) -> None:
        self._model_type, self._config, self._format = config["model_type"], _text(config), format
        self._rng = np.random.default_rng(seed)
        self.settings: dict = {}
        if format == "gptq":
            self.settings = {
                "bits": int(self._rng.choice([4, 8])),
                "group_size": int(self._rng.choice([32, 64])),
                "desc_act": bool(self._rng.integers(2)),
            }

    def write(self, stored: Tensors) -> tuple[Tensors, Tensors]:
        """Return the tensors of the quantised folder and of its unquantised twin."""
        quantised: Tensors = {}
        decoded: Tensors = dict(stored)
        done = set()
        for name in sorted(stored):
            if ALTERNATING.search(name):
                done |= {name, f"{name}_bias"}
                quantised |= self._alternating_experts(
                    name, stored[f"{name}_bias"], decoded
                )
                continue
            layer = _layer(name)
            experts = EXPERTS.fullmatch(name)
            if experts is not None and self._format == "exl2":
                done.add(name)
                parts, decoded[name] = self._experts(*experts.groups(), stored[name])
                quantised |= parts
                continue
            if name == layer or not self._is_quantised(layer, stored[name]):
                continue
            done |= {name, f"{layer}.bias"}
            transposed = self._is_transposed(layer)
            shape = stored[name].shape[::-1] if transposed else stored[name].shape
            bias = stored.get(f"{layer}.bias")
            weight = torch.empty(shape)
            for part, rows in self._parts(layer, shape[0]):
                tensors, value = self._random(shape[1], len(rows))
                weight[rows] = value.t()
                quantised |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
                if bias is not None:
                    quantised[f"{part}.bias"] = bias[rows].contiguous()
            decoded[name] = weight.t() if transposed else weight
        quantised |= {name: tensor for name, tensor in stored.items() if name not in done}
        return quantised, decoded

    def _experts(
        self, prefix: str, name: str, stored: torch.Tensor
    ) -> tuple[Tensors, torch.Tensor]:
        """Return the experts' layers apart, and the tensor that has all of their weights."""
        parts: Tensors = {}
        weights = []
        count = self._config["ffn_config"]["moe_num_experts"]
        for expert, old in enumerate(stored.chunk(count)):
            # w2 is [in, out], the others are [out, in].
            sizes = old.shape if name == "w2" else old.shape[::-1]
            tensors, value = self._random(*sizes)
            weights.append(value if name == "w2" else value.t())
            parts |= {f"{prefix}.{expert}.{name}.{key}": value for key, value in tensors.items()}
        return parts, torch.cat(weights)

    def _alternating_experts(self, name: str, biases: torch.Tensor, decoded: Tensors) -> Tensors:
        """Quantise GPT-OSS's experts of a tensor [experts, in, out] and return their layers."""
        layers: Tensors = {}
        prefix, _, last = name.rpartition(".")
        weights = decoded[name] = torch.empty(decoded[name].shape)
        rows = torch.arange(weights.shape[2])
        for expert, bias in enumerate(biases):
            if self._format == "gptq":
                parts = {f"{prefix}.{last.removesuffix('_proj')}.{expert}": rows}
            elif last == "down_proj":
                parts = {f"{prefix}.{expert}.down_proj": rows}
            else:
                names = (f"{prefix}.{expert}.gate_proj", f"{prefix}.{expert}.up_proj")
                parts = dict(zip(names, (rows[::2], rows[1::2]), strict=True))
            for part, part_rows in parts.items():
                tensors, value = self._random(weights.shape[1], len(part_rows))
                weights[expert][:, part_rows] = value
                layers |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
                layers[f"{part}.bias"] = bias[part_rows].contiguous()
        return layers

    def _is_quantised(self, layer: str, weight: torch.Tensor) -> bool:
        if weight.dim() != 2 or TABLES.search(layer) or KEPT.search(layer):
            return False
        return not HEAD.fullmatch(layer) or self._format == "exl2"

    def _is_transposed(self, layer: str) -> bool:
        """Tell whether the weight is [in, out], as in GPT-2's Conv1D."""
        return self._model_type == "gpt2" and not HEAD.fullmatch(layer)

    def _random(self, in_features: int, out_features: int) -> tuple[Tensors, torch.Tensor]:
        assert in_features % 32 == 0
        if self._format == "exl2":
            return make_exl2_layer(self._rng, in_features, out_features)
        return make_gptq_layer(
            self._rng, in_features, out_features, bits=self.settings["bits"],
            group_size=self.settings["group_size"], act_order=self.settings["desc_act"],
        )

    def _parts(self, layer: str, out_features: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and output rows of every layer that is quantised apart."""
        rows = torch.arange(out_features)
        prefix, _, last = layer.rpartition(".")
        if self._format == "gptq" or last not in FUSED:
            yield layer, rows
            return
        parts = rows.chunk(2) if last == "gate_up_proj" else self._qkv(last, rows)
        for part, part_rows in zip(FUSED[last], parts, strict=True):
            yield f"{prefix}.{part}", part_rows

    def _qkv(self, name: str, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of queries, keys and values."""
        config = self._config
        heads = config.get("num_attention_heads") or config.get("n_head") or config["n_heads"]
        hidden = config.get("hidden_size") or config.get("n_embd") or config["d_model"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = (len(rows) // head_dim - heads) // 2
        by_group = name in BY_GROUP or config.get("multi_query") is False
        groups = kv_heads if by_group else 1
        sizes = [heads // groups, kv_heads // groups, kv_heads // groups]
        split = rows.view(groups, -1, head_dim).split(sizes, dim=1)
        return [part.flatten() for part in split]


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _text(config: dict) -> dict:
    """Return the config of the language part."""
    return config.get("text_config", config)


def _exl2_name(name: str, config: dict) -> str:
    for pattern, replacement in EXL2_NAMES.get(config["model_type"], ()):
        name = re.sub(pattern, replacement, name)
    return name
