"""config.json of every architecture, as its own library would save it, with a length of choice."""

from __future__ import annotations

from typing import Any

from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.checkpoint.architectures.multimodal import MULTIMODAL

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
    "RWForCausalLM": {
        "model_type": "RefinedWeb", "n_layer": 2, "n_head": 4, "n_head_kv": 2, "alibi": False,
        "parallel_attn": True, "bias": False, "layer_norm_epsilon": 1e-5,
        "bos_token_id": 11, "eos_token_id": 11,
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


# Keys and values of published folders that the web UI reads wrongly or not at all, or that have the
# length in another place -> the length of the model. Sizes are left out where they do not matter.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gemma-3-4b": ({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "eos_token_id": [1, 106], "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        }, "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    }, 131072),
    "gemma-3-1b": (_LLAMA_SIZES | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256,
        "max_position_embeddings": 32768, "rope_scaling": None, "rope_theta": 1000000,
        "rope_local_base_freq": 10000, "query_pre_attn_scalar": 256, "sliding_window_pattern": 6,
    }, 32768),
    "mistral-small-3.1": ({
        "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
        "text_config": _LLAMA_SIZES | {
            "model_type": "mistral", "max_position_embeddings": 131072, "head_dim": 128,
            "rope_theta": 1000000000.0, "sliding_window": None,
        }, "vision_config": {"model_type": "pixtral"},
    }, 131072),
    "pixtral-12b": ({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "head_dim": 128,
            "intermediate_size": 14336, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "max_position_embeddings": 1024000, "rope_theta": 1000000000.0,
            "sliding_window": None, "vocab_size": 131072,
        }, "vision_config": {"model_type": "pixtral"},
    }, 1024000),
    "llava-1.5": ({
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "text_config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                        "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model"}, "vocab_size": 32064,
    }, 4096),
    "qwen2.5-vl-7b": (_LLAMA_SIZES | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000, "max_window_layers": 28, "sliding_window": 32768,
        "use_sliding_window": False, "vision_config": {"model_type": "qwen2_5_vl", "depth": 32},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }, 128000),
    "qwen2.5-yarn": (_LLAMA_SIZES | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "max_position_embeddings": 32768, "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    }, 131072),
    "llama-3.1": (_LLAMA_SIZES | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "max_position_embeddings": 131072, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }, 131072),
    "command-r": (_LLAMA_SIZES | {
        "architectures": ["CohereForCausalLM"], "model_type": "cohere", "logit_scale": 0.0625,
        "max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 8000000.0,
    }, 131072),
    "gpt2": ({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
    }, 1024),
    "starcoder": ({
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_embd": 6144,
        "n_head": 48, "n_inner": 24576, "n_layer": 40, "n_positions": 8192, "vocab_size": 49152,
        "multi_query": True, "activation_function": "gelu", "layer_norm_epsilon": 1e-05,
    }, 8192),
    "falcon-7b": ({
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 4544,
        "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024,
        "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False,
        "new_decoder_architecture": False, "layer_norm_epsilon": 1e-05,
    }, 2048),
    "dbrx": ({
        "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144,
        "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    }, 32768),
}  # fmt: skip


def config_of(architecture: str, length: int) -> dict[str, Any]:
    """Return the config.json of a model whose own length is `length` tokens."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    if architecture in MULTIMODAL:
        whole = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))()
        whole.text_config.max_position_embeddings = length
        return whole.to_diff_dict() | {"architectures": [architecture]}
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
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        # A class with a scaled RoPE by default; the length is to be the one that is named.
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    sizes = config.get_text_config()
    if sizes.hidden_size % sizes.num_attention_heads and not getattr(sizes, "head_dim", None):
        values["head_dim"] = 128
    return values | {"architectures": [architecture], "model_type": entry.model_type}
