"""Architectures with mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from .fields import Architecture, Factors, FusedExperts, Mixture, Norms, QkNorms
from .llama_like import ATTENTION_BIAS, COMMON, GEMMA, GRANITE, GRANITE_FACTORS, QKV, QWEN

MIXTRAL_EXPERTS = Mixture(
    router="block_sparse_moe.gate",
    experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
)

MIXTURES = (
    Architecture(
        name="MixtralForCausalLM",
        model_type="mixtral",
        defaults={
            **COMMON,
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
        experts=MIXTRAL_EXPERTS,
    ),
    Architecture(
        name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        defaults={
            **QWEN,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "qkv_bias": True,
        },
        keys={"num_local_experts": ("num_experts", "num_local_experts")},
        biases=dict.fromkeys(QKV, "qkv_bias"),
        sliding_window="lower",
        experts=Mixture(
            width="moe_intermediate_size",
            normalize="norm_topk_prob",
            shared="mlp.shared_expert",
            shared_width="shared_expert_intermediate_size",
            shared_gate="mlp.shared_expert_gate",
            dense_layers="listed",
        ),
    ),
    Architecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        defaults={
            **QWEN,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        keys={"num_local_experts": ("num_experts", "num_local_experts")},
        biases=ATTENTION_BIAS,
        norms=Norms(qk=QkNorms()),
        sliding_window="uniform",
        experts=Mixture(
            width="moe_intermediate_size",
            normalize="norm_topk_prob",
            dense_layers="listed",
        ),
    ),
    Architecture(
        # Not in transformers; as exllamav2 runs it.
        name="GemmoeForCausalLM",
        model_type="gemmoe",
        defaults={
            **GEMMA,
            "num_key_value_heads": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        biases=ATTENTION_BIAS,
        norms=Norms(offset=1.0),
        factors=Factors(embedding="hidden_size ** 0.5"),
        experts=MIXTRAL_EXPERTS,
    ),
    Architecture(
        name="DbrxForCausalLM",
        model_type="dbrx",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "intermediate_size": 3584,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_normalize_expert_weights": 1.0,
        },
        keys={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "num_key_value_heads": "kv_n_heads",
            "max_position_embeddings": "max_seq_len",
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "ffn_act_fn",
            "num_local_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_top_k",
        },
        sections=("attn_config", "ffn_config"),
        renames=(
            # The tensors that have all experts lack the ending of a weight.
            (".ffn.experts.mlp.w1", ".block_sparse_moe.experts.w1.weight"),
            (".ffn.experts.mlp.v1", ".block_sparse_moe.experts.v1.weight"),
            (".ffn.experts.mlp.w2", ".block_sparse_moe.experts.w2.weight"),
            ("transformer.", "model."),
            (".blocks.", ".layers."),
            (".ffn.experts.mlp.", ".block_sparse_moe.experts."),
            (".ffn.router.layer.", ".block_sparse_moe.gate."),
            (".norm_attn_norm.norm_1.", ".input_layernorm."),
            (".norm_attn_norm.norm_2.", ".post_attention_layernorm."),
            (".norm_attn_norm.attn.", ".self_attn."),
            (".out_proj.", ".o_proj."),
            (".norm_f.", ".norm."),
            (".wte.", ".embed_tokens."),
        ),
        norms=Norms("layer"),
        fused={"self_attn.Wqkv": QKV},
        clip_qkv=True,
        experts=replace(
            MIXTRAL_EXPERTS,
            up="v1",
            fused=FusedExperts(
                gate="block_sparse_moe.experts.w1",
                up="block_sparse_moe.experts.v1",
                down="block_sparse_moe.experts.w2",
                down_is_transposed=True,
            ),
            normalize="moe_normalize_expert_weights",
        ),
    ),
    Architecture(
        name="GptOssForCausalLM",
        model_type="gpt_oss",
        defaults={
            **COMMON,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },
        fixed={"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        renames=(
            # The tensors that have all experts lack the endings of weights and biases.
            (".mlp.experts.gate_up_proj_bias", ".mlp.experts.gate_up.bias"),
            (".mlp.experts.gate_up_proj", ".mlp.experts.gate_up.weight"),
            (".mlp.experts.down_proj_bias", ".mlp.experts.down.bias"),
            (".mlp.experts.down_proj", ".mlp.experts.down.weight"),
        ),
        biases={**ATTENTION_BIAS, "mlp.router": True, "mlp.experts": True},
        sliding_window="alternating",
        sinks="self_attn.sinks",
        experts=Mixture(
            router="mlp.router",
            # GPTQModel stores an expert's gate and up, alternating, as `mlp.experts.gate_up.N`.
            fused=FusedExperts(
                gate="mlp.experts.gate_up",
                up="mlp.experts.gate_up",
                down="mlp.experts.down",
                is_transposed=True,
                down_is_transposed=True,
                is_alternating=True,
            ),
            activation="clamped_swiglu",
        ),
    ),
    Architecture(
        name="GraniteMoeForCausalLM",
        model_type="granitemoe",
        defaults={**GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2},
        biases=ATTENTION_BIAS,
        factors=GRANITE_FACTORS,
        experts=Mixture(
            router="block_sparse_moe.router.layer",
            experts="block_sparse_moe.experts",
            fused=FusedExperts(
                gate="block_sparse_moe.input_linear",
                up="block_sparse_moe.input_linear",
                down="block_sparse_moe.output_linear",
            ),
        ),
    ),
)
