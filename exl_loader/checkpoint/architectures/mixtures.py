"""Architectures with mixtures of experts."""

from __future__ import annotations

from .fields import Architecture, Mixture
from .llama_like import COMMON

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
        experts=Mixture(
            router="block_sparse_moe.gate",
            experts="block_sparse_moe.experts",
            gate="w1",
            up="w3",
            down="w2",
        ),
    ),
)
