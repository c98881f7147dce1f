"""The memory of a card that models take here and in exllamav2: the tables of docs/vram.md.

    python -m benchmarks.vram            # print the tables
    python -m benchmarks.vram --write    # write them into docs/vram.md

Ours are figures of `exl_loader.plan` for folders with true headers and no weights. exllamav2's are
derived from its source at commit da07facd (December 2025), a function for each of its own; the
docstrings name them. Neither counts the CUDA context, which both have.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exl_loader
from benchmarks.cpu.llama_shapes import layer_linears
from benchmarks.sparse_models import (
    exl2_linear,
    exl2_tensors,
    tensor_bytes,
    write_header_only,
)
from exl_loader.backends.cuda.backend import ASSUMED_CONTEXT_BYTES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "vram.md"
GIB = 1 << 30

Config = dict[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": vocab,
        "max_position_embeddings": 1 << 17, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


MODELS: dict[str, Config] = {
    "7B (Llama 2)": _llama(4096, 11008, 32, 32, 32, 32000),
    "8B (Llama 3)": _llama(4096, 14336, 32, 32, 8, 128256),
    "13B (Llama 2)": _llama(5120, 13824, 40, 40, 40, 32000),
    "34B (Yi)": _llama(7168, 20480, 60, 56, 8, 64000),
    "70B (Llama 2)": _llama(8192, 28672, 80, 64, 8, 32000),
}
LLAMA_3_70B = _llama(8192, 28672, 80, 64, 8, 128256)
# Bits a weight of the decoder layers with their scales. exllamav2's converter gives the head 6.
BITS = (2.4, 3.0, 4.0, 5.0)
HEAD_BITS = 6
CONTEXTS = (8192, 16384, 32768)
CACHE_TYPES = ("fp16", "q8", "q6", "q4")


def group_rows(bits: float) -> int:
    """Return the rows of a group; exllamav2's converter takes smaller ones for few bits."""
    return 64 if bits < 4 else 128


def code_bits(bits: float) -> float:
    """Return the bits of a weight's code alone, without its share of a 4-bit scale."""
    return bits - 4 / group_rows(bits)


def write_folder(folder: Path, config: Config, bits: float) -> Path:
    """Write an EXL2 folder that can be planned, not loaded."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = exl2_tensors(config, code_bits(bits), HEAD_BITS, group_rows(bits))
    write_header_only(folder / "output.safetensors", tensors)
    return folder


def ours(folder: Path, ctx_size: int) -> dict[str, int]:
    """Return cache type -> bytes of the card, with graphs and whole pages, without the context."""
    plan = exl_loader.plan(folder, ctx_size=ctx_size, device="cuda:0", vram="1000GiB")
    overhead = plan.devices[0].overhead_bytes - ASSUMED_CONTEXT_BYTES
    return {
        name: plan.bytes_by_cache_type[name] - plan.embedding_bytes + overhead
        for name in CACHE_TYPES
    }


def largest_contexts(config: Config, bits: float, vram: str) -> dict[str, int]:
    """Return cache type -> most tokens of context on an empty card of this size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(Path(temporary) / "m", config, bits)
        return exl_loader.plan(folder, device="cuda:0", vram=vram).largest_ctx_size


# exllamav2

# config.py, ExLlamaV2Config: max_input_len, max_dq_size.
MAX_INPUT_LEN = 2048
MAX_DQ_SIZE = 512 << 20
# model.py, load_autosplit_gen: memory of the first card that a load leaves free.
RESERVE_BYTES = 192 << 20
# cache.py, ExLlamaV2Cache and ExLlamaV2Cache_Q8, _Q6, _Q4: bytes of an element of keys and values.
# Each of the last three has a float16 scale for 32 elements besides.
CACHE_BYTES = {"fp16": (2.0, 2.0), "q8": (1.0, 1.0), "q6": (1.0, 0.5), "q4": (0.5, 0.5)}


def linear_bytes(in_features: int, out_features: int, bits: float, rows: int) -> int:
    """ext.py, make_q_matrix: the file's tensors, with both permutations as int16 and a group map.

    module.py, load_weight makes q_perm of q_invperm; make_group_map has two int16 an input.
    """
    tensors = exl2_linear("", in_features, out_features, bits, rows)
    kept = {name: found for name, found in tensors.items() if not name.endswith("q_invperm")}
    return sum(map(tensor_bytes, kept.values())) + 2 * 2 * in_features + 2 * 2 * in_features


def weights_bytes(config: Config, bits: float) -> int:
    """model.py, load_autosplit_gen: every module but the embedding, which is in main memory."""
    hidden = config["hidden_size"]
    rows, codes = group_rows(bits), code_bits(bits)
    layer = sum(linear_bytes(k, n, codes, rows) for _, k, n in layer_linears(config))
    norms = 2 * hidden * (2 * config["num_hidden_layers"] + 1)
    head = linear_bytes(hidden, config["vocab_size"], HEAD_BITS, rows)
    return config["num_hidden_layers"] * layer + head + norms


def cache_bytes(config: Config, ctx_size: int, cache_type: str) -> int:
    """cache.py, create_state_tensors, and touch_device: float16 keys and values of one layer."""
    elements = ctx_size * config["num_key_value_heads"] * config["head_dim"]
    k, v = CACHE_BYTES[cache_type]
    stored = elements * (k + v)
    temporary = 0
    if cache_type != "fp16":
        stored += 2 * elements * 2 / 32
        temporary = 2 * elements * 2
    return int(config["num_hidden_layers"] * stored) + temporary


def scratch_bytes(config: Config) -> int:
    """device.py, prepare: the largest scratch_space_fixed of attn.py, mlp.py and linear.py."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    attention = MAX_INPUT_LEN * max(queries, hidden) * 2 + _dq_bytes(queries, hidden)
    mlp = MAX_INPUT_LEN * (hidden + 2 * max(hidden, inner)) * 2 + _dq_bytes(hidden, inner)
    return max(attention, mlp, _dq_bytes(hidden, config["vocab_size"]))


def _dq_bytes(in_features: int, out_features: int) -> int:
    """linear.py, temp_dq_size: a layer's weights in float16."""
    return 2 * min(in_features * out_features, MAX_DQ_SIZE)


def rope_bytes(config: Config, ctx_size: int) -> int:
    """device.py, prepare_sincos: sines and cosines of all positions in float16."""
    return 2 * 2 * ctx_size * int(config["head_dim"])


def chunk_bytes(config: Config) -> int:
    """attn.py, scratch_space: what a chunk allocates: hidden state, temp_q, temp_k, temp_v."""
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    return MAX_INPUT_LEN * 2 * (config["hidden_size"] + heads * int(config["head_dim"]))


def exllamav2(config: Config, bits: float, ctx_size: int) -> dict[str, int]:
    """Return cache type -> bytes of the card in exllamav2, its reserve left out."""
    fixed = weights_bytes(config, bits) + scratch_bytes(config) + chunk_bytes(config)
    fixed += rope_bytes(config, ctx_size)
    return {name: fixed + cache_bytes(config, ctx_size, name) for name in CACHE_TYPES}


# The document


def figures() -> Iterator[tuple[str, float, int, dict[str, int], dict[str, int]]]:
    """Yield model, bits, context, and both engines' bytes by cache type."""
    for name, config in MODELS.items():
        for bits in BITS:
            with tempfile.TemporaryDirectory() as temporary:
                folder = write_folder(Path(temporary) / "m", config, bits)
                for ctx_size in CONTEXTS:
                    yield name, bits, ctx_size, ours(folder, ctx_size), exllamav2(
                        config, bits, ctx_size)


def tables() -> str:
    """Return the tables as Markdown, in GiB, and how the cells compare."""
    lines: list[str] = []
    larger: collections.Counter[tuple[str, float]] = collections.Counter()
    last, cells, without_reserve = "", 0, 0
    for name, bits, ctx_size, own, theirs in figures():
        if name != last:
            heads = " | ".join(f"{kind}: ours | exllamav2" for kind in CACHE_TYPES)
            lines += ["", f"### {name}", "", f"| bits | context | {heads} |",
                      "|---" * (2 + 2 * len(CACHE_TYPES)) + "|"]
            last = name
        row = []
        for kind in CACHE_TYPES:
            reserved = theirs[kind] + RESERVE_BYTES
            row += [f"{own[kind] / GIB:.2f}", f"{reserved / GIB:.2f}"]
            cells += 1
            without_reserve += own[kind] < theirs[kind]
            larger[name, bits] += own[kind] >= reserved
        lines.append(f"| {bits} | {ctx_size:,} | {' | '.join(row)} |")
    summary = (
        f"Ours is smaller in {cells - larger.total()} of {cells} cells, and in {without_reserve} "
        "also without exllamav2's reserve."
    )
    for (name, bits), count in larger.items():
        if count:
            own_bytes, their_bytes = weights_of(MODELS[name], bits)
            summary += (
                f" {name} at {bits} bits is larger in {count} cells, because its weights take "
                f"{own_bytes / GIB:.2f} GiB here and {their_bytes / GIB:.2f} GiB in exllamav2."
            )
    return "\n".join([summary, *lines])


def weights_of(config: Config, bits: float) -> tuple[int, int]:
    """Return the bytes of the weights on the card, here and in exllamav2."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(Path(temporary) / "m", config, bits)
        plan = exl_loader.plan(folder, ctx_size=256, device="cuda:0", vram="1000GiB")
    return plan.weights_bytes, weights_bytes(config, bits)


def contexts() -> str:
    """Return the largest contexts on a card of 24 GiB as Markdown."""
    lines = ["| model, 2.4 bits | " + " | ".join(CACHE_TYPES) + " |",
             "|---" * (1 + len(CACHE_TYPES)) + "|"]
    for name, config in (("Llama 2 70B", MODELS["70B (Llama 2)"]), ("Llama 3 70B", LLAMA_3_70B)):
        found = largest_contexts(config, 2.4, "24GiB")
        cells = (f"{found[kind]:,}" if found[kind] else "none" for kind in CACHE_TYPES)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the document with new tables between its marks."""
    for name, table in (("tables", tables()), ("contexts", contexts())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, _, rest = text.partition(start)
        text = f"{head}{start}\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Print the tables or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables into docs/vram.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text()))
    else:
        print(tables(), contexts(), sep="\n\n")


if __name__ == "__main__":
    main()
