"""config.json of every architecture, as its own library would save it, with a length of choice."""

from __future__ import annotations

from typing import Any

from exl_loader.checkpoint.architectures import ARCHITECTURES

_LLAMA_SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}
# What makes transformers ask for the Python code of a folder.
_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}

# Configurations of classes that transformers has not, after their published folders.
BY_CODE: dict[str, dict[str, Any]] = {
    "InternLM2ForCausalLM": {
        "model_type": "internlm2", "bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 1.0}, "tie_word_embeddings": False,
    },
    "MiniCPMForCausalLM": {
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_scaling": None, "scale_emb": 12,
        "dim_model_base": 256, "scale_depth": 1.4,
    },
    "OrionForCausalLM": {
        "model_type": "orion", "hidden_act": "silu", "rms_norm_eps": 1e-5, "pretraining_tp": 1,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "IndexForCausalLM": {
        "model_type": "index", "hidden_act": "silu", "rms_norm_eps": 1e-6, "norm_head": 1,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "YiForCausalLM": {
        "model_type": "Yi", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5000000.0,
        "tie_word_embeddings": False,
    },
    "GemmoeForCausalLM": {
        "model_type": "gemmoe", "hidden_act": "gelu", "head_dim": 64, "num_local_experts": 4,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def config_of(architecture: str, length: int) -> dict[str, Any]:
    """Return the config.json of a model whose own length is `length` tokens."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    entry = ARCHITECTURES[architecture]
    if entry.model_type not in CONFIG_MAPPING_NAMES:
        own = BY_CODE.get(architecture, dict(entry.defaults))
        return _LLAMA_SIZES | own | {
            "architectures": [architecture], "auto_map": _CODE, "max_position_embeddings": length,
        }
    config = CONFIG_MAPPING[entry.model_type]()
    # Where a class has another name for it, the configuration knows.
    config.get_text_config().max_position_embeddings = length
    values = config.to_diff_dict()
    return values | {"architectures": [architecture], "model_type": entry.model_type}
