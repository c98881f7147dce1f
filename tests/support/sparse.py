"""EXL2 folders of any size with true headers and no data: what planning reads, in no space."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from benchmarks.cpu.llama_shapes import layer_linears
from support.tiny import CONFIG

GROUP_ROWS = 128
ITEM_BYTES = {"I32": 4, "I16": 2, "F16": 2}

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def exl2_linear(name: str, in_features: int, out_features: int, bits: int) -> Tensors:
    """Name -> (dtype, shape) of a layer whose groups all have the same bits."""
    columns = -(-out_features // 32) * 32
    groups = -(-in_features // GROUP_ROWS)
    return {
        f"{name}.q_weight": ("I32", (-(-in_features * bits // 32), columns)),
        f"{name}.q_scale": ("I32", (groups, columns // 8)),
        f"{name}.q_scale_max": ("F16", (groups,)),
        f"{name}.q_groups": ("I16", (2 * groups,)),
        f"{name}.q_invperm": ("I32", (in_features,)),
    }


def exl2_tensors(config: dict, bits: int, head_bits: int) -> Tensors:
    """Every tensor of a Llama in EXL2."""
    hidden = config["hidden_size"]
    tensors: Tensors = {"model.embed_tokens.weight": ("F16", (config["vocab_size"], hidden))}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = ("F16", (hidden,))
        tensors[f"{layer}.post_attention_layernorm.weight"] = ("F16", (hidden,))
        for part, k, n in layer_linears(config):
            tensors |= exl2_linear(f"{layer}.{part}", k, n, bits)
    tensors["model.norm.weight"] = ("F16", (hidden,))
    if not config["tie_word_embeddings"]:
        tensors |= exl2_linear("lm_head", hidden, config["vocab_size"], head_bits)
    return tensors


def write_header_only(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file whose data is a hole."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = ITEM_BYTES[dtype]
        for size in shape:
            nbytes *= size
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def write_sparse_exl2(
    folder: Path, *, bits: int = 4, head_bits: int = 6, shards: int = 1, **config
) -> Path:
    """Write a folder that can be planned, not loaded."""
    folder.mkdir(parents=True)
    config = CONFIG | config
    (folder / "config.json").write_text(json.dumps(config))
    tensors = exl2_tensors(config, bits, head_bits)
    names = list(tensors)
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        write_header_only(folder / f"output-{i + 1:05d}-of-{shards:05d}.safetensors", part)
    return folder
