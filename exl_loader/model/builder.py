"""From config and checkpoint headers to the parts of a model.

Reservation, loader, forward pass and converter all use the same parts. No weight is read here and
PyTorch is not imported. Only this module and `checkpoint` know `Architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from ..backends import backend_of
from ..backends.base import AttentionShape, Routing
from ..checkpoint.architectures import ARCHITECTURES, ExpertNames
from ..formats import LINEAR_TENSORS, has_linear, linear_spec
from ..formats.common import FLOAT_DTYPES, WRONG_FILE, expect
from ..utils.errors import InvalidCheckpoint, UnsupportedFormat, shown_names
from ..utils.integers import round_up
from ..utils.output import warn_once
from ..utils.table import MAIN_MEMORY, DeviceMap, TensorSpec
from .decoder import Layer
from .parts.attention import Attention
from .parts.embedding import Embedding
from .parts.experts import Experts
from .parts.head import Head
from .parts.linear import Linear
from .parts.mlp import Mlp
from .parts.norm import Norm
from .parts.part import Loading
from .parts.rope import Rope

if TYPE_CHECKING:
    import torch

    from ..backends.base import DeviceOps
    from ..checkpoint import Checkpoint
    from ..checkpoint.config import ModelConfig

# Weights of a low-rank adapter, as PEFT and GPTQModel name them.
_ADAPTER = re.compile(r"\.lora_[ab](\.|$)", re.IGNORECASE)
# Tensors of old folders that follow from the config.
_COMPUTED_ANEW = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class StageParts:
    """The parts of a model that are on one device.

    Args:
        embedding: None on devices other than the first. head: None on others than the last.
    """

    config: ModelConfig
    device: str
    embedding: Embedding | None
    layers: tuple[Layer, ...]
    head: Head | None

    def ropes(self) -> list[Rope]:
        """Return the RoPEs of the layers, each once."""
        return list(dict.fromkeys(layer.attention.rope for layer in self.layers))


@dataclass(frozen=True)
class WeightCosts:
    """Bytes that a model's weights take on one kind of device, each tensor aligned.

    Args:
        embedding: the token embedding, where it has a table of its own.
        layers: bytes of the first n layers, for every n from 0.
        head: final norm and output head.
        is_tied: the head serves as the embedding where both are on one device.
    """

    embedding: int
    layers: tuple[int, ...]
    head: int
    is_tied: bool

    def of_range(self, first: int, end: int, with_embedding: bool = True) -> int:
        """Return the bytes of layers first..end, and of embedding and head at either end.

        Args:
            with_embedding: the embedding of the first layer is in the same memory.
        """
        has_head = end == len(self.layers) - 1
        needs_table = with_embedding and first == 0 and not (self.is_tied and has_head)
        ends = (self.embedding if needs_table else 0) + (self.head if has_head else 0)
        return self.layers[end] - self.layers[first] + ends


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model, before or after their weights are read."""

    config: ModelConfig
    device_map: DeviceMap
    embedding: Embedding
    layers: tuple[Layer, ...]
    head: Head

    def stages(self) -> list[StageParts]:
        """Return each device's parts, in the order of the devices."""
        where = self.device_map
        return [
            StageParts(
                self.config,
                device,
                self.embedding if device == where.layers[0] else None,
                tuple(layer for layer in self.layers if layer.device == device),
                self.head if device == where.head else None,
            )
            for device in where.devices
        ]

    def cut(self, first: int, end: int) -> StageParts:
        """Return layers first..end, with embedding and head where the range has them, as a stage.

        Only of parts that are all on one device.
        """
        (device,) = self.device_map.devices
        return StageParts(
            self.config,
            device,
            self.embedding if first == 0 else None,
            self.layers[first:end],
            self.head if end == len(self.layers) else None,
        )

    def costs(self) -> WeightCosts:
        """Return what the weights cost by part, for splitting the model over several devices.

        Only of parts that are all on one device, whose kind decides.
        """
        (device,) = self.device_map.devices
        step = backend_of(device).alignment_bytes

        def aligned(specs: Iterable[TensorSpec]) -> int:
            return sum(round_up(spec.nbytes, step) for spec in specs)

        layers = accumulate((aligned(layer.specs()) for layer in self.layers), initial=0)
        return WeightCosts(
            aligned([self.embedding.spec]), tuple(layers), aligned(self.head.specs()),
            self.embedding.head is not None,
        )

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the head last."""
        for layer in self.layers:
            yield from layer.linears
        yield self.head.linear

    def norms(self) -> Iterator[Norm]:
        """Every norm, the final one last."""
        for layer in self.layers:
            yield from layer.norms
        yield self.head.norm

    def specs(self) -> list[TensorSpec]:
        """Describe all weights as they will be on their devices."""
        specs = [*self.embedding.specs()]
        for layer in self.layers:
            specs += layer.specs()
        return [*specs, *self.head.specs()]

    def load(
        self,
        checkpoint: Checkpoint,
        views: Mapping[str, torch.Tensor],
        ops: Mapping[str, DeviceOps],
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Read every weight once, check it, and write it to its view.

        Args:
            checkpoint: where from.
            views: name of a spec -> its view in the weights buffer.
            ops: device -> its operations, which repack codes there.
            advance: called with the bytes that a tensor takes on its device once it is there;
                all calls together sum up to the bytes of `specs()`.

        Raises:
            InvalidCheckpoint: a file shrank, or holds values that cannot be (NaN, a group table
                that does not add up, a permutation that is none).
        """
        loading = Loading(checkpoint, views, ops)
        if advance is not None:
            loading = replace(loading, advance=advance)
        for layer in self.layers:
            layer.load(loading)
        self.head.load(loading)
        self.embedding.load(loading)


def build_parts(
    config: ModelConfig, checkpoint: Checkpoint, device_map: DeviceMap | None = None
) -> ModelParts:
    """Make a model's parts from its config and the headers of its weight files.

    Tensors that no part asks for are ignored with a warning, those that every loader computes
    anew (`rotary_emb.inv_freq` of old folders) without. A norm too many means that the config is
    another model's, and an adapter changes the output.

    Args:
        device_map: where the parts are; the CPU where None.

    Raises:
        InvalidCheckpoint: a tensor is missing, or has a shape or dtype that the config does not
            allow, or there are layers or norms that it knows nothing of.
        UnsupportedFormat: a layer is stored in a way this engine does not read, or has an
            adapter beside it.
    """
    devices = device_map or DeviceMap.single(MAIN_MEMORY, config.num_hidden_layers)
    assert len(devices.layers) == config.num_hidden_layers
    builder = Builder(config, checkpoint)
    # The embedding first: its shape is the plainest sign of a config of another model.
    embedding, head = builder.embedding(devices), builder.head(devices.head)
    if builder.is_tied(head) and devices.layers[0] == devices.head:
        embedding.head = head.linear
    parts = ModelParts(
        config=config,
        device_map=devices,
        embedding=embedding,
        layers=tuple(builder.layer(i, device) for i, device in enumerate(devices.layers)),
        head=head,
    )
    _judge_unused(parts, checkpoint)
    return parts


class Builder:
    """Makes a model's parts one by one."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._architecture = ARCHITECTURES[config.architecture]
        self._rope = Rope(config.rope)

    def embedding(self, devices: DeviceMap) -> Embedding:
        """Make the embedding, with a table of its own."""
        config, name = self._config, f"{self._architecture.embedding}.weight"
        shape = (config.vocab_size, config.hidden_size)
        spec = TensorSpec(name, "weights", self._dtype(name, shape), shape, devices.embed)
        reader = devices.layers[0]
        if reader != devices.embed:
            spec = replace(spec, segment="embedding", read_by=reader)
        return Embedding(spec, config.embedding_multiplier)

    def head(self, device: str) -> Head:
        """Make final norm and output head; a head of its own wins over a tied one."""
        config, names = self._config, self._architecture
        tied = config.tie_word_embeddings and not has_linear(self._checkpoint, names.head)
        linear = self._linear(
            names.head, config.hidden_size, config.vocab_size, device,
            source=names.embedding if tied else None,
        )
        norm = self._norm(names.final_norm, config.hidden_size, device)
        return Head(norm, linear, config.final_logit_softcapping)

    def is_tied(self, head: Head) -> bool:
        """Tell whether the head is read from the embedding's tensor."""
        return head.linear.spec.source == self._architecture.embedding

    def layer(self, index: int, device: str) -> Layer:
        """Make a decoder layer."""
        names, hidden_size = self._architecture, self._config.hidden_size
        prefix = f"{names.layers}.{index}."

        def output_norm(name: str | None) -> Norm | None:
            return None if name is None else self._norm(prefix + name, hidden_size, device)

        return Layer(
            device=device,
            attn_input_norm=self._norm(prefix + names.attn_input_norm, hidden_size, device),
            attention=self._attention(index, prefix, device),
            attn_output_norm=output_norm(names.attn_output_norm),
            mlp_input_norm=self._norm(prefix + names.mlp_input_norm, hidden_size, device),
            mlp=self._mlp(prefix, device) if names.experts is None
            else self._experts(names.experts, prefix, device),
            mlp_output_norm=output_norm(names.mlp_output_norm),
        )

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

        def head_norm(name: str | None) -> Norm | None:
            return None if name is None else self._norm(prefix + name, head_dim, device)

        shape = AttentionShape(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=config.attention_multiplier,
            softcap=config.attn_logit_softcapping,
            sliding_window=config.layer_sliding_windows[index],
        )
        q_norm, k_norm = head_norm(names.q_norm), head_norm(names.k_norm)
        return Attention(q, k, v, o, q_norm, k_norm, shape, self._rope)

    def _mlp(self, prefix: str, device: str) -> Mlp:
        names, hidden_size = self._architecture, self._config.hidden_size
        size = self._config.intermediate_size
        sizes = {
            names.gate_proj: (hidden_size, size),
            names.up_proj: (hidden_size, size),
            names.down_proj: (size, hidden_size),
        }
        gate, up, down = (self._projection(prefix, name, sizes, device) for name in sizes)
        return Mlp(gate, up, down, self._config.hidden_act)

    def _experts(self, names: ExpertNames, prefix: str, device: str) -> Experts:
        config = self._config
        hidden_size, size = config.hidden_size, config.intermediate_size
        experts = []
        for index in range(config.num_local_experts):
            expert = f"{prefix}{names.experts}.{index}."
            experts.append(Mlp(
                self._linear(expert + names.gate, hidden_size, size, device),
                self._linear(expert + names.up, hidden_size, size, device),
                self._linear(expert + names.down, size, hidden_size, device),
                config.hidden_act,
            ))
        router = self._linear(prefix + names.router, hidden_size, len(experts), device)
        return Experts(router, tuple(experts), Routing(config.num_experts_per_tok))

    def _norm(self, name: str, size: int, device: str) -> Norm:
        name = f"{name}.weight"
        self._dtype(name, (size,))
        spec = TensorSpec(name, "weights", "float32", (size,), device)
        return Norm(spec, self._config.rms_norm_eps, self._config.norm_offset)

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
        # GPTQ folders of some converters have a bias (of zeros) for every layer, so a bias that
        # need not be there is used where it is.
        bias = True if name in self._config.required_biases else None
        if not has_linear(self._checkpoint, prefix + name):
            for source, fused in self._architecture.fused.items():
                if name not in fused or not has_linear(self._checkpoint, prefix + source):
                    continue
                first = sum(sizes[other][1] for other in fused[: fused.index(name)])
                return self._linear(
                    prefix + name, in_features, out_features, device, bias,
                    source=prefix + source, rows=(first, first + out_features),
                )
        return self._linear(prefix + name, in_features, out_features, device, bias)

    def _linear(self, name: str, in_features: int, out_features: int, device: str,
                bias: bool | None = None, source: str | None = None,
                rows: tuple[int, int] | None = None) -> Linear:
        spec = linear_spec(self._checkpoint, name, in_features, out_features, source=source,
                           rows=rows, bias=bias)
        return Linear(spec, device)


def _judge_unused(parts: ModelParts, checkpoint: Checkpoint) -> None:
    """Refuse or warn about tensors that no part asks for."""
    config = parts.config
    names = ARCHITECTURES[config.architecture]
    layers = f"{names.layers}."
    # What ends so in a layer is a norm, of this architecture or of another.
    norm_endings = ("norm.weight", *(
        f".{norm}.weight" for norm in (names.attn_input_norm, names.mlp_input_norm)
    ))
    norms = {norm.spec.name for norm in parts.norms()}
    sources = {linear.spec.source for linear in parts.linears()}
    sources.add(parts.embedding.spec.name.removesuffix(".weight"))
    unused = []
    for name in checkpoint.headers:
        source, _, last = name.rpartition(".")
        if name.startswith(layers) and name.endswith(norm_endings) and name not in norms:
            raise InvalidCheckpoint(
                name,
                expected=f"only what config.json's {config.architecture} of "
                f"{config.num_hidden_layers} layers has",
                actual="one norm more",
                remedy=WRONG_FILE,
            )
        if _ADAPTER.search(name):
            raise UnsupportedFormat(
                f"{name}: an adapter beside the weights",
                expected="weights that the adapter was merged into",
                remedy="Merge it, or use a version of the model without it",
            )
        used = last in LINEAR_TENSORS and source in sources
        if not used and name not in norms and not name.endswith(_COMPUTED_ANEW):
            unused.append(name)
    if unused:
        warn_once(
            f"{checkpoint.model_dir}: these tensors are ignored, because "
            f"{config.architecture} has no use for them: "
            f"{shown_names(sorted(unused))}"
        )
