"""Tensors of EXL2 and GPTQ folders of any size, and files with true headers and no data."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path

from benchmarks.cpu.llama_shapes import layer_linears

GROUP_ROWS = 128
ITEM_BYTES = {"I32": 4, "I16": 2, "F16": 2}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def exl2_linear(name: str, in_features: int, out_features: int, bits: float,
                group_rows: int = GROUP_ROWS) -> Tensors:
    """Name -> (dtype, shape) of a layer of `bits` bits a weight, which need not be whole."""
    columns = -(-out_features // 32) * 32
    groups = -(-in_features // group_rows)
    return {
        f"{name}.q_weight": ("I32", (ceil(in_features * bits / 32), columns)),
        f"{name}.q_scale": ("I32", (groups, columns // 8)),
        f"{name}.q_scale_max": ("F16", (groups,)),
        f"{name}.q_groups": ("I16", (2 * groups,)),
        f"{name}.q_invperm": ("I32", (in_features,)),
    }


def gptq_linear(name: str, in_features: int, out_features: int, group_rows: int,
                act_order: bool) -> Tensors:
    """Name -> (dtype, shape) of a layer of 4 bits."""
    groups = -(-in_features // group_rows)
    tensors: Tensors = {
        f"{name}.qweight": ("I32", (in_features // 8, out_features)),
        f"{name}.qzeros": ("I32", (groups, -(-out_features // 8))),
        f"{name}.scales": ("F16", (groups, out_features)),
    }
    return tensors | {f"{name}.g_idx": ("I32", (in_features,))} if act_order else tensors


def exl2_tensors(config: dict, bits: float, head_bits: int,
                 group_rows: int = GROUP_ROWS) -> Tensors:
    """Every tensor of a Llama in EXL2. Without `tie_word_embeddings` it has a head."""
    tensors = llama_tensors(
        config, lambda name, k, n: exl2_linear(name, k, n, bits, group_rows)
    )
    if not config["tie_word_embeddings"]:
        hidden, vocab_size = config["hidden_size"], config["vocab_size"]
        tensors |= exl2_linear("lm_head", hidden, vocab_size, head_bits, group_rows)
    return tensors


def llama_tensors(config: dict, linear: Callable[[str, int, int], Tensors]) -> Tensors:
    """Every tensor of a Llama but its head."""
    hidden = config["hidden_size"]
    tensors: Tensors = {"model.embed_tokens.weight": ("F16", (config["vocab_size"], hidden))}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = ("F16", (hidden,))
        tensors[f"{layer}.post_attention_layernorm.weight"] = ("F16", (hidden,))
        for part, k, n in layer_linears(config):
            tensors |= linear(f"{layer}.{part}", k, n)
    tensors["model.norm.weight"] = ("F16", (hidden,))
    return tensors


def tensor_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    """Return the bytes of a tensor."""
    dtype, shape = tensor
    return ITEM_BYTES[dtype] * prod(shape)


def write_header_only(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file whose data is a hole."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        nbytes = tensor_bytes(tensor)
        header[name] = {
            "dtype": tensor[0],
            "shape": list(tensor[1]),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
