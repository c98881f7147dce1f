"""Models whose classes transformers does not have, written down from their published code.

Plain PyTorch in float32, one text at a time and no cache; nothing here comes from the engine.
`Definition` is the model that they have in common: RMS norms, a gated MLP with SiLU, and RoPE of
the first half of a head with the second.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, linear, normalize, silu

from support.makers import write_folder

Tensors = dict[str, torch.Tensor]


class Definition:
    """A causal language model.

    Args:
        config: its `config.json`.
        tensors: its weights, in the dtype of their file.
    """

    embedding, final_norm, head = "model.embed_tokens", "model.norm", "lm_head"
    attn_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    output = "self_attn.o_proj"
    gate, up, down = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    norm_parts: tuple[str, ...] = ("weight",)

    def __init__(self, config: dict, tensors: Tensors) -> None:
        self.config, self.stored = config, tensors
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.heads, self.kv_heads, self.head_dim = _heads(config)

    @classmethod
    def projections(cls, config: dict) -> dict[str, int]:
        """Return name -> output rows of what makes queries, keys and values."""
        heads, kv_heads, head_dim = _heads(config)
        return {
            "self_attn.q_proj": heads * head_dim,
            "self_attn.k_proj": kv_heads * head_dim,
            "self_attn.v_proj": kv_heads * head_dim,
        }

    @classmethod
    def shapes(cls, config: dict) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor."""
        heads, _, head_dim = _heads(config)
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        vocab = (config["vocab_size"], hidden)
        shapes: dict[str, tuple[int, ...]] = {f"{cls.embedding}.weight": vocab}
        norms = [cls.final_norm]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            norms += [layer + cls.attn_norm, layer + cls.mlp_norm]
            sizes = {name: (rows, hidden) for name, rows in cls.projections(config).items()}
            sizes[cls.output] = (hidden, heads * head_dim)
            biased = tuple(sizes) if config.get("bias") else ()
            sizes |= {cls.gate: (inner, hidden), cls.up: (inner, hidden), cls.down: (hidden, inner)}
            shapes |= {f"{layer}{name}.weight": shape for name, shape in sizes.items()}
            shapes |= {f"{layer}{name}.bias": sizes[name][:1] for name in biased}
        shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in cls.norm_parts}
        if not config["tie_word_embeddings"]:
            shapes[f"{cls.head}.weight"] = vocab
        return shapes

    def __call__(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Compute logits of ids [1, T], as the models of transformers do."""
        x = self.embed(ids[0])
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            x = x + self.scale(self.attention(layer, self.norm(layer + self.attn_norm, x)))
            x = x + self.scale(self.mlp(layer, self.norm(layer + self.mlp_norm, x)))
        return SimpleNamespace(logits=self.logits(self.norm(self.final_norm, x))[None])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tensors[f"{self.embedding}.weight"][ids]

    def scale(self, added: torch.Tensor) -> torch.Tensor:
        return added

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        weight = self.tensors[f"{name}.weight"]
        return weight * x * torch.rsqrt(variance + self.config["rms_norm_eps"])

    def qkv(self, layer: str, x: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values, [T, heads, head_dim]."""
        return [
            self.linear(layer + name, x).view(len(x), -1, self.head_dim)
            for name in self.projections(self.config)
        ]

    def frequencies(self, length: int) -> torch.Tensor:
        """Return the rotation per token of each pair."""
        steps = torch.arange(0, self.head_dim, 2).double() / self.head_dim
        return self.config.get("rope_theta", 10000.0) ** -steps

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(len(x)).double(), self.frequencies(len(x)))
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def attention(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(layer, x)
        group = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(group, 1) for t in (self.rope(k), v))
        scores = torch.einsum("qhd,khd->hqk", self.rope(q), k) / math.sqrt(self.head_dim)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return self.linear(layer + self.output, torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    def mlp(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        gated = silu(self.linear(layer + self.gate, x)) * self.linear(layer + self.up, x)
        return self.linear(layer + self.down, gated)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        tied = f"{self.head}.weight" not in self.tensors
        return self.linear(self.embedding if tied else self.head, x)


class OldYi(Definition):
    """The names that Yi's layers had before they became Llama's."""

    attn_norm, mlp_norm = "ln1", "ln2"


class Orion(Definition):
    """LayerNorm in place of RMS norm."""

    norm_parts = ("weight", "bias")

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, x.shape[-1:], weight, bias, self.config["rms_norm_eps"])


class MiniCPM(Definition):
    """Factors on embeddings, on what blocks add and in front of the head."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return super().embed(ids) * self.config["scale_emb"]

    def scale(self, added: torch.Tensor) -> torch.Tensor:
        return added * (self.config["scale_depth"] / math.sqrt(self.config["num_hidden_layers"]))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().logits(x / (self.config["hidden_size"] / self.config["dim_model_base"]))


class InternLM2(Definition):
    """Queries, keys and values in one tensor, by key/value head, and names of its own."""

    embedding, head = "model.tok_embeddings", "output"
    attn_norm, mlp_norm, output = "attention_norm", "ffn_norm", "attention.wo"
    gate, up, down = "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"

    @classmethod
    def projections(cls, config: dict) -> dict[str, int]:
        heads, kv_heads, head_dim = _heads(config)
        return {"attention.wqkv": (heads + 2 * kv_heads) * head_dim}

    def qkv(self, layer: str, x: torch.Tensor) -> list[torch.Tensor]:
        group = self.heads // self.kv_heads
        fused = self.linear(f"{layer}attention.wqkv", x)
        fused = fused.view(len(x), self.kv_heads, group + 2, self.head_dim)
        return [fused[:, :, :group].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]]

    def frequencies(self, length: int) -> torch.Tensor:
        scaling, own = self.config.get("rope_scaling"), self.config["max_position_embeddings"]
        frequencies = super().frequencies(length)
        if scaling is None or length <= own:
            return frequencies
        assert scaling["type"] == "dynamic"
        stretch = scaling["factor"] * length / own - (scaling["factor"] - 1)
        # base * stretch ** (d / (d - 2)), to the power of -2i / d
        steps = torch.arange(0, self.head_dim, 2).double() / (self.head_dim - 2)
        return frequencies * stretch**-steps


class Index(Definition):
    """Where `norm_head` is set, the head's rows are divided by their length once and for all."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        if not self.config.get("norm_head"):
            return super().logits(x)
        head = self.stored[f"{self.head}.weight"]
        return linear(x, normalize(head.float()).to(head.dtype).float())


# Class name without `ForCausalLM` -> its definition and its `model_type`.
DEFINITIONS = {
    "Yi": (OldYi, "Yi"),
    "Orion": (Orion, "orion"),
    "MiniCPM": (MiniCPM, "minicpm"),
    "InternLM2": (InternLM2, "internlm2"),
    "Index": (Index, "index"),
}


def _heads(config: dict) -> tuple[int, int, int]:
    """Return the number of heads, of key/value heads, and the elements of a head."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config["hidden_size"] // heads


def write_defined(
    name: str, config: dict, seed: int, folder: Path, dtype: str, shards: int
) -> None:
    """Write a random model of a class in `DEFINITIONS`."""
    definition, model_type = DEFINITIONS[name]
    own = {
        "architectures": [f"{name}ForCausalLM"], "model_type": model_type, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, **config,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor, shape in definition.shapes(own).items():
        value = torch.randn(shape, generator=generator)
        value = value * 0.3 if len(shape) == 1 else value * 1.2 * shape[-1] ** -0.5
        if len(shape) == 1 and tensor.endswith("weight"):
            value = value + 1
        tensors[tensor] = value.to(getattr(torch, dtype))
    write_folder(folder, tensors, own, shards=shards)


def load_defined(folder: Path) -> Definition | None:
    """Read a folder of a class in `DEFINITIONS`; None where it is of another class."""
    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0].removesuffix("ForCausalLM")
    if name not in DEFINITIONS:
        return None
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return DEFINITIONS[name][0](config, tensors)
