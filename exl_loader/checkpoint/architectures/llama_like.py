"""Architectures with RMS norms, a gated MLP and RoPE, or that differ from these in little."""

from __future__ import annotations

from dataclasses import replace

from .fields import Architecture, Factors, Norms, Positions, QkNorms

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION_BIAS = dict.fromkeys((*QKV, "self_attn.o_proj"), "attention_bias")
MLP_BIAS = dict.fromkeys((*_GATE_UP, "mlp.down_proj"), "mlp_bias")

COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN = {
    **COMMON,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

GEMMA = {
    **COMMON,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2_NORMS = Norms(
    offset=1.0,
    attn_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)

_GEMMA2_FACTORS = Factors(
    embedding="hidden_size ** 0.5", attention="query_pre_attn_scalar ** -0.5"
)
# Norms on what the blocks add, none in front of them.
_OUTPUT_NORMS = Norms(
    attn_input=None,
    attn_output="post_attention_layernorm",
    mlp_input=None,
    mlp_output="post_feedforward_layernorm",
)
_COHERE = {
    **COMMON,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    # Command R states its length here; its `max_position_embeddings` is that of its training.
    "model_max_length": None,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}
_GLM = {
    **COMMON,
    "rms_norm_eps": 1.5625e-7,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}
_OLMO = {
    **COMMON,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "eos_token_id": 50279,
}

GRANITE = {
    **COMMON,
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GRANITE_FACTORS = Factors(
    embedding="embedding_multiplier",
    residual="residual_multiplier",
    attention="attention_multiplier",
    logits="1 / logits_scaling",
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
        biases={**ATTENTION_BIAS, **MLP_BIAS},
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
        defaults={**QWEN, "num_key_value_heads": 32},
        biases=dict.fromkeys(QKV, True),
        sliding_window="upper",
        # A text has the same position in each of the dimensions of Qwen2-VL's RoPE.
        positions=Positions(type_names={"mrope": "default"}),
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**QWEN, "num_key_value_heads": 32, "head_dim": 128},
        biases=ATTENTION_BIAS,
        sliding_window="upper",
        norms=Norms(qk=QkNorms()),
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        defaults={
            **GEMMA,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        biases=ATTENTION_BIAS,
        keys={"hidden_act": "hidden_activation"},
        sliding_window="alternating",
        norms=_GEMMA2_NORMS,
        factors=_GEMMA2_FACTORS,
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
    Architecture(
        name="YiForCausalLM",
        model_type="Yi",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        old_names={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
    ),
    Architecture(
        name="GemmaForCausalLM",
        model_type="gemma",
        defaults={**GEMMA, "num_key_value_heads": 16},
        keys={"hidden_act": "hidden_activation"},
        biases=ATTENTION_BIAS,
        norms=Norms(offset=1.0),
        factors=Factors(embedding="hidden_size ** 0.5"),
    ),
    Architecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        defaults={
            **GEMMA,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        keys={"hidden_act": "hidden_activation"},
        biases=ATTENTION_BIAS,
        sliding_window="pattern",
        norms=replace(_GEMMA2_NORMS, qk=QkNorms()),
        positions=Positions(local_theta="rope_local_base_freq"),
        factors=_GEMMA2_FACTORS,
    ),
    Architecture(
        name="GraniteForCausalLM",
        model_type="granite",
        defaults=GRANITE,
        biases={**ATTENTION_BIAS, **MLP_BIAS},
        factors=GRANITE_FACTORS,
    ),
    Architecture(
        name="CohereForCausalLM",
        model_type="cohere",
        defaults=_COHERE,
        keys={"rms_norm_eps": "layer_norm_eps"},
        biases=ATTENTION_BIAS,
        norms=Norms(kind="layer", qk=QkNorms(weights="heads", key="use_qk_norm")),
        positions=Positions(interleaved=True),
        factors=Factors(logits="logit_scale"),
        parallel=True,
    ),
    Architecture(
        name="Cohere2ForCausalLM",
        model_type="cohere2",
        defaults={
            **_COHERE, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_pattern": 4,
        },
        keys={"rms_norm_eps": "layer_norm_eps"},
        biases=ATTENTION_BIAS,
        sliding_window="pattern",
        norms=Norms(kind="layer"),
        positions=Positions(interleaved=True, layers="sliding"),
        factors=Factors(logits="logit_scale"),
        parallel=True,
    ),
    Architecture(
        name="GlmForCausalLM",
        model_type="glm",
        defaults=_GLM,
        biases=dict.fromkeys(QKV, "attention_bias"),
        fused={"mlp.gate_up_proj": _GATE_UP},
        positions=Positions(interleaved=True),
    ),
    Architecture(
        name="Glm4ForCausalLM",
        model_type="glm4",
        defaults=_GLM,
        biases=dict.fromkeys(QKV, "attention_bias"),
        fused={"mlp.gate_up_proj": _GATE_UP},
        norms=Norms(attn_output="post_self_attn_layernorm", mlp_output="post_mlp_layernorm"),
        positions=Positions(interleaved=True),
    ),
    Architecture(
        name="Olmo2ForCausalLM",
        model_type="olmo2",
        defaults=_OLMO,
        biases=ATTENTION_BIAS,
        norms=replace(_OUTPUT_NORMS, qk=QkNorms(weights="projection")),
    ),
    Architecture(
        name="Olmo3ForCausalLM",
        model_type="olmo3",
        defaults={
            **_OLMO,
            "rope_theta": 500000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        biases=ATTENTION_BIAS,
        sliding_window="pattern",
        norms=replace(_OUTPUT_NORMS, qk=QkNorms(weights="projection")),
        positions=Positions(local_theta="rope_theta"),
    ),
    Architecture(
        name="SmolLM3ForCausalLM",
        model_type="smollm3",
        defaults={
            **COMMON,
            "rope_theta": 2e6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        biases={**ATTENTION_BIAS, **MLP_BIAS},
        sliding_window="unrotated",
        positions=Positions(layers="listed"),
    ),
    Architecture(
        name="Exaone4ForCausalLM",
        model_type="exaone4",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        sliding_window="pattern",
        norms=replace(_OUTPUT_NORMS, qk=QkNorms()),
        positions=Positions(layers="sliding or all"),
    ),
    Architecture(
        name="Ernie4_5ForCausalLM",
        model_type="ernie4_5",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases=dict.fromkeys((*ATTENTION_BIAS, *MLP_BIAS), "use_bias"),
        positions=Positions(interleaved=True),
    ),
    Architecture(
        name="SeedOssForCausalLM",
        model_type="seed_oss",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        biases={
            **dict.fromkeys(QKV, "attention_bias"),
            "self_attn.o_proj": "attention_out_bias",
            **MLP_BIAS,
        },
    ),
    Architecture(
        name="ArceeForCausalLM",
        model_type="arcee",
        defaults={
            **COMMON,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        gate_proj=None,
        biases={**ATTENTION_BIAS, **MLP_BIAS},
    ),
    Architecture(
        name="NemotronForCausalLM",
        model_type="nemotron",
        defaults={
            **COMMON,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 4096,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        keys={"rms_norm_eps": "norm_eps"},
        gate_proj=None,
        biases={**ATTENTION_BIAS, **MLP_BIAS},
        norms=Norms(kind="layer", bias=True, offset=1.0),
    ),
    Architecture(
        name="MinistralForCausalLM",
        model_type="ministral",
        defaults={
            **COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        sliding_window="listed",
    ),
    Architecture(
        name="HeliumForCausalLM",
        model_type="helium",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-8,
            "rope_theta": 100000.0,
            "num_key_value_heads": 20,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        biases={**dict.fromkeys(QKV, "attention_bias"), **MLP_BIAS},
        positions=Positions(interleaved=True),
    ),
)
