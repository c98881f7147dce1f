"""The models this engine runs: one table entry per Hugging Face architecture, data only.

docs/adding_an_architecture.md explains how to add one. Only this package and `model/builder.py` use
the entries: everything else sees parts, and the numbers in `ModelConfig`.
Tensor names, default values and sliding windows are those of the `transformers` library
(`modeling_*.py` and `configuration_*.py` of version 5.23, and version 4 where it differs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

# Which layers have the window of the config key `sliding_window`:
#   none        no layer: the key means nothing to this architecture
#   uniform     every layer
#   upper       layers from `max_window_layers` on, where `use_sliding_window` is set
#   alternating layers 0, 2, 4, ...
# `upper` and `alternating` are only the defaults of an explicit `layer_types` list.
SlidingWindowRule = Literal["none", "uniform", "upper", "alternating"]

# Hugging Face's activation names, as `Ops.gate` calls them.
ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
    }
)


@dataclass(frozen=True)
class ExpertNames:
    """Tensor names of a mixture-of-experts block, relative to its layer."""

    router: str
    experts: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart: its parts, their tensor names and its numbers.

    Args:
        name: Hugging Face class name, as in `architectures` of `config.json`.
        model_type: `model_type` of `config.json`, for folders without `architectures`.
        defaults: values of config keys that a folder may leave out. A key that stands in
            the folder as null is not left out.
        embedding, layers, final_norm, head: where a model's tensors are; layer N's names begin
            with `{layers}.N.`, and all names below are relative to that.
        q_proj, k_proj, v_proj, o_proj: attention's linear layers.
        q_norm, k_norm: norms of each query and key head before RoPE; None where absent.
        gate_proj, up_proj, down_proj: the gated MLP's linear layers.
        experts: names of the expert block that replaces the MLP; None where dense.
        attn_input_norm, mlp_input_norm: norms in front of the blocks.
        attn_output_norm, mlp_output_norm: norms on what the blocks add; None where absent.
        fused: source tensor -> the linear layers whose output rows it holds, in order.
        biases: which linear layers have a bias: always (True), or where the named config
            key is set. Others have one only if the checkpoint brings one.
        sliding_window: which layers have the window of that config key.
        norm_offset: added to every norm weight (Gemma stores weight - 1).
        embed_scale: whether embeddings are multiplied by sqrt(hidden_size).
        activation_key: config key that names the activation.
        query_pre_attn_scalar: whether attention is scaled by that config key instead of
            head_dim.
        longrope_aliases: older `rope_type` names that mean `longrope` here.
    """

    name: str
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    experts: ExpertNames | None = None
    attn_input_norm: str = "input_layernorm"
    attn_output_norm: str | None = None
    mlp_input_norm: str = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    sliding_window: SlidingWindowRule = "none"
    norm_offset: float = 0.0
    embed_scale: bool = False
    activation_key: str = "hidden_act"
    query_pre_attn_scalar: bool = False
    longrope_aliases: tuple[str, ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION_BIAS = dict.fromkeys((*_QKV, "self_attn.o_proj"), "attention_bias")
_MLP_BIAS = dict.fromkeys((*_GATE_UP, "mlp.down_proj"), "mlp_bias")

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN = {
    **_COMMON,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_ENTRIES = (
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        defaults={
            **_COMMON,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases={**_ATTENTION_BIAS, **_MLP_BIAS},
    ),
    Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        defaults={
            **_COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding_window="uniform",
    ),
    Architecture(
        name="MixtralForCausalLM",
        model_type="mixtral",
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding_window="uniform",
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            experts="block_sparse_moe.experts",
            gate="w1",
            up="w3",
            down="w2",
        ),
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        defaults={**_QWEN, "num_key_value_heads": 32},
        biases=dict.fromkeys(_QKV, True),
        sliding_window="upper",
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        biases=_ATTENTION_BIAS,
        sliding_window="upper",
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        defaults={
            **_COMMON,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        biases=_ATTENTION_BIAS,
        sliding_window="alternating",
        attn_output_norm="post_attention_layernorm",
        mlp_input_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        norm_offset=1.0,
        embed_scale=True,
        activation_key="hidden_activation",
        query_pre_attn_scalar=True,
    ),
    Architecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        sliding_window="uniform",
        fused={
            "self_attn.qkv_proj": _QKV,
            "mlp.gate_up_proj": _GATE_UP,
        },
        longrope_aliases=("su", "yarn"),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({a.name: a for a in _ENTRIES})

# The class was spelt this way before it was merged into `transformers`; folders of that
# time still say so.
ALIASES: Mapping[str, str] = MappingProxyType({"LLaMAForCausalLM": "LlamaForCausalLM"})
