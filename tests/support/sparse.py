"""EXL2 folders of any size with true headers and no data: what planning reads."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sparse_models import exl2_tensors, write_header_only
from support.tiny import CONFIG

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
