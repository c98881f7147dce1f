"""Make the model of speed.py: a random Llama as EXL2 and, with the same weights, as GGUF.

The EXL2 file has random codes and valid group tables. Any code is a weight, so the decoded
weights *are* the model, and llama.cpp's own quantiser makes the GGUF files from them. Norms are
ones, and scales keep activations as large as they are in trained models.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import REPO
from benchmarks.cpu.llama_shapes import layer_linears
from exl_loader.cache.layout import CacheType
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.formats import read_linear
from exl_loader.model.assembly import ModelParts
from exl_loader.model.builder import build_parts

# The 1.1 B geometry that many small models share.
GEOMETRY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUP_ROWS = 128
# Share of a layer's groups at each width, the widest first: mixtures as EXL2's converter chooses
# them, together 4.5 bits a weight on disk, head included.
MIXTURES = {
    "q_proj": ((5, 0.125), (4, 0.875)),
    "k_proj": ((5, 0.125), (4, 0.875)),
    "v_proj": ((6, 0.125), (5, 0.875)),
    "o_proj": ((5, 0.125), (4, 0.875)),
    "gate_proj": ((5, 0.25), (4, 0.75)),
    "up_proj": ((5, 0.5), (4, 0.5)),
    "down_proj": ((8, 0.05), (6, 0.1), (5, 0.25), (4, 0.6)),
    "lm_head": ((6, 1.0),),
}
# The deviation of a weight in steps of its scale, by which scales are divided so that activations
# keep their size: uniform 4-bit codes deviate by 4.6 steps, and a scale code, the square of 1 to
# 16, is about 123 of 256.
STEP_DEVIATION = 4.6 * 123 / 256
# The GGUF types to compare with, by llama.h's numbers.
GGUF_TYPES = {"Q4_0": 2, "Q4_K_M": 15}


def group_bits(part: str, num_groups: int) -> list[int]:
    """Return the bits of a layer's groups, the widest first."""
    bits: list[int] = []
    done = 0.0
    for width, share in MIXTURES[part]:
        done += share
        bits += [width] * (round(done * num_groups) - len(bits))
    return bits


def exl2_layer(
    name: str, in_features: int, out_features: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Make one layer's tensors, its input channels in a random order.

    Args:
        in_features: a multiple of 128. out_features: a multiple of 32.
    """
    assert in_features % GROUP_ROWS == 0 and out_features % 32 == 0, name
    bits = group_bits(name.rsplit(".", 1)[-1], in_features // GROUP_ROWS)
    rows, starts = 0, []
    for width in bits:
        starts.append(rows)
        rows += GROUP_ROWS * width // 32
    table = [value for pair in zip(bits, starts, strict=True) for value in pair]
    largest = [16 * 2.0**-width / (STEP_DEVIATION * in_features**0.5) for width in bits]

    def random_codes(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    return {
        f"{name}.q_weight": random_codes(rows, out_features),
        f"{name}.q_scale": random_codes(len(bits), out_features // 8),
        f"{name}.q_scale_max": torch.tensor(largest, dtype=torch.float16),
        f"{name}.q_groups": torch.tensor(table, dtype=torch.int16),
        f"{name}.q_invperm": torch.randperm(in_features, generator=generator).int(),
    }


def exl2_tensors(config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Make every tensor of the model."""
    hidden = config["hidden_size"]
    ones = torch.ones(hidden, dtype=torch.float16)
    embedding = torch.randn(config["vocab_size"], hidden, generator=generator)
    tensors = {"model.embed_tokens.weight": embedding.half(), "model.norm.weight": ones.clone()}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = ones.clone()
        tensors[f"{layer}.post_attention_layernorm.weight"] = ones.clone()
        for part, k, n in layer_linears(config):
            tensors |= exl2_layer(f"{layer}.{part}", k, n, generator)
    return tensors | exl2_layer("lm_head", hidden, config["vocab_size"], generator)


def write_exl2(folder: Path, config: dict | None = None, seed: int = 0) -> Path:
    """Write the model as EXL2 unless the folder has it already, and return the folder."""
    config = config or GEOMETRY
    weights = folder / "output.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = exl2_tensors(config, torch.Generator().manual_seed(seed))
        partial = weights.with_suffix(".partial")
        save_file(tensors, partial)
        bits = bits_per_weight(tensors)
        quantization = {"quant_method": "exl2", "version": "0.2.0", "bits": round(bits, 2)}
        text = json.dumps(config | {"quantization_config": quantization}, indent=2)
        (folder / "config.json").write_text(text)
        partial.rename(weights)
    return folder


def bits_per_weight(tensors: dict[str, torch.Tensor]) -> float:
    """Return the bits a weight on disk of all linear layers, scales and tables included."""
    nbytes = weights = 0
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind.startswith("q_"):
            nbytes += tensor.nbytes
        if kind == "q_weight":
            weights += len(tensors[f"{layer}.q_invperm"]) * tensor.shape[1]
    return 8 * nbytes / weights


def decoded_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Decode every tensor of an EXL2 folder: Hugging Face's names, [out, in], float16."""
    config = ModelConfig.from_dir(folder)
    checkpoint = Checkpoint.open(folder)
    try:
        for name, header in checkpoint.headers.items():
            if header.dtype == "float16" and not name.endswith("q_scale_max"):
                yield name, checkpoint.read(name)
        for linear in build_parts(config, checkpoint).linears():
            weight = read_linear(linear.spec, checkpoint).weight()
            yield f"{linear.name}.weight", weight.T.contiguous().half()
    finally:
        checkpoint.close()


def write_gguf(folder: Path, exl2_dir: Path, llama_python: str) -> dict[str, Path]:
    """Write the decoded weights as GGUF, once a type, and return the files.

    Args:
        folder: where to.
        exl2_dir: the EXL2 model.
        llama_python: an interpreter that has llama-cpp-python and gguf.

    Raises:
        subprocess.CalledProcessError: that interpreter failed; its message is on stderr.
    """
    files = {name: folder / f"{name}.gguf" for name in GGUF_TYPES}
    missing = {name: path for name, path in files.items() if not path.exists()}
    if not missing:
        return files
    folder.mkdir(parents=True, exist_ok=True)
    raw, index = folder / "decoded.bin", {}
    with open(raw, "wb") as file:
        for name, tensor in decoded_tensors(exl2_dir):
            index[name] = {"shape": list(tensor.shape), "offset": file.tell()}
            tensor.numpy().tofile(file)
    job = {
        "config": json.loads((exl2_dir / "config.json").read_text()),
        "raw": str(raw),
        "index": index,
        "types": {str(path): GGUF_TYPES[name] for name, path in missing.items()},
    }
    try:
        subprocess.run([llama_python, "-m", "benchmarks.cpu.write_gguf"], cwd=REPO,
                       input=json.dumps(job), text=True, check=True)
    finally:
        raw.unlink()
    return files


def bytes_per_token(model: Path, llama_python: str | None) -> int:
    """Return the bytes of weights that one step reads: all but the embedding.

    Args:
        model: an EXL2 folder, or a GGUF file, which `llama_python` reads.
    """
    if model.is_dir():
        parts = _parts(model)
        weights = [*parts.linears(), *parts.norms()]
        return sum(spec.nbytes for part in weights for spec in part.specs())
    code = (
        "import gguf, sys; r = gguf.GGUFReader(sys.argv[1]); "
        "print(sum(int(t.n_bytes) for t in r.tensors if t.name != 'token_embd.weight'))"
    )
    assert llama_python is not None
    done = subprocess.run(
        [llama_python, "-c", code, str(model)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def cache_bytes_per_token(exl2_dir: Path) -> dict[str, float]:
    """Return the bytes of a token in all layers, by cache type; llama.cpp's are as many.

    q8 and q4 are 8.5 and 4.5 bits an element in both engines: codes and a float16 scale per
    32 elements.
    """
    config = ModelConfig.from_dir(exl2_dir)
    return {
        name: config.num_hidden_layers
        * CacheType.parse(name).bytes_per_token(config.num_key_value_heads, config.head_dim)
        for name in ("fp16", "q8", "q4")
    }


def file_bytes(model: Path) -> int:
    """Return the size of a model's weights on disk in bytes."""
    files = model.glob("*.safetensors") if model.is_dir() else [model]
    return sum(path.stat().st_size for path in files)


def _parts(exl2_dir: Path) -> ModelParts:
    checkpoint = Checkpoint.open(exl2_dir)
    try:
        return build_parts(ModelConfig.from_dir(exl2_dir), checkpoint)
    finally:
        checkpoint.close()
