"""Small random models of every architecture, made and evaluated by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

# Odd on purpose: no dimension is a multiple of 128, no vocabulary one of 32.
COMMON = dict(
    vocab_size=331, hidden_size=96, intermediate_size=168, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=64,
)
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128,
)
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=32,
    partial_rotary_factor=0.75,
)

MROPE = dict(rope_type="mrope", rope_theta=10000.0, mrope_section=[4, 4, 4])


def longrope(pairs: int) -> dict:
    """Settings of longrope whose short and long factors differ."""
    steps = [i / pairs for i in range(pairs)]
    return LONGROPE | {
        "short_factor": [1.0 + 0.1 * s for s in steps],
        "long_factor": [1.0 + 4.0 * s for s in steps],
    }


# Name -> (architecture, config). The models of a name differ in the option that the name has.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", dict(head_dim=64)),
    "llama-biases": ("Llama", dict(head_dim=80, attention_bias=True, mlp_bias=True)),
    "llama-tied": ("Llama", dict(head_dim=128, tie_word_embeddings=True)),
    "llama3": ("Llama", dict(head_dim=96, rope_parameters=LLAMA3)),
    "llama-yarn": ("Llama", dict(head_dim=64, rope_parameters=YARN)),
    "llama-linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "llama-dynamic": (
        "Llama",
        dict(
            max_position_embeddings=32,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
        ),
    ),
    "mistral": ("Mistral", dict(head_dim=64, sliding_window=24)),
    "mistral-full": ("Mistral", dict(head_dim=64, sliding_window=None, num_key_value_heads=1)),
    "mixtral": ("Mixtral", dict(head_dim=64, num_local_experts=5, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=4)),
    "qwen2-window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=128)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=256, query_pre_attn_scalar=144, sliding_window=24,
            attn_logit_softcapping=4.0, final_logit_softcapping=3.0,
        ),
    ),
    "gemma": ("Gemma", dict(head_dim=64, hidden_activation="gelu_pytorch_tanh")),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=64, query_pre_attn_scalar=100, sliding_window=24, num_hidden_layers=4,
            layer_types=[*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
            final_logit_softcapping=3.0, rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "llava": ("LlavaForConditionalGeneration", dict(head_dim=32, sliding_window=None)),
    "mistral3": (
        "Mistral3ForConditionalGeneration", dict(sliding_window=24, tie_word_embeddings=True)),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", dict(rope_parameters=MROPE)),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", dict(rope_parameters=MROPE)),
    "gemma3-images": (
        "Gemma3ForConditionalGeneration", dict(head_dim=32, sliding_window=24)),
    "granite": (
        "Granite",
        dict(embedding_multiplier=3.5, residual_multiplier=0.3, attention_multiplier=0.1,
             logits_scaling=0.25, attention_bias=True, mlp_bias=True),
    ),
    "cohere": ("Cohere", dict(logit_scale=0.3)),
    "cohere-norms": (
        "Cohere", dict(use_qk_norm=True, attention_bias=True, tie_word_embeddings=False)),
    "cohere2": ("Cohere2", dict(head_dim=32, sliding_window=24, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])),
    "glm": ("Glm", dict(head_dim=48)),
    "glm4": ("Glm4", dict(head_dim=64, attention_bias=False)),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        dict(sliding_window=24, num_hidden_layers=4, rope_parameters=dict(
            full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0, 1])),
    "smollm3-window": (
        "SmolLM3",
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=24, mlp_bias=True),
    ),
    "exaone4": ("Exaone4", dict(sliding_window=24, sliding_window_pattern=2)),
    "exaone4-full": ("Exaone4", dict(sliding_window=None, head_dim=48, layer_types=[
        "full_attention"] * 3)),
    "ernie": ("Ernie4_5", dict(head_dim=32)),
    "ernie-biases": ("Ernie4_5", dict(head_dim=32, use_bias=True, tie_word_embeddings=False)),
    "seed-oss": ("SeedOss", dict(head_dim=32, attention_out_bias=True)),
    "arcee": ("Arcee", dict(mlp_bias=True)),
    "nemotron": ("Nemotron", dict(num_key_value_heads=4, mlp_bias=True)),
    "phi3": ("Phi3", dict(sliding_window=24, hidden_size=80, num_attention_heads=1,
                          num_key_value_heads=1)),
    "phi3-longrope": (
        "Phi3",
        dict(
            hidden_size=128, original_max_position_embeddings=32, rope_parameters=longrope(12)
        ),
    ),
}

# Architecture -> its configuration, where this has another name.
CONFIGS = {
    "Gemma3": "Gemma3TextConfig", "Qwen2VL": "Qwen2VLTextConfig",
    "Qwen2_5_VL": "Qwen2_5_VLTextConfig",
}
PIXTRAL = dict(model_type="pixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
               num_attention_heads=2, image_size=32, patch_size=16)
# Models that read images too -> the architecture of the language part, and the image part.
IMAGE_MODELS = {
    "LlavaForConditionalGeneration": ("Mistral", PIXTRAL),
    "Mistral3ForConditionalGeneration": ("Mistral", PIXTRAL),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VL", dict(depth=1, embed_dim=32, hidden_size=96, num_heads=2)),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VL",
        dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=96),
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3",
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
             image_size=32, patch_size=8),
    ),
}


def make_model(name: str, seed: int, folder: Path, dtype: str = "float32", shards: int = 1,
               **changes):
    """Save a random model with transformers and return it as loaded back, in float32.

    Weights are large enough for every part to matter: norms, biases and soft caps too.
    """
    architecture, changed = MODELS[name]
    model_class, config = _of_architecture(architecture, COMMON | changed | changes)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.3)
            else:
                value.copy_(torch.randn_like(value) * 1.2 * value.shape[-1] ** -0.5)
    model.to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = "5GB" if shards == 1 else f"{size // shards // 1000 + 1}KB"
    model.save_pretrained(folder, max_shard_size=limit)
    return load_model(folder, model_class)


def _of_architecture(architecture: str, values: dict):
    """Return a model's class and its configuration."""
    text, image = IMAGE_MODELS.get(architecture, (architecture, None))
    config = getattr(transformers, CONFIGS.get(text, f"{text}Config"))(**values)
    if image is None:
        return getattr(transformers, f"{architecture}ForCausalLM"), config
    whole = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))
    return (
        getattr(transformers, architecture),
        whole(text_config=config.to_dict(), vision_config=image,
              tie_word_embeddings=values.get("tie_word_embeddings", False)),
    )


def load_model(folder: Path, model_class=transformers.AutoModelForCausalLM):
    """Load a folder with transformers in float32, attention in its plain form."""
    return model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def to_old_layout(folder: Path) -> None:
    """Rewrite config.json as transformers 4 would have: `rope_theta` and `rope_scaling`."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        assert local.pop("rope_type") == "default"
        if local["rope_theta"] != rope["rope_theta"]:
            config["rope_local_base_freq"] = local["rope_theta"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if "mrope_section" in rope:
        rope = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    path.write_text(json.dumps(whole))


@torch.no_grad()
def expected_logits(model, ids: list[int]) -> torch.Tensor:
    """Return transformers' logits of one pass without a cache, float32 [T, vocab]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error, in float64."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
