"""From config and checkpoint headers to the parts of a model.

Reservation, loader, forward pass and converter all use the same parts. No weight is read here and
PyTorch is not imported. Only this module, `adapters` and `checkpoint` know `Architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..backends.base import AttentionShape, Routing
from ..checkpoint.architectures import ARCHITECTURES
from ..checkpoint.architectures.fields import FusedExperts, Mixture, QkNorms
from ..formats import LINEAR_TENSORS, check_fused, has_linear, linear_spec
from ..formats.common import FLOAT_DTYPES, WRONG_FILE, expect
from ..formats.layer import RowRanges
from ..utils.errors import InvalidCheckpoint, UnsupportedFormat, shown_names
from ..utils.output import warn_once
from ..utils.table import MAIN_MEMORY, DeviceMap, TensorSpec
from .assembly import ModelParts
from .decoder import DecoderLayer, Layer, ParallelLayer
from .parts.attention import Attention
from .parts.embedding import Embedding
from .parts.experts import Experts
from .parts.head import Head
from .parts.linear import Linear
from .parts.mlp import Mlp, PlainMlp
from .parts.norm import Norm
from .parts.part import Block
from .parts.positions import LearnedPositions
from .parts.rope import Rope
from .parts.vector import Vector

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..checkpoint.config import ExpertsConfig, ModelConfig

# Weights of a low-rank adapter, as PEFT and GPTQModel name them.
_ADAPTER = re.compile(r"\.lora_[ab](\.|$)", re.IGNORECASE)
# Tensors of old folders that follow from the config.
_COMPUTED_ANEW = (".rotary_emb.inv_freq", ".attn.bias", ".attention.bias", ".masked_bias")

# How the names of tensors begin that a model reads images with.
_IMAGE_PARTS = tuple(
    prefix + name for prefix in ("", "model.")
    for name in ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.",
                 "vision_encoder.", "vision_language_adapter.", "patch_merger.")
)


def build_parts(
    config: ModelConfig, checkpoint: Checkpoint, device_map: DeviceMap | None = None
) -> ModelParts:
    """Make a model's parts from its config and the headers of its weight files.

    Tensors that no part asks for are ignored with a warning, those that every loader computes
    anew (`rotary_emb.inv_freq` of old folders) without. A norm too many means that the config is
    another model's, and an adapter changes the output. A part of a model's layers cannot tell
    which tensors nobody asks for; the whole model, from which every plan starts, can.

    Args:
        device_map: where the parts are, of which it may have a part; the CPU where None.

    Raises:
        InvalidCheckpoint: a tensor is missing, or has a shape or dtype that the config does not
            allow, or there are layers or norms that it knows nothing of.
        UnsupportedFormat: a layer is stored in a way this engine does not read, or has an
            adapter beside it.
    """
    devices = device_map or DeviceMap.single(MAIN_MEMORY, config.num_hidden_layers)
    assert 0 < len(devices.layers) and devices.numbers.stop <= config.num_hidden_layers
    assert (devices.embed is not None) == (devices.head is not None) == (not devices.first_layer)
    builder = Builder(config, checkpoint)
    embedding = positions = head = None
    # The embedding first: its shape is the plainest sign of a config of another model.
    if devices.embed is not None and devices.head is not None:
        embedding = builder.embedding(devices.embed, devices.layers[0])
        head = builder.head(devices.head)
        positions = builder.positions(devices.layers[0])
        if builder.is_tied(head) and devices.layers[0] == devices.head:
            embedding.head = head.linear
    on_devices = zip(devices.numbers, devices.layers, strict=True)
    parts = ModelParts(
        config=config,
        device_map=devices,
        embedding=embedding,
        positions=positions,
        layers=tuple(builder.layer(number, device) for number, device in on_devices),
        head=head,
    )
    if len(parts.layers) == config.num_hidden_layers:
        _judge_unused(parts, checkpoint)
    return parts


def fused_rows(config: ModelConfig, widths: Mapping[str, int], name: str) -> RowRanges:
    """Return the output rows of a linear layer in a fused tensor.

    Args:
        widths: name -> out_features of the layers in the tensor, in its order.
        name: the layer.
    """
    # q, k and v of a key/value head may follow each other, and then those of the next.
    names = ARCHITECTURES[config.architecture]
    by_group = names.fused_by_group and names.q_proj in widths
    parts = config.num_key_value_heads if by_group else 1
    first = 0
    for other in widths:
        if other == name:
            break
        first += widths[other] // parts
    width, step = widths[name] // parts, sum(widths.values()) // parts
    starts = range(first, first + parts * step, step)
    return tuple(range(start, start + width) for start in starts)


class Builder:
    """Makes a model's parts one by one."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._architecture = ARCHITECTURES[config.architecture]
        interleaved = self._architecture.positions.interleaved
        self._ropes = [Rope(rope, interleaved, index) for index, rope in enumerate(config.ropes)]

    def embedding(self, device: str, reader: str) -> Embedding:
        """Make the embedding, with a table of its own.

        Args:
            device: the device whose memory it is in.
            reader: the first layer's device.
        """
        config, name = self._config, f"{self._architecture.embedding}.weight"
        shape = (config.vocab_size, config.hidden_size)
        spec = TensorSpec(name, "weights", self._dtype(name, shape), shape, device)
        if reader != device:
            spec = replace(spec, segment="embedding", read_by=reader)
        return Embedding(spec, config.embedding_multiplier)

    def positions(self, device: str) -> LearnedPositions | None:
        """Make the table of learned positions."""
        config, positions = self._config, self._architecture.positions
        if positions.learned is None:
            return None
        name, offset = f"{positions.learned}.weight", positions.learned_offset
        count, hidden_size = config.learned_positions, config.hidden_size
        dtype = self._dtype(name, (offset + count, hidden_size))
        spec = TensorSpec(name, "weights", dtype, (count, hidden_size), device)
        return LearnedPositions(spec, offset)

    def head(self, device: str) -> Head:
        """Make final norm and output head; a head of its own wins over a tied one.

        Raises:
            UnsupportedFormat: the head has a bias, and the model a factor on logits.
        """
        config, names = self._config, self._architecture
        tied = config.tie_word_embeddings and not has_linear(self._checkpoint, names.head)
        linear = self._linear(
            names.head, config.hidden_size, config.vocab_size, device,
            bias=self._required_bias(names.head),
            source=names.embedding if tied else None,
        )
        if linear.has_bias and config.logits_multiplier != 1:
            raise UnsupportedFormat(
                f"{names.head}.bias", expected="a head without a bias, because the factor on "
                f"logits of {config.architecture} is part of the final norm",
                remedy=WRONG_FILE,
            )
        norm = self._norm(
            names.final_norm, config.hidden_size, device, factor=config.logits_multiplier
        )
        return Head(norm, linear, config.final_logit_softcapping)

    def is_tied(self, head: Head) -> bool:
        """Tell whether the head is the embedding's tensor, value for value."""
        is_same = not self._config.has_unit_head
        return is_same and head.linear.spec.source == self._architecture.embedding

    def layer(self, index: int, device: str) -> DecoderLayer:
        """Make a decoder layer."""
        config, norms = self._config, self._architecture.norms
        prefix = f"{self._architecture.layers}.{index}."
        attention, mlp = self._attention(index, prefix, device), self._block(index, prefix, device)

        def norm(name: str | None) -> Norm | None:
            return None if name is None else self._norm(prefix + name, config.hidden_size, device)

        if config.is_parallel:
            attn_input, *mlp_input = self._parallel_norms(prefix)
            return ParallelLayer(
                device, attention, mlp, norm(attn_input), norm(mlp_input[0] if mlp_input else None)
            )
        return Layer(
            device, attention, mlp, norm(norms.attn_input), norm(norms.attn_output),
            norm(norms.mlp_input), norm(norms.mlp_output), config.residual_multiplier,
        )

    def _parallel_norms(self, prefix: str) -> tuple[str, ...]:
        """Return the input norms of a parallel layer: the first alternative that is there."""
        alternatives = self._architecture.norms.parallel
        headers = self._checkpoint.headers
        there = (
            names for names in alternatives
            if all(f"{prefix}{name}.weight" in headers for name in names)
        )
        return next(there, alternatives[-1])

    def _attention(self, index: int, prefix: str, device: str) -> Attention:
        config, names = self._config, self._architecture
        hidden_size, head_dim = config.hidden_size, config.head_dim
        q_size = config.num_attention_heads * head_dim
        kv_size = config.num_key_value_heads * head_dim
        sizes = {
            names.q_proj: (hidden_size, q_size),
            names.k_proj: (hidden_size, kv_size),
            names.v_proj: (hidden_size, kv_size),
            names.o_proj: (q_size, hidden_size),
        }
        q, k, v, o = (self._projection(prefix, name, sizes, device) for name in sizes)

        q_norm = k_norm = None
        if names.norms.qk is not None and config.has_qk_norms:
            qk = names.norms.qk
            q_norm = self._qk_norm(qk, prefix + qk.q, config.num_attention_heads, device)
            k_norm = self._qk_norm(qk, prefix + qk.k, config.num_key_value_heads, device)
        shape = AttentionShape(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=config.attention_multiplier,
            softcap=config.attn_logit_softcapping,
            sliding_window=config.layer_sliding_windows[index],
        )
        own = config.layer_ropes[index]
        rope = None if own is None else self._ropes[own]
        sinks = None
        if names.sinks is not None:
            sinks = self._vector(prefix + names.sinks, config.num_attention_heads, device)
        return Attention(q, k, v, o, q_norm, k_norm, shape, rope, config.clip_qkv, sinks)

    def _qk_norm(self, qk: QkNorms, name: str, num_heads: int, device: str) -> Norm:
        """Make the norm of the queries or the keys."""
        head_dim = self._config.head_dim
        if qk.weights == "projection":
            return self._norm(name, num_heads * head_dim, device, bias=qk.bias)
        if qk.weights == "head":
            return self._norm(name, head_dim, device, bias=qk.bias)
        tensors: tuple[str, ...] = ()
        if qk.weights == "head tensors":
            tensors = tuple(f"{name}.norms.{head}.weight" for head in range(num_heads))
        return self._norm(name, head_dim, device, bias=qk.bias, heads=num_heads, tensors=tensors)

    def _block(self, index: int, prefix: str, device: str) -> Block:
        """Make a layer's MLP, or its mixture of experts."""
        names, experts = self._architecture.experts, self._config.experts
        if names is None or experts is None or index in experts.dense_layers:
            return self._mlp(prefix, device)
        return self._experts(names, experts, prefix, device)

    def _mlp(self, prefix: str, device: str) -> Block:
        names, hidden_size = self._architecture, self._config.hidden_size
        size, activation = self._config.intermediate_size, self._config.hidden_act
        sizes = {names.up_proj: (hidden_size, size), names.down_proj: (size, hidden_size)}
        if names.gate_proj is None:
            up, down = (self._projection(prefix, name, sizes, device) for name in sizes)
            return PlainMlp(up, down, activation)
        sizes = {names.gate_proj: (hidden_size, size), **sizes}
        gate, up, down = (self._projection(prefix, name, sizes, device) for name in sizes)
        return Mlp(gate, up, down, activation)

    def _experts(self, names: Mixture, config: ExpertsConfig, prefix: str, device: str) -> Experts:
        hidden_size = self._config.hidden_size

        def expert(name: str, size: int) -> Mlp:
            bias = self._required_bias(names.experts)
            return Mlp(
                self._linear(f"{name}.{names.gate}", hidden_size, size, device, bias),
                self._linear(f"{name}.{names.up}", hidden_size, size, device, bias),
                self._linear(f"{name}.{names.down}", size, hidden_size, device, bias),
                names.activation or self._config.hidden_act,
            )

        fused = names.fused
        if fused is not None and self._has_fused_experts(prefix + fused.down):
            experts = tuple(
                self._fused_expert(names, fused, index, config.intermediate_size, prefix, device)
                for index in range(config.count)
            )
        else:
            experts = tuple(
                expert(f"{prefix}{names.experts}.{index}", config.intermediate_size)
                for index in range(config.count)
            )
            if fused is not None and fused.is_alternating:
                _refuse_halves(experts[0].gate, fused)
        router = self._linear(prefix + names.router, hidden_size, config.count, device,
                              self._required_bias(names.router))
        correction = None
        if names.correction is not None:
            correction = self._vector(prefix + names.correction, config.count, device)
        shared = shared_gate = None
        if names.shared is not None and config.shared_size:
            shared = expert(prefix + names.shared, config.shared_size)
            if names.shared_gate is not None:
                shared_gate = self._linear(prefix + names.shared_gate, hidden_size, 1, device)
        # The residual factor is in the weights of a row's experts. A shared expert has no weight.
        assert shared is None or self._config.residual_multiplier == 1
        factor = config.factor * self._config.residual_multiplier
        routing = Routing(config.top_k, names.score, config.normalize, factor)
        return Experts(router, experts, routing, shared, shared_gate, correction)

    def _has_fused_experts(self, down: str) -> bool:
        """Tell whether the experts are in the tensors of `FusedExperts`, by its `down`."""
        return any(has_linear(self._checkpoint, name) for name in (down, f"{down}.0"))

    def _fused_expert(self, names: Mixture, fused: FusedExperts, index: int, size: int,
                      prefix: str, device: str) -> Mlp:
        """Make one expert out of tensors that have all experts of a layer."""
        name, hidden_size = f"{prefix}{names.experts}.{index}", self._config.hidden_size
        is_own = has_linear(self._checkpoint, f"{prefix}{fused.down}.{index}")
        bias = self._required_bias(names.experts)

        def linear(part: str, in_features: int, source: str, rows: range, stored: int,
                   transposed: bool) -> Linear:
            # `rows` are those among the expert's `stored` rows of the source.
            source, expert = prefix + source, None
            if is_own:
                source = f"{source}.{index}"
            elif transposed:
                expert = index
            else:
                above = index * stored
                rows = range(above + rows.start, above + rows.stop, rows.step)
            return self._linear(f"{name}.{part}", in_features, len(rows), device, bias,
                                source=source, rows=(rows,), expert=expert)

        gate, up, stored = range(size), range(size), size
        if fused.is_alternating:
            gate, up, stored = range(0, 2 * size, 2), range(1, 2 * size, 2), 2 * size
        elif fused.gate == fused.up:
            up, stored = range(size, 2 * size), 2 * size
        return Mlp(
            linear(names.gate, hidden_size, fused.gate, gate, stored, fused.is_transposed),
            linear(names.up, hidden_size, fused.up, up, stored, fused.is_transposed),
            linear(names.down, size, fused.down, range(hidden_size), hidden_size,
                   fused.down_is_transposed),
            names.activation or self._config.hidden_act,
        )

    def _required_bias(self, name: str) -> bool | None:
        """Return `bias` of `linear_spec`: one that need not be there is used where it is.

        GPTQ folders of some converters have a bias (of zeros) for every layer.
        """
        return True if name in self._config.required_biases else None

    def _vector(self, name: str, size: int, device: str) -> Vector:
        """Make a vector of `size` elements."""
        # Ernie's is [1, size].
        leading = (1,) * (len(self._checkpoint.header(name).shape) - 1)
        self._dtype(name, (*leading, size))
        return Vector(TensorSpec(name, "weights", "float32", (size,), device))

    def _norm(self, name: str, size: int, device: str, *, factor: float = 1.0,
              bias: bool | None = None, heads: int = 0, tensors: tuple[str, ...] = ()) -> Norm:
        """Make a norm of rows of `size` elements.

        Args:
            factor: see `Norm`.
            bias: whether it has one; None for what the architecture's norms have.
            heads: number of weights, one for each head; 0 for one for all rows.
            tensors: the tensors of the heads' weights, where each has its own.
        """
        norms = self._architecture.norms
        name = self._stored(name)
        shape = (heads, size) if heads else (size,)
        if tensors:
            for tensor in tensors:
                self._dtype(tensor, (size,))
        else:
            self._dtype(f"{name}.weight", shape)
        bias_spec = None
        if norms.bias if bias is None else bias:
            self._dtype(f"{name}.bias", shape)
            bias_spec = TensorSpec(f"{name}.bias", "weights", "float32", shape, device)
        spec = TensorSpec(f"{name}.weight", "weights", "float32", shape, device)
        return Norm(spec, self._config.norm_eps, norms.kind, norms.offset, factor, bias_spec,
                    tensors)

    def _stored(self, name: str) -> str:
        """Return a layer's part by its older name, where the checkpoint has that instead."""
        if not has_linear(self._checkpoint, name):
            for usual, old in self._architecture.old_names.items():
                old_name = f"{name.removesuffix(usual)}{old}"
                if name.endswith(f".{usual}") and has_linear(self._checkpoint, old_name):
                    return old_name
        return name

    def _dtype(self, name: str, shape: tuple[int, ...]) -> str:
        """Check that a float tensor of this shape is there, and return its dtype."""
        header = self._checkpoint.header(name)
        expect(header, FLOAT_DTYPES, shape)
        return header.dtype

    def _projection(self, prefix: str, name: str, sizes: dict[str, tuple[int, int]],
                    device: str) -> Linear:
        """Make one of a block's linear layers, from a fused source tensor where it is in one.

        Args:
            sizes: name -> (in_features, out_features) of all the block's linear layers.
        """
        in_features, out_features = sizes[name]
        bias = self._required_bias(name)
        if not has_linear(self._checkpoint, prefix + name):
            for source, fused in self._architecture.fused.items():
                if name not in fused or not has_linear(self._checkpoint, prefix + source):
                    continue
                widths = {other: sizes[other][1] for other in fused}
                rows = fused_rows(self._config, widths, name)
                linear = self._linear(
                    prefix + name, in_features, out_features, device, bias,
                    source=prefix + source, rows=rows,
                )
                check_fused(self._checkpoint, prefix + source, sum(widths.values()),
                            self._architecture.transposed)
                return linear
        return self._linear(
            prefix + name, in_features, out_features, device, bias,
            source=self._stored(prefix + name),
        )

    def _linear(self, name: str, in_features: int, out_features: int, device: str,
                bias: bool | None = None, source: str | None = None,
                rows: RowRanges | None = None, expert: int | None = None) -> Linear:
        # A tied head has the layout of the embedding.
        is_head = name == self._architecture.head
        spec = linear_spec(self._checkpoint, name, in_features, out_features, source=source,
                           rows=rows, bias=bias,
                           transposed=expert is not None
                           or (self._architecture.transposed and not is_head),
                           unit_rows=self._config.has_unit_head and is_head, expert=expert)
        return Linear(spec, device)


def _refuse_halves(gate: Linear, fused: FusedExperts) -> None:
    """Refuse GPTQ experts whose gate and up are something else than their names say.

    auto-round and GPTQModel since 2026 cut the tensor of alternating gate and up rows in halves,
    and call these gate_proj and up_proj (ModelCloud/Defuser, test_gpt_oss). Neither half has the
    gate rows only, which one quantised layer would have to bring together.

    Raises:
        UnsupportedFormat: `gate` is a GPTQ layer.
    """
    if gate.spec.format == "gptq":
        raise UnsupportedFormat(
            f"{gate.spec.source}: half of the gate rows and half of the up rows, as auto-round "
            "and newer versions of GPTQModel store them",
            expected=f"all of an expert's gate and up rows in one layer ({fused.gate}.N)",
            remedy="Use an EXL2 or bfloat16 version of the model, or a GPTQ version with such "
            "layers",
        )


def _judge_unused(parts: ModelParts, checkpoint: Checkpoint) -> None:
    """Refuse or warn about tensors that no part asks for."""
    config = parts.config
    names = ARCHITECTURES[config.architecture]
    layers = f"{names.layers}."
    # What ends so in a layer is a norm, of this architecture or of another.
    norm_endings = ("norm.weight", *(f".{norm}.weight" for norm in names.norms.names()))
    norms = {tensor for norm in parts.norms() for tensor in norm.tensors}
    vectors = {vector.spec.name for vector in parts.vectors()}
    sources = {linear.spec.source for linear in parts.linears()}
    embedding, _ = parts.ends
    sources.add(embedding.spec.name.removesuffix(".weight"))
    if parts.positions is not None:
        sources.add(parts.positions.spec.name.removesuffix(".weight"))
    first, unused = config.num_hidden_layers, []
    further = tuple(f"{layers}{first + i}." for i in range(config.further_layers))
    for name, header in checkpoint.headers.items():
        source, _, last = name.rpartition(".")
        if name.startswith(further):
            continue
        if name.startswith(layers) and name.endswith(norm_endings) and name not in norms:
            raise InvalidCheckpoint(
                header.name,
                expected=f"only what config.json's {config.architecture} of "
                f"{config.num_hidden_layers} layers has",
                actual="one norm more",
                remedy=WRONG_FILE,
            )
        if _ADAPTER.search(name):
            raise UnsupportedFormat(
                f"{header.name}: an adapter beside the weights",
                expected="weights that the adapter was merged into",
                remedy="Merge it, or use a version of the model without it",
            )
        used = name in vectors or (last in LINEAR_TENSORS and source in sources)
        if not used and name not in norms and not header.name.endswith(_COMPUTED_ANEW):
            unused.append(header.name)
    if config.multimodal_class:
        of_images = [name for name in unused if name.startswith(_IMAGE_PARTS)]
        warn_once(
            f"{checkpoint.model_dir}: {config.multimodal_class} runs without images: only its "
            f"language part is loaded, and {len(of_images)} tensors of its other parts are not"
        )
        unused = [name for name in unused if name not in of_images]
    if any(name.startswith(further) for name in checkpoint.headers):
        warn_once(
            f"{checkpoint.model_dir}: further layers, which predict later tokens, are not loaded "
            f"(num_hidden_layers is {config.num_hidden_layers})"
        )
    if unused:
        warn_once(
            f"{checkpoint.model_dir}: these tensors are ignored, because "
            f"{config.architecture} has no use for them: "
            f"{shown_names(sorted(unused))}"
        )
