"""Every weight a model will have on its devices, from config and checkpoint headers alone.

A blueprint names the layers, their plans and their tensor specs. Reservation, loader and
forward pass all walk the same blueprint. No weight is read and PyTorch is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.architectures import (
    ARCHITECTURES,
    DOWN_PROJ,
    GATE_PROJ,
    K_PROJ,
    O_PROJ,
    Q_PROJ,
    UP_PROJ,
    V_PROJ,
    Architecture,
)
from ..formats import LINEAR_TENSORS, has_linear, plan_linear
from ..formats.common import FLOAT_DTYPES, WRONG_FILE, expect
from ..formats.packed import LinearPlan
from ..utils.errors import InvalidCheckpoint, UnsupportedFormat, shown_names
from ..utils.table import MAIN_MEMORY, DeviceMap, TensorSpec
from ..utils.warn import warn_once

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..checkpoint.config import ModelConfig

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"

# Weights of a low-rank adapter, as PEFT and GPTQModel name them.
_ADAPTER = re.compile(r"\.lora_[ab](\.|$)", re.IGNORECASE)
# Tensors of old folders that follow from the config.
_COMPUTED_ANEW = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class NormPlan:
    """An RMSNorm weight: float32 [size] on its device, `offset` added to what the file has.

    `spec.name` is the tensor's name in the checkpoint.
    """

    spec: TensorSpec
    offset: float


@dataclass(frozen=True)
class MlpPlan:
    """A gated MLP, or one expert of a mixture."""

    gate: LinearPlan
    up: LinearPlan
    down: LinearPlan


@dataclass(frozen=True)
class ExpertsPlan:
    """A mixture of experts: its router and its experts in order."""

    router: LinearPlan
    experts: tuple[MlpPlan, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer. Norms that the architecture does not have are None."""

    device: str
    attn_input_norm: NormPlan
    attn_output_norm: NormPlan | None
    mlp_input_norm: NormPlan
    mlp_output_norm: NormPlan | None
    q_norm: NormPlan | None
    k_norm: NormPlan | None
    q: LinearPlan
    k: LinearPlan
    v: LinearPlan
    o: LinearPlan
    mlp: MlpPlan | ExpertsPlan

    def linears(self) -> Iterator[LinearPlan]:
        """Every linear layer, in the order of the forward pass."""
        yield from (self.q, self.k, self.v, self.o)
        blocks: tuple[MlpPlan, ...] = (self.mlp,) if isinstance(self.mlp, MlpPlan) else ()
        if isinstance(self.mlp, ExpertsPlan):
            yield self.mlp.router
            blocks = self.mlp.experts
        for block in blocks:
            yield from (block.gate, block.up, block.down)

    def norms(self) -> Iterator[NormPlan]:
        """Every norm that is there."""
        norms = (self.attn_input_norm, self.q_norm, self.k_norm, self.attn_output_norm,
                 self.mlp_input_norm, self.mlp_output_norm)
        return (norm for norm in norms if norm is not None)


@dataclass(frozen=True)
class Blueprint:
    """A model's weights before anything is read.

    Args:
        config: the model. architecture: its table entry. device_map: where its parts live.
        embedding: [vocab_size, hidden_size] in the checkpoint's dtype; None where the head
            serves as the embedding as well.
        layers: decoder layers in order. norm: the final norm. head: the output head.
    """

    config: ModelConfig
    architecture: Architecture
    device_map: DeviceMap
    embedding: TensorSpec | None
    layers: tuple[LayerPlan, ...]
    norm: NormPlan
    head: LinearPlan

    @classmethod
    def from_checkpoint(
        cls, config: ModelConfig, checkpoint: Checkpoint, device_map: DeviceMap | None = None
    ) -> Blueprint:
        """Plan a model from its config and the headers of its weight files.

        Tensors that no part asks for are ignored with a warning, those that every loader
        computes anew (`rotary_emb.inv_freq` of old folders) without. A norm too many means that
        the config is another model's, and an adapter changes the output.

        Raises:
            InvalidCheckpoint: a tensor is missing, or has a shape or dtype that the config
                does not allow, or there are layers or norms that it knows nothing of.
            UnsupportedFormat: a layer is stored in a way this engine does not read, or has an
                adapter beside it.
        """
        devices = device_map or DeviceMap.single(MAIN_MEMORY, config.num_hidden_layers)
        assert len(devices.layers) == config.num_hidden_layers
        planner = _Planner(config, checkpoint)
        embedding: TensorSpec | None = planner.embedding(devices.embed)
        tied = config.tie_word_embeddings and not has_linear(checkpoint, HEAD)
        head = plan_linear(
            checkpoint, HEAD, config.hidden_size, config.vocab_size, device=devices.head,
            source=EMBEDDING if tied else HEAD,
        )
        if tied and devices.head == devices.embed:
            embedding = None
        blueprint = cls(
            config=config,
            architecture=planner.architecture,
            device_map=devices,
            embedding=embedding,
            layers=tuple(planner.layer(i, d) for i, d in enumerate(devices.layers)),
            norm=planner.norm(FINAL_NORM, config.hidden_size, devices.head),
            head=head,
        )
        blueprint._judge_unused(checkpoint)
        return blueprint

    def _judge_unused(self, checkpoint: Checkpoint) -> None:
        """Refuse or warn about tensors that no part asks for."""
        norms = {norm.spec.name for norm in self.norms()}
        sources = {EMBEDDING, *(linear.source for linear in self.linears())}
        unused = []
        for name in checkpoint.headers:
            source, _, last = name.rpartition(".")
            is_norm = name.startswith("model.layers.") and name.endswith("norm.weight")
            if is_norm and name not in norms:
                raise InvalidCheckpoint(
                    name,
                    expected=f"only what config.json's {self.architecture.name} of "
                    f"{self.config.num_hidden_layers} layers has",
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
                f"{self.architecture.name} has no use for them: "
                f"{shown_names(sorted(unused))}"
            )

    def linears(self) -> Iterator[LinearPlan]:
        """Every linear layer, the head last."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.head

    def norms(self) -> Iterator[NormPlan]:
        """Every norm, the final one last."""
        for layer in self.layers:
            yield from layer.norms()
        yield self.norm

    def specs(self) -> list[TensorSpec]:
        """All weight tensors as they will stand on their devices."""
        specs = [] if self.embedding is None else [self.embedding]
        for layer in self.layers:
            specs += [norm.spec for norm in layer.norms()]
            for linear in layer.linears():
                specs += linear.specs.values()
        return [*specs, self.norm.spec, *self.head.specs.values()]


class _Planner:
    """Looks tensors up for `Blueprint.from_checkpoint`."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint):
        self.config = config
        self.checkpoint = checkpoint
        self.architecture = ARCHITECTURES[config.architecture]

    def embedding(self, device: str) -> TensorSpec:
        name = f"{EMBEDDING}.weight"
        shape = (self.config.vocab_size, self.config.hidden_size)
        return TensorSpec(name, "weights", self._dtype(name, shape), shape, device)

    def norm(self, name: str, size: int, device: str) -> NormPlan:
        name = f"{name}.weight"
        self._dtype(name, (size,))
        spec = TensorSpec(name, "weights", "float32", (size,), device)
        return NormPlan(spec, self.architecture.norm_offset)

    def _dtype(self, name: str, shape: tuple[int, ...]) -> str:
        header = self.checkpoint.header(name)
        expect(header, FLOAT_DTYPES, shape)
        return header.dtype

    def linear(self, name: str, in_features: int, out_features: int, device: str,
               bias: bool | None = None) -> LinearPlan:
        return plan_linear(self.checkpoint, name, in_features, out_features, device=device,
                           bias=bias)

    def layer(self, index: int, device: str) -> LayerPlan:
        config, arch = self.config, self.architecture
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        sizes = {
            Q_PROJ: (hidden, q_size), K_PROJ: (hidden, kv_size), V_PROJ: (hidden, kv_size),
            O_PROJ: (q_size, hidden),
        }
        q, k, v, o = (self._projection(prefix, name, sizes, device) for name in sizes)

        def norm(name: str | None, size: int) -> NormPlan | None:
            return None if name is None else self.norm(prefix + name, size, device)

        return LayerPlan(
            device=device,
            attn_input_norm=self.norm(prefix + arch.attn_input_norm, hidden, device),
            attn_output_norm=norm(arch.attn_output_norm, hidden),
            mlp_input_norm=self.norm(prefix + arch.mlp_input_norm, hidden, device),
            mlp_output_norm=norm(arch.mlp_output_norm, hidden),
            q_norm=norm("self_attn.q_norm" if arch.qk_norm else None, config.head_dim),
            k_norm=norm("self_attn.k_norm" if arch.qk_norm else None, config.head_dim),
            q=q, k=k, v=v, o=o,
            mlp=self._mlp(prefix, device) if arch.experts is None
            else self._experts(prefix, device),
        )

    def _mlp(self, prefix: str, device: str) -> MlpPlan:
        hidden, size = self.config.hidden_size, self.config.intermediate_size
        sizes = {GATE_PROJ: (hidden, size), UP_PROJ: (hidden, size), DOWN_PROJ: (size, hidden)}
        return MlpPlan(*(self._projection(prefix, name, sizes, device) for name in sizes))

    def _experts(self, prefix: str, device: str) -> ExpertsPlan:
        names, config = self.architecture.experts, self.config
        assert names is not None
        hidden, size = config.hidden_size, config.intermediate_size
        experts = []
        for index in range(config.num_local_experts):
            expert = f"{prefix}{names.experts}.{index}."
            experts.append(MlpPlan(
                gate=self.linear(expert + names.gate, hidden, size, device),
                up=self.linear(expert + names.up, hidden, size, device),
                down=self.linear(expert + names.down, size, hidden, device),
            ))
        router = self.linear(prefix + names.router, hidden, config.num_local_experts, device)
        return ExpertsPlan(router, tuple(experts))

    def _projection(self, prefix: str, name: str, sizes: dict[str, tuple[int, int]],
                    device: str) -> LinearPlan:
        """Plan one of a block's projections, from a fused source tensor where it is in one."""
        in_features, out_features = sizes[name]
        bias = self._has_bias(name)
        if not has_linear(self.checkpoint, prefix + name):
            for source, parts in self.architecture.fused.items():
                if name not in parts or not has_linear(self.checkpoint, prefix + source):
                    continue
                first = sum(sizes[part][1] for part in parts[: parts.index(name)])
                return plan_linear(
                    self.checkpoint, prefix + name, in_features, out_features, device=device,
                    source=prefix + source, rows=(first, first + out_features), bias=bias,
                )
        return self.linear(prefix + name, in_features, out_features, device, bias)

    def _has_bias(self, name: str) -> bool | None:
        """Return True where a bias must be there, None where it may be.

        GPTQ folders of some converters have a bias (of zeros) for every layer.
        """
        rule = self.architecture.biases.get(name, False)
        required = getattr(self.config, rule) if isinstance(rule, str) else rule
        return True if required else None
