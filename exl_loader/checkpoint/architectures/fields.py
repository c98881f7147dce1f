"""The record of an architecture: its parts, their tensor names and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

# Which layers have the window of the config key `sliding_window`:
#   none        no layer: the key means nothing to this architecture
#   uniform     every layer
#   listed      every layer
#   upper       layers from `max_window_layers` on
#   alternating layers 0, 2, 4, ...
#   lower       of these the layers before `max_window_layers`
#   pattern     all but every n-th layer, n is the config key `sliding_window_pattern`
#   unrotated   layers without RoPE
# All but `uniform` are only the defaults of an explicit `layer_types` list. Where
# `use_sliding_window` is one of the architecture's keys, it must be set.
SlidingWindowRule = Literal[
    "none", "uniform", "listed", "upper", "alternating", "lower", "pattern", "unrotated"
]

# Which layers have RoPE:
#   all             every layer
#   sliding         layers with a sliding window
#   sliding or all  layers with a sliding window; every layer where no layer has a window
#   listed          layers that the config key `no_rope_layers` has a 1 for; without it, all but
#                   every n-th layer, n is the config key `no_rope_layer_interval`
RopeRule = Literal["all", "sliding", "sliding or all", "listed"]

# How a factor is computed from config keys.
Formula = Literal[
    "1",
    "attention_multiplier",
    "dim_model_base / hidden_size",
    "embedding_multiplier",
    "logit_scale",
    "1 / logits_scaling",
    "query_pre_attn_scalar ** -0.5",
    "residual_multiplier",
    "scale_depth / num_hidden_layers ** 0.5",
    "scale_emb",
    "hidden_size ** 0.5",
    "head_dim ** -0.5",
]

# Hugging Face's activation names, as `Ops.gate` and `Ops.activate` call them.
ACTIVATIONS = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
        "quick_gelu": "quick_gelu",
    }
)


@dataclass(frozen=True)
class QkNorms:
    """Norms of queries and keys, before RoPE. They are of the same kind as the layers' norms.

    Args:
        q, k: names in a layer.
        weights: `head`, one weight [head_dim] for every head; `heads`, a weight of its own for
            each head, [heads, head_dim]; `head tensors`, the same as a tensor `{q}.norms.N.weight`
            for each head; `projection`, one norm over all heads together.
        bias: whether they have a bias.
        key: config key that must be set for them to be there; None where they always are.
    """

    q: str = "self_attn.q_norm"
    k: str = "self_attn.k_norm"
    weights: Literal["head", "heads", "head tensors", "projection"] = "head"
    bias: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Norms:
    """The norms of an architecture. Names are relative to a layer; None where a norm is absent.

    Args:
        kind: `rms`, or `layer` for LayerNorm.
        bias: whether every LayerNorm has a bias.
        offset: added to every weight (Gemma stores weight - 1).
        attn_input, mlp_input: in front of the blocks.
        attn_output, mlp_output: on what the blocks add.
        parallel: the input norms where attention and MLP run side by side: one that both share,
            or attention's and the MLP's. Of several alternatives a model has the first whose
            tensors are in its checkpoint.
        qk: of queries and keys.
    """

    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0
    attn_input: str | None = "input_layernorm"
    attn_output: str | None = None
    mlp_input: str | None = "post_attention_layernorm"
    mlp_output: str | None = None
    parallel: tuple[tuple[str, ...], ...] = (("input_layernorm",),)
    qk: QkNorms | None = None

    def names(self) -> set[str]:
        """Return the name of every norm in a layer."""
        blocks = (self.attn_input, self.attn_output, self.mlp_input, self.mlp_output)
        names = {name for name in blocks if name is not None}
        names.update(*self.parallel)
        return names | ({self.qk.q, self.qk.k} if self.qk is not None else set())


@dataclass(frozen=True)
class Positions:
    """How positions enter the forward pass: by RoPE, or as a second embedding.

    Args:
        learned: name of the table of learned positions, in place of RoPE; None for RoPE.
        learned_offset: rows of that table in front of position 0.
        interleaved: RoPE turns elements 2 * i and 2 * i + 1 of a head together (GLM, Cohere).
        layers: which layers have RoPE.
        local_theta: config key of `rope_theta` of layers with a sliding window, which have a
            RoPE of their own without scaling; None where all layers have the same.
        type_names: other names of RoPE schemes -> the names in `rope.ROPE_TYPES`.
    """

    learned: str | None = None
    learned_offset: int = 0
    interleaved: bool = False
    layers: RopeRule = "all"
    local_theta: str | None = None
    type_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Factors:
    """Constant factors of the forward pass.

    Args:
        embedding: on embeddings.
        residual: on what a block adds to the hidden state.
        attention: on the scores of attention, before the soft cap.
        logits: on logits, before the soft cap.
    """

    embedding: Formula = "1"
    residual: Formula = "1"
    attention: Formula = "head_dim ** -0.5"
    logits: Formula = "1"


@dataclass(frozen=True)
class FusedExperts:
    """Tensors that hold the weights of all experts of a layer, the first expert first.

    Names are in a layer, without `.weight`. Expert N may have tensors of its own instead:
    `{gate}.N`, `{up}.N` and `{down}.N`, in any format.

    Args:
        gate, up: [experts, rows, hidden_size] or [experts * rows, hidden_size]. Where both are
            one tensor, an expert's gate rows precede its up rows.
        down: [experts, hidden_size, width] or [experts * hidden_size, width].
        is_transposed: gate and up are [experts, hidden_size, rows].
        down_is_transposed: down is [experts, width, hidden_size] or
            [experts * width, hidden_size].
        is_alternating: gate and up are one tensor, in which each gate row precedes its up row.
    """

    gate: str
    up: str
    down: str
    is_transposed: bool = False
    down_is_transposed: bool = False
    is_alternating: bool = False


@dataclass(frozen=True)
class Mixture:
    """The mixtures of experts in place of MLPs.

    Args:
        router, experts: names in a layer; expert N is `{experts}.N`.
        gate, up, down: the linear layers of an expert.
        fused: the tensors that have them where they are not apart; None where they always are.
        width: config key of an expert's width.
        activation: of the experts, as `Ops.gate` takes it; None for that of the config.
        score: what the router makes of its logits.
        correction: name of the tensor that is added to the scores of experts where they are
            chosen; None without one.
        normalize: whether the weights of the chosen experts sum up to 1: always or never, or
            where the named config key is true or 1.
        factor: config key of the factor on the weights; None for 1.
        shared: name of the shared expert, which every row runs through; None without one.
        shared_width: config key of its width.
        shared_count: config key of the number of experts that it consists of; None for one.
        shared_gate: name of the linear layer whose sigmoid weighs the shared expert; None for 1.
        dense_layers: layers with an ordinary MLP: `none`; `listed`, those in `mlp_only_layers`
            and all but every `decoder_sparse_step`-th; `first`, the `first_k_dense_replace` first;
            `outside`, all but every `moe_layer_interval`-th, and those before
            `moe_layer_start_index` or after `moe_layer_end_index` (-1 is the last layer).
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: FusedExperts | None = None
    width: str = "intermediate_size"
    activation: str | None = None
    score: Literal["softmax", "sigmoid"] = "softmax"
    correction: str | None = None
    normalize: bool | str = True
    factor: str | None = None
    shared: str | None = None
    shared_width: str = "intermediate_size"
    shared_count: str | None = None
    shared_gate: str | None = None
    dense_layers: Literal["none", "listed", "first", "outside"] = "none"


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart: its parts, their tensor names and its numbers.

    Args:
        name: Hugging Face class name, as in `architectures` of `config.json`.
        model_type: `model_type` of `config.json`, for folders without `architectures`.
        defaults: values of config keys that a folder may leave out, under the usual names. A key
            that stands in the folder as null is not left out.
        keys: usual name of a config key -> this architecture's name of it, or several, of which
            the first that a config has counts.
        sections: config keys of objects whose keys count as the config's own.
        fixed: config keys -> the value that they must have where they are there, because no part
            computes what another value asks for.
        renames: pairs that turn the tensor names of a checkpoint into the names below, one after
            the other: (text, replacement). A text that begins with a dot is replaced wherever it
            is, another one at the beginning of a name. EXL2 folders have the names below.
        embedding, layers, final_norm, head: where a model's tensors are; layer N's names begin
            with `{layers}.N.`, and all names below are relative to that.
        q_proj, k_proj, v_proj, o_proj: attention's linear layers.
        gate_proj, up_proj, down_proj: the MLP's linear layers; without a gate_proj it is
            down(activation(up(x))).
        default_width: `intermediate_size` in multiples of `hidden_size`, for folders without it;
            None where it must be there.
        sinks: name of attention's sinks, a logit of each head; None where it has none.
        experts: mixtures of experts that replace the MLP; None where dense.
        norms: what is normalised, and how.
        positions: RoPE, or learned positions.
        factors: constant factors.
        parallel: whether attention and MLP run side by side on the same hidden state: always
            (True), or where the named config key is set.
        fused: source tensor -> the linear layers whose output rows it holds, in order.
        fused_by_group: the fused q, k and v are [kv_heads, (queries, key, value), head_dim]: the
            rows of each key/value head and its queries are together.
        transposed: unquantised weights are [in_features, out_features].
        biases: which linear layers (also `head`) have a bias: always (True), or where the named
            config key is set. Others have one only if the checkpoint brings one.
        old_names: name in a layer -> its name in older checkpoints.
        sliding_window: which layers have the window of that config key.
        further_layers: config key of the number of layers after the last one that predict later
            tokens. They are not loaded. None where there are none.
        multi_query: config key that is set where all queries share one key/value head, whatever
            their number in the config is, unless `new_decoder_architecture` is set as well; None
            where there is no such key.
        clip_qkv: whether queries, keys and values are clipped to the config key of that name.
        unit_head: config key that is set where every row of an unquantised head is divided by its
            length when it is read. A quantised head was divided before. None where there is no
            such key.
    """

    name: str
    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    gate_proj: str | None = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    default_width: int | None = None
    sinks: str | None = None
    experts: Mixture | None = None
    norms: Norms = Norms()
    positions: Positions = Positions()
    factors: Factors = Factors()
    parallel: bool | str = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_group: bool = False
    transposed: bool = False
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    old_names: Mapping[str, str] = field(default_factory=dict)
    sliding_window: SlidingWindowRule = "none"
    further_layers: str | None = None
    multi_query: str | None = None
    clip_qkv: bool = False
    unit_head: str | None = None

    def renamed(self, name: str) -> str:
        """Return the name of a checkpoint's tensor as the other fields have it."""
        for text, replacement in self.renames:
            if text.startswith("."):
                name = name.replace(text, replacement)
            elif name.startswith(text):
                name = replacement + name[len(text) :]
        return name

    def renamed_module(self, name: str) -> str:
        """Return the name of a module, which is that of its tensors without their last part."""
        return self.renamed(f"{name}.").removesuffix(".")

    def own_keys(self) -> set[str]:
        """Return the config keys of which this architecture makes use, as it names them.

        Only keys that not every architecture has in common.
        """
        factors = (self.factors.embedding, self.factors.residual, self.factors.attention,
                   self.factors.logits)
        words = {word for formula in factors for word in formula.split()}
        found = {*self.defaults, *self.fixed, *words}
        for names in self.keys.values():
            found.update((names,) if isinstance(names, str) else names)
        if isinstance(self.parallel, str):
            found.add(self.parallel)
        if self.norms.qk is not None and self.norms.qk.key is not None:
            found.add(self.norms.qk.key)
        if self.clip_qkv:
            found.add("clip_qkv")
        if self.unit_head is not None:
            found.add(self.unit_head)
        if self.positions.layers == "listed":
            found.add("no_rope_layers")
        return found
