"""The names and sizes of a Llama's linear layers."""

from __future__ import annotations


def layer_linears(config: dict) -> list[tuple[str, int, int]]:
    """List the linear layers of one decoder layer.

    Args:
        config: the model's config with Hugging Face's names, `head_dim` included.

    Returns:
        (name within the layer, in_features, out_features) of each.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_len = config["num_attention_heads"] * config["head_dim"]
    kv_len = config["num_key_value_heads"] * config["head_dim"]
    return [
        ("self_attn.q_proj", hidden, q_len),
        ("self_attn.k_proj", hidden, kv_len),
        ("self_attn.v_proj", hidden, kv_len),
        ("self_attn.o_proj", q_len, hidden),
        ("mlp.gate_proj", hidden, inner),
        ("mlp.up_proj", hidden, inner),
        ("mlp.down_proj", inner, hidden),
    ]
