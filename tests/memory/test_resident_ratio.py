"""Resident weights of real geometries against their files, both without the embedding.

The table of docs/reservation.md has these ratios. `python tests/memory/test_resident_ratio.py`
writes it again.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[1:3]]

from benchmarks.sparse_models import (
    Tensors,
    exl2_linear,
    gptq_linear,
    llama_tensors,
    tensor_bytes,
    write_header_only,
)
from exl_loader.memory.reservation import plan
from support import REPO
from support.sparse import LLAMA_2_7B
from support.tiny import CONFIG

DOCUMENT = REPO / "docs" / "reservation.md"


def geometry(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int,
             vocab_size: int, tied: bool) -> dict:
    return {
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }  # fmt: skip


MODELS = {
    "Llama 3 8B": geometry(4096, 14336, 32, 32, 8, 128, 128256, False),
    "Llama 2 7B": LLAMA_2_7B | {"tie_word_embeddings": False},
    "Qwen2.5 0.5B": geometry(896, 4864, 24, 14, 2, 64, 151936, True),
    "SmolLM2 135M": geometry(576, 1536, 30, 9, 3, 64, 49152, True),
}
# Bits a weight and rows of a group of EXL2 folders; rows of a group and act-order of GPTQ's.
EXL2 = [(2.4, 32), (2.4, 128), (3.0, 64), (4.0, 32), (4.0, 128), (5.0, 128)]
GPTQ = [(128, False), (128, True), (32, False), (32, True)]
DEVICES = ("cpu", "cuda:0")


def exl2_folder(config: dict, bits: float, rows: int) -> Tensors:
    """Every tensor of a folder. The quantiser gives tied models a head of 6 bits as well."""
    head = exl2_linear("lm_head", config["hidden_size"], config["vocab_size"], 6, rows)
    return llama_tensors(config, lambda name, k, n: exl2_linear(name, k, n, bits, rows)) | head


def gptq_folder(config: dict, rows: int, act_order: bool) -> Tensors:
    """Every tensor of a folder. A head is not quantised, and a tied one is the embedding."""
    tensors = llama_tensors(config, lambda name, k, n: gptq_linear(name, k, n, rows, act_order))
    if not config["tie_word_embeddings"]:
        shape = (config["vocab_size"], config["hidden_size"])
        tensors["lm_head.weight"] = ("F16", shape)
    return tensors


def ratio(folder: Path, tensors: Tensors, config: dict, device: str) -> float:
    """Return resident bytes, aligned, by bytes of the file, both without the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_header_only(folder / "model.safetensors", tensors)
    found = plan(folder, ctx_size=256, cache_type="q4", device=device, vram="1000GiB")
    resident = sum(one.weights_bytes for one in found.devices)
    embedding = tensor_bytes(tensors["model.embed_tokens.weight"])
    # A card leaves the embedding in main memory, unless it is the head as well.
    has_embedding = not any(one.embedding_bytes for one in found.devices)
    kept = sum(tensor_bytes(t) for name, t in tensors.items() if "embed_tokens" not in name)
    return (resident - embedding * has_embedding) / kept


def ratios(root: Path, name: str, device: str) -> dict[str, float]:
    """Return the ratio of every folder of a model."""
    config, found = MODELS[name], {}
    for bits, rows in EXL2:
        found[f"EXL2, {bits} bits, groups of {rows}"] = ratio(
            root / "exl2", exl2_folder(config, bits, rows), config, device
        )
    for rows, act_order in GPTQ:
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": rows,
                        "desc_act": act_order, "sym": True}
        found[f"GPTQ, 4 bits, groups of {rows}{', act-order' if act_order else ''}"] = ratio(
            root / "gptq", gptq_folder(config, rows, act_order),
            config | {"quantization_config": quantization}, device,
        )
    return found


def table(root: Path) -> str:
    """Return the document's table: of each folder the larger ratio of both kinds of device."""
    columns = {
        name: [ratios(root / name / device, name, device) for device in DEVICES]
        for name in MODELS
    }
    lines = [f"| | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|"]
    for folder in columns["Llama 3 8B"][0]:
        cells = (f"{max(one[folder] for one in column):.4f}" for column in columns.values())
        lines.append(f"| {folder} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_resident_weights_are_no_larger_than_the_file(tmp_path):
    found = table(tmp_path)
    assert found in DOCUMENT.read_text()
    for line in found.splitlines()[2:]:
        cells = map(float, line.strip("| ").split(" | ")[1:])
        for config, cell in zip(MODELS.values(), cells, strict=True):
            assert 0.98 < cell <= (1.01 if config["hidden_size"] >= 1024 else 1.02), line


def rewrite() -> None:
    """Write the current table into the document."""
    with tempfile.TemporaryDirectory() as temporary:
        new = table(Path(temporary))
    head = re.escape(new.splitlines()[0])
    text = re.sub(rf"{head}\n(\|.*\n)*", lambda _: new + "\n", DOCUMENT.read_text())
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    rewrite()
