"""Small random model folders, written with safetensors and tokenizers alone."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a dense Llama with this config has."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_len = config["num_attention_heads"] * config["head_dim"]
    kv_len = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q_len, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv_len, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv_len, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q_len),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer: 3 special tokens, then one token a byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    assert len(vocab) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_model(
    folder: Path, *, seed: int = 0, shards: int = 1, tokenizer: bool = True, **config
) -> Path:
    """Write a random Llama in float16, in `shards` files, and return its folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = CONFIG | config
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        scale = shape[-1] ** -0.5
        values = torch.randn(shape, generator=generator) * scale
        tensors[name] = (values + 1 if len(shape) == 1 else values).to(torch.float16)
    names = list(tensors)
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return folder


# A chat template of plain text, for models of tests.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def give_chat_template(folder: Path) -> Path:
    """Give a model's folder a chat template; return the folder."""
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder
