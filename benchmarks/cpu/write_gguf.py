"""Write GGUF files from decoded weights; speed_models.py runs it where gguf is installed.

Reads one JSON object from standard input: `config` (Hugging Face's), `raw` (a file of float16
tensors), `index` (name -> shape, offset) and `types` (file to write -> llama.h's file type).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# Hugging Face's name within a layer -> GGUF's.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


LOG_ERROR = 4


@llama_cpp.llama_log_callback
def log_errors(level, text, _):
    if level == LOG_ERROR:
        print(text.decode(), end="", file=sys.stderr)


def gguf_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if base in MODEL_NAMES:
        return f"{MODEL_NAMES[base]}.weight"
    _, _, index, rest = base.split(".", 3)
    return f"blk.{index}.{LAYER_NAMES[rest]}.weight"


def interleave_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of a head from Hugging Face's half-split order to GGUF's pairs."""
    out_features, in_features = weight.shape
    halves = weight.reshape(heads, 2, out_features // heads // 2, in_features)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def read_tensor(job: dict, name: str) -> np.ndarray:
    entry, config = job["index"][name], job["config"]
    values = np.fromfile(
        job["raw"], np.float16, count=int(np.prod(entry["shape"])), offset=entry["offset"]
    ).reshape(entry["shape"])
    if name.endswith("q_proj.weight"):
        return interleave_rope(values, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return interleave_rope(values, config["num_key_value_heads"])
    return values.astype(np.float32) if values.ndim == 1 else values


def write_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    # Token ids are all that a benchmark needs.
    writer.add_tokenizer_model("none")


def write_float16(path: Path, job: dict) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, job["config"])
    for name, entry in job["index"].items():
        dtype = np.dtype(np.float32 if len(entry["shape"]) == 1 else np.float16)
        nbytes = int(np.prod(entry["shape"])) * dtype.itemsize
        writer.add_tensor_info(gguf_name(name), entry["shape"], dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in job["index"]:
        writer.write_tensor_data(read_tensor(job, name))
    writer.close()


def quantize(source: Path, target: Path, file_type: int) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = len(os.sched_getaffinity(0))
    partial = target.with_suffix(".partial")
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(partial).encode(), ctypes.byref(parameters)
    )
    if status:
        raise SystemExit(f"llama_model_quantize: {status}")
    partial.rename(target)


def main() -> None:
    llama_cpp.llama_log_set(log_errors, ctypes.c_void_p())
    job = json.load(sys.stdin)
    source = Path(job["raw"]).with_name("F16.gguf")
    try:
        write_float16(source, job)
        for target, file_type in job["types"].items():
            quantize(source, Path(target), file_type)
    finally:
        source.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
