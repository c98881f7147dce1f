"""The matrices of a block by their roles: those of a role are stored with the same mix.

Roles and keys are exllamav2's, so that its measurements name the same things.
"""

from __future__ import annotations

from ..model.decoder import DecoderLayer, ParallelLayer
from ..model.parts.attention import Attention
from ..model.parts.experts import Experts
from ..model.parts.linear import Linear
from ..model.parts.mlp import Mlp, PlainMlp
from ..model.parts.part import Block

Roles = dict[str, list[Linear]]


def block_roles(block: Block) -> Roles:
    """Return role -> the linear layers of a block that a conversion quantises.

    All experts of a mixture share their roles. Its shared expert has roles of its own.
    """
    if isinstance(block, Attention):
        return {
            "q_proj": [block.q], "k_proj": [block.k], "v_proj": [block.v], "o_proj": [block.o]
        }
    if isinstance(block, Experts):
        roles = {
            "w1": [expert.gate for expert in block.experts],
            "w3": [expert.up for expert in block.experts],
            "w2": [expert.down for expert in block.experts],
        }
        if block.shared is not None:
            shared = block_roles(block.shared)
            roles |= {f"shared_{role}": linears for role, linears in shared.items()}
        return roles
    if isinstance(block, Mlp):
        return {"gate_proj": [block.gate], "up_proj": [block.up], "down_proj": [block.down]}
    assert isinstance(block, PlainMlp)
    return {"up_proj": [block.up], "down_proj": [block.down]}


def layer_blocks(index: int, layer: DecoderLayer) -> dict[str, Block]:
    """Return key -> attention and MLP of a layer.

    A key is that of exllamav2's measurement. Of a layer that runs both on the same input it has
    two parts, joined by a slash: the entry of the layer, and the block within it.
    """
    # `model.layers.3.self_attn.q_proj` begins with the layer's own name.
    number = f".{index}."
    prefix = layer.attention.q.name.partition(number)[0] + number.rstrip(".")
    if isinstance(layer, ParallelLayer):
        attention, mlp = "parallel_decoder/attn", "parallel_decoder/mlp"
    else:
        attention = "self_attn"
        mlp = "block_sparse_moe" if isinstance(layer.mlp, Experts) else "mlp"
    return {f"{prefix}.{attention}": layer.attention, f"{prefix}.{mlp}": layer.mlp}
