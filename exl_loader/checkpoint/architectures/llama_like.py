"""Architectures with RMS norms, a gated MLP and RoPE, or that differ from these in little."""

from __future__ import annotations

from .fields import Architecture, Factors, Norms, Positions, QkNorms

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION_BIAS = dict.fromkeys((*QKV, "self_attn.o_proj"), "attention_bias")
_MLP_BIAS = dict.fromkeys((*_GATE_UP, "mlp.down_proj"), "mlp_bias")

COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_QWEN = {
    **COMMON,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_GEMMA2_NORMS = Norms(
    offset=1.0,
    attn_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)

LLAMA_LIKE = (
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        defaults={
            **COMMON,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases={**ATTENTION_BIAS, **_MLP_BIAS},
    ),
    Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding_window="uniform",
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        defaults={**_QWEN, "num_key_value_heads": 32},
        biases=dict.fromkeys(QKV, True),
        sliding_window="upper",
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        biases=ATTENTION_BIAS,
        sliding_window="upper",
        norms=Norms(qk=QkNorms()),
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        defaults={
            **COMMON,
            "hidden_act": "gelu_pytorch_tanh",
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
        biases=ATTENTION_BIAS,
        keys={"hidden_act": "hidden_activation"},
        sliding_window="alternating",
        norms=_GEMMA2_NORMS,
        factors=Factors(
            embedding="hidden_size ** 0.5", attention="query_pre_attn_scalar ** -0.5"
        ),
    ),
    Architecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        sliding_window="uniform",
        fused={
            "self_attn.qkv_proj": QKV,
            "mlp.gate_up_proj": _GATE_UP,
        },
        positions=Positions(type_names={"su": "longrope", "yarn": "longrope"}),
    ),
)
