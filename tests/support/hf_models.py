"""Small random models of every architecture, made and evaluated by transformers.

Those whose classes it does not have are in `defined_models`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from support.defined_models import DEFINITIONS, load_defined, write_defined

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
    "qwen2moe": ("Qwen2Moe", dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=96,
        shared_expert_intermediate_size=160, mlp_only_layers=[1], use_sliding_window=True,
        sliding_window=24, max_window_layers=3)),
    "qwen2moe-normalized": ("Qwen2Moe", dict(
        num_experts=4, num_experts_per_tok=3, moe_intermediate_size=64, norm_topk_prob=True,
        shared_expert_intermediate_size=64, decoder_sparse_step=2, qkv_bias=False)),
    "qwen3moe": ("Qwen3Moe", dict(
        head_dim=64, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=96,
        norm_topk_prob=True)),
    "qwen3moe-plain": ("Qwen3Moe", dict(
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        mlp_only_layers=[0], attention_bias=True)),
    "dbrx": ("Dbrx", dict(
        d_model=96, n_heads=4, n_layers=3, max_seq_len=512,
        attn_config=dict(kv_n_heads=2, clip_qkv=1.5, rope_theta=1e4),
        ffn_config=dict(hidden_size=96, ffn_hidden_size=160, moe_num_experts=5, moe_top_k=3))),
    "dbrx-not-normalized": ("Dbrx", dict(
        d_model=96, n_heads=3, n_layers=2, max_seq_len=512,
        attn_config=dict(kv_n_heads=1, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(hidden_size=96, ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2,
                        moe_normalize_expert_weights=None))),
    "gpt-oss": ("GptOss", dict(
        head_dim=32, num_local_experts=5, num_experts_per_tok=2, sliding_window=24,
        rope_parameters=YARN | dict(truncate=False))),
    "gpt-oss-plain": ("GptOss", dict(
        head_dim=64, num_local_experts=4, num_experts_per_tok=3, sliding_window=8,
        num_key_value_heads=1, attention_bias=False, layer_types=["sliding_attention"] * 3,
        rope_parameters=dict(rope_type="default", rope_theta=1e4))),
    "glm4moe": ("Glm4Moe", dict(
        head_dim=32, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=96,
        n_shared_experts=2, routed_scaling_factor=1.7, use_qk_norm=True, attention_bias=True)),
    "glm4moe-plain": ("Glm4Moe", dict(
        head_dim=64, n_routed_experts=4, num_experts_per_tok=3, moe_intermediate_size=64,
        first_k_dense_replace=0, norm_topk_prob=False)),
    "ernie-moe": ("Ernie4_5_Moe", dict(
        moe_num_experts=5, moe_k=2, moe_intermediate_size=96, moe_num_shared_experts=2)),
    "ernie-moe-biases": ("Ernie4_5_Moe", dict(
        moe_num_experts=4, moe_k=3, moe_intermediate_size=64, moe_num_shared_experts=0,
        num_hidden_layers=4, moe_layer_start_index=1, moe_layer_end_index=2,
        moe_layer_interval=2, use_bias=True, tie_word_embeddings=False)),
    "granitemoe": ("GraniteMoe", dict(
        num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=3.5,
        residual_multiplier=0.3, attention_multiplier=0.1, logits_scaling=0.25)),
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
    "ministral": ("Ministral", dict(head_dim=32, sliding_window=24, layer_types=[
        "full_attention", "sliding_attention", "sliding_attention"])),
    "helium": ("Helium", dict(head_dim=24, attention_bias=True)),
    "gpt-j": ("GPTJ", dict(rotary_dim=12, n_inner=168)),
    "opt": ("OPT", dict(ffn_dim=168, word_embed_proj_dim=96)),
    "opt-plain": ("OPT", dict(ffn_dim=168, enable_bias=False, activation_function="gelu",
                              tie_word_embeddings=False)),
    "jais2": ("Jais2", dict(head_dim=32)),
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
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", dict(n_inner=168, tie_word_embeddings=False)),
    "bigcode": ("GPTBigCode", dict(n_inner=168)),
    "bigcode-heads": ("GPTBigCode", dict(multi_query=False, activation_function="gelu")),
    "starcoder2": ("Starcoder2", dict(sliding_window=24, rope_parameters=dict(
        rope_type="default", rope_theta=1e5))),
    "starcoder2-plain": ("Starcoder2", dict(use_bias=False, tie_word_embeddings=False)),
    "phi": ("Phi", dict(partial_rotary_factor=0.25)),
    "phi-norms": ("Phi", dict(qk_layernorm=True, num_key_value_heads=4, hidden_size=144)),
    "stablelm": ("StableLm", dict(use_qkv_bias=True, hidden_size=128)),
    "stablelm-norms": (
        "StableLm", dict(qk_layernorm=True, use_parallel_residual=True, hidden_size=160,
                         partial_rotary_factor=0.5)),
    "neox": ("GPTNeoX", dict(hidden_size=128)),
    "neox-sequential": ("GPTNeoX", dict(
        use_parallel_residual=False, attention_bias=False,
        hidden_act="gelu_fast",
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0,
                             partial_rotary_factor=0.5))),
    "falcon-7b": ("Falcon", dict(ffn_hidden_size=168)),
    "falcon-new": ("Falcon", dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon-one-norm": ("Falcon", dict(
        new_decoder_architecture=True, num_kv_heads=1, num_ln_in_parallel_attn=1,
        tie_word_embeddings=False)),
    "falcon-1b": ("Falcon", dict(multi_query=False, parallel_attn=False, bias=True)),
    "old-yi": ("Yi", dict(rope_theta=5e6)),
    "orion": ("Orion", dict(num_key_value_heads=4)),
    "minicpm": ("MiniCPM", dict(scale_emb=12, scale_depth=1.4, dim_model_base=256,
                                tie_word_embeddings=True)),
    "minicpm-untied": ("MiniCPM", dict(scale_emb=0.7, scale_depth=2.1, dim_model_base=32)),
    "internlm2": ("InternLM2", dict(bias=False, num_attention_heads=8)),
    "internlm2-dynamic": (
        "InternLM2", dict(bias=True, max_position_embeddings=32,
                          rope_scaling=dict(type="dynamic", factor=2.0))),
    "index": ("Index", dict(norm_head=1)),
    "index-plain": ("Index", dict(norm_head=False, num_key_value_heads=1)),
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

# Model type -> its names of `rope_theta` and `partial_rotary_factor` in transformers 4.
OLD_ROPE_KEYS = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}


def make_model(name: str, seed: int, folder: Path, dtype: str = "float32", shards: int = 1,
               **changes):
    """Save a random model with transformers and return it as loaded back, in float32.

    Weights are large enough for every part to matter: norms, biases and soft caps too.
    """
    architecture, changed = MODELS[name]
    if architecture in DEFINITIONS:
        write_defined(architecture, COMMON | changed | changes, seed, folder, dtype, shards)
        return load_model(folder)
    model_class, config = _of_architecture(architecture, COMMON | changed | changes)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.3)
            else:
                value.copy_(torch.randn_like(value) * 1.2 * value.shape[-1] ** -0.5)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(torch.randn_like(value) * 0.3)
    model.to(getattr(torch, dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = "5GB" if shards == 1 else f"{size // shards // 1000 + 1}KB"
    model.save_pretrained(folder, max_shard_size=limit)
    return load_model(folder)


def _of_architecture(architecture: str, values: dict):
    """Return a model's class and its configuration."""
    text, image = IMAGE_MODELS.get(architecture, (architecture, None))
    config = getattr(transformers, CONFIGS.get(text, f"{text}Config"))(**values)
    if image is None:
        name = "GPT2LMHeadModel" if text == "GPT2" else f"{text}ForCausalLM"
        return getattr(transformers, name), config
    whole = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))
    return (
        getattr(transformers, architecture),
        whole(text_config=config.to_dict(), vision_config=image,
              tie_word_embeddings=values.get("tie_word_embeddings", False)),
    )


def load_model(folder: Path):
    """Load a folder in float32 and with plain attention, with transformers or our definition."""
    defined = load_defined(folder)
    if defined is not None:
        return defined
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def to_old_layout(folder: Path) -> None:
    """Rewrite config.json as transformers 4 would have: `rope_theta` and `rope_scaling`."""
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        assert local.pop("rope_type") == "default"
        if local["rope_theta"] != rope["rope_theta"]:
            config["rope_local_base_freq"] = local["rope_theta"]
    theta, part = OLD_ROPE_KEYS.get(
        config["model_type"], ("rope_theta", "partial_rotary_factor")
    )
    config[theta] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config[part] = rope.pop("partial_rotary_factor")
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


def error_of_most_rows(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error of nine tenths of the rows, without those that are furthest off.

    Rounded activations may choose another expert where two are nearly equally good for a row.
    """
    distances = (actual.double() - expected.double()).norm(dim=1)
    nearest = distances.argsort()[: len(distances) * 9 // 10]
    return relative_error(actual[nearest], expected[nearest])


def logits_error(model, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a text's logits, in a mixture that of the median row.

    Where two experts are nearly tied, rounding may send a row or two to the other one.
    """
    if model.config.experts is None:
        return relative_error(actual, expected)
    return float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).median())
