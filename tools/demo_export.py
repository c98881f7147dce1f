"""Write the demo model as a Hugging Face folder (config in the transformers 4 layout)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from demo_tokenizer import BOS_ID, EOS_ID, save_tokenizer

ROPE_THETA = 10000.0


def demo_config(vocab_size: int) -> LlamaConfig:
    """The demo model's shape: about 4.7 million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        use_cache=False,
    )


def _config_json(config: LlamaConfig) -> dict:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        **{name: getattr(config, name) for name in names},
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(model: LlamaForCausalLM, tokenizer: bytes, report: dict, folder: Path) -> None:
    """Write config, generation config, tokenizer, float16 weights and the training report.

    Args:
        model: the trained model, any float dtype.
        tokenizer: contents of `tokenizer.model`.
        report: how the training went; becomes `training.json`.
        folder: made if it is not there; files in it are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    _write_json(folder / "config.json", _config_json(model.config))
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "training.json", report)
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
