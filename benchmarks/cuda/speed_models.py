"""Make the models of speed.py: random Llamas of known geometries, as EXL2 at 4 bits.

Any code is a weight, so random codes with a valid group table are a model. All layers share one
layer's tensors, so that 7 GB are written in seconds. A step reads as many bytes as with distinct
layers, because each is loaded separately.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 65536, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _geometry(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict:
    return LLAMA | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
    }  # fmt: skip


GEOMETRIES = {
    "1B": _geometry(2048, 5632, 22, 32, 4),
    "7B": _geometry(4096, 11008, 32, 32, 32),
    "13B": _geometry(5120, 13824, 40, 40, 40),
    "dry": _geometry(128, 256, 2, 4, 2) | {"vocab_size": 320},
}
BITS = 4
HEAD_BITS = 6
GROUP_ROWS = 128
# What a scale is of its group's largest, qs^2 / 256 with qs = 16, and the deviation of uniform
# codes of b bits in steps: activations stay about as large as they are.
_FULL_SCALE = 0xF


def exl2_layer(
    in_features: int, out_features: int, bits: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Make one layer's tensors, its input channels in a random order.

    Args:
        in_features: a multiple of 128. out_features: a multiple of 32.
    """
    assert in_features % GROUP_ROWS == 0 and out_features % 32 == 0
    groups = in_features // GROUP_ROWS
    rows_per_group = GROUP_ROWS * bits // 32
    deviation = 2**bits / 12**0.5
    table = [value for group in range(groups) for value in (bits, group * rows_per_group)]
    nibbles = int.from_bytes(bytes([_FULL_SCALE * 0x11] * 4), "little", signed=True)
    return {
        "q_weight": torch.randint(-(2**31), 2**31, (groups * rows_per_group, out_features),
                                  dtype=torch.int32, generator=generator),
        "q_scale": torch.full((groups, out_features // 8), nibbles, dtype=torch.int32),
        "q_scale_max": torch.full((groups,), 1 / (deviation * in_features**0.5)).half(),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_invperm": torch.randperm(in_features, generator=generator).int(),
    }


def write_model(folder: Path, config: dict, seed: int = 0) -> Path:
    """Write a model, a file a layer, unless it is complete already, and return its folder."""
    finished = folder / "config.json"
    if finished.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    ones = torch.ones(hidden, dtype=torch.float16)
    shared = {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv_size),
        "self_attn.v_proj": (hidden, kv_size), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    inputs: dict[str, torch.Tensor] = {}
    for part, (k, n) in shapes.items():
        layer = exl2_layer(k, n, BITS, generator)
        # Layers of one input have its permutation, as the quantiser leaves them.
        source = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj",
                  "mlp.up_proj": "mlp.gate_proj"}.get(part, part)
        inputs.setdefault(source, layer["q_invperm"])
        layer["q_invperm"] = inputs[source].clone()
        shared |= {f"{part}.{name}": tensor for name, tensor in layer.items()}
    for index in range(config["num_hidden_layers"]):
        tensors = {f"model.layers.{index}.{name}": t for name, t in shared.items()}
        save_file(tensors, folder / f"layer-{index:03}.safetensors")
    head = exl2_layer(hidden, config["vocab_size"], HEAD_BITS, generator)
    ends = {f"lm_head.{name}": tensor for name, tensor in head.items()}
    embedding = torch.randn(config["vocab_size"], hidden, generator=generator).half()
    ends |= {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
    save_file(ends, folder / "ends.safetensors")
    quantization = {"quant_method": "exl2", "version": "0.3.2", "bits": BITS}
    text = json.dumps(config | {"quantization_config": quantization}, indent=2)
    partial = folder / "config.partial"
    partial.write_text(text)
    partial.rename(finished)
    return folder
