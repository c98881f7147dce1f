"""The result of a plan: bytes of each device and in all, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ...backends import backend_of
from ...cache.layout import PAGE_LEN, pages_for
from .length import LengthWarning, length_warning, stretched


@dataclass(frozen=True)
class DeviceReservation:
    """The memory that a model will take of one device. All `_bytes` are exact integers.

    Args:
        device: `cpu`, `cuda:0`, ...
        first_layer, end_layer: the decoder layers on it, from the first up to the end, which is
            not included. Both are the end of the model for main memory that has only the
            embedding of a model on cards.
        weights_bytes, cache_bytes, workspace_bytes: the buffers of these layers, with alignment.
        overhead_bytes: memory outside our buffers: the rounding of each buffer to whole pages of
            the device, the runtime's own context, and weights on their way through main memory.
        overhead_measured: False where a part of it is assumed, because the card is not here or
            because this process has no context on it yet.
        capacity_bytes: the memory of the device, or the limit where that is less.
        free_bytes: the memory that is free now, at most the limit.
        other_bytes: the memory that other processes and the system hold.
        limit_bytes: the most that the buffers may take, by `memory_limit`, `gpu_split` or
            the environment; None without a limit.
        headroom_bytes: the memory that stays free after the load; negative where the model does not
            fit. A limit has to hold the buffers. The free memory has to hold the buffers and the
            overhead.
        draft_bytes: the part of the buffers that a draft model takes.
        embedding_bytes: the buffer of main memory with the token embedding of a model whose first
            layer is on a card. 0 where the embedding is a part of the weights.
        lora_bytes: the buffer with the room for LoRA adapters.
        open_page_bytes: the part of the workspace with the newest tokens of running texts, which
            a quantised cache keeps in more bits.
        key_feedback_bytes: the part of the workspace with the matrices by which keys of fewer
            than 8 bits are rounded with feedback.
        machine: the place of the device's machine among several; 0 is the one that plans.
        rank: the number that the machine was started with.
        host: the name of its host; empty where the model is on one machine.
    """

    device: str
    first_layer: int
    end_layer: int
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    overhead_bytes: int
    overhead_measured: bool
    capacity_bytes: int
    free_bytes: int
    other_bytes: int
    limit_bytes: int | None
    headroom_bytes: int
    draft_bytes: int = 0
    embedding_bytes: int = 0
    lora_bytes: int = 0
    open_page_bytes: int = 0
    key_feedback_bytes: int = 0
    machine: int = 0
    rank: int = 0
    host: str = ""

    @property
    def has_layers(self) -> bool:
        """Return False for main memory without layers, which a model on cards needs."""
        return self.end_layer > self.first_layer

    @property
    def machine_name(self) -> str:
        """The name of the machine in messages; empty where the model is on one machine."""
        if not self.host:
            return ""
        own = f"machine {self.rank}" if self.machine else "the first machine"
        return f"{own} ({self.host})"

    @property
    def short_machine_name(self) -> str:
        """The name of the machine above a column, such as `1 node-b`: its rank and its host."""
        return f"{self.rank} {self.host}" if self.host else ""

    @property
    def full_name(self) -> str:
        """The name of the device, with that of its machine where there are several."""
        return ", ".join(filter(None, (self.machine_name, self.device)))

    @property
    def memory_name(self) -> str:
        """What a person calls the memory: `main memory`, or the name of a card."""
        name = "main memory" if backend_of(self.device).is_main_memory else self.device
        return ", ".join(filter(None, (self.machine_name, name)))

    @property
    def total_bytes(self) -> int:
        """All buffers, as `LoadedModel.allocated_bytes()` will measure them here."""
        return (
            self.weights_bytes + self.cache_bytes + self.workspace_bytes + self.embedding_bytes
            + self.lora_bytes
        )

    @property
    def needed_bytes(self) -> int:
        """The buffers and the overhead: the memory that has to be free."""
        return self.total_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """The bytes that are missing; 0 where the model fits."""
        return max(0, -self.headroom_bytes)

    @property
    def fits(self) -> bool:
        return self.headroom_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and sums as JSON types."""
        sums = ("total_bytes", "needed_bytes", "missing_bytes", "fits")
        return asdict(self) | {name: getattr(self, name) for name in sums}


@dataclass(frozen=True)
class Reservation:
    """The memory that a model will take, computed before anything is loaded.

    Args:
        model_dir: the model folder.
        architecture: the class name in config.json, such as `LlamaForCausalLM`.
        format: how the weights are stored: `exl2`, `gptq` or `dense`.
        num_layers: the number of decoder layers.
        own_length: the model's own length in tokens, with the RoPE scaling of its config.
        alpha_value, compress_pos_emb: the RoPE options of the plan.
        uses_rope: False for a model of learned positions, on which these have no effect.
        ctx_size: tokens of context.
        cache_type: as `CacheType` writes it, such as `fp16` or `q8_q4`.
        chunk_size: most tokens in one forward pass.
        max_batch_size: most sequences in one forward pass.
        devices: one record for each device that holds layers, machine by machine in the order
            of the layers, and for each machine one of main memory where that has only the
            embedding of a model on cards, or what the connection to other machines takes.
        largest_ctx_size: cache type -> most tokens of context that fit now, 0 where not even one
            page does. The types are fp16, q8, q6, q4, q3 and the type of this plan.
        bytes_by_cache_type: cache type -> bytes of all buffers with this context, for the same
            types.
        model_draft: the folder of the draft model; None without one.
        ctx_size_draft: tokens of context of the draft model; 0 without one.
        loras: folder -> scaling of the LoRA adapters to load with the model.
        cache_window: as in `LoadOptions`; 0 where the cache is not quantised.
        cache_size: tokens that all pages of the cache hold, at least those of one text.
        hosts: the names of all machines that could hold layers, in order of place; empty where
            the model is on one machine.
    """

    model_dir: str
    architecture: str
    format: str
    num_layers: int
    own_length: int
    alpha_value: float
    compress_pos_emb: float
    ctx_size: int
    cache_type: str
    chunk_size: int
    max_batch_size: int
    devices: tuple[DeviceReservation, ...]
    largest_ctx_size: dict[str, int]
    bytes_by_cache_type: dict[str, int]
    model_draft: str | None = None
    ctx_size_draft: int = 0
    loras: dict[str, float] = field(default_factory=dict)
    cache_window: int = 0
    cache_size: int = 0
    uses_rope: bool = True
    hosts: tuple[str, ...] = ()

    @property
    def shares_cache(self) -> bool:
        """True if the cache holds more than the longest text, because cache_size says so."""
        return self.cache_size > pages_for(self.ctx_size) * PAGE_LEN

    @property
    def stretched_length(self) -> int:
        """The model's own length in tokens, stretched by the RoPE options that have an effect."""
        if not self.uses_rope:
            return self.own_length
        return stretched(self.own_length, self.alpha_value, self.compress_pos_emb)

    @property
    def length_warning(self) -> LengthWarning | None:
        """A warning where the context is beyond the stretched length, else None."""
        return length_warning(
            self.ctx_size, self.own_length, self.alpha_value, self.compress_pos_emb
        )

    @property
    def rope_warning(self) -> str | None:
        """A warning that names RoPE options without an effect on the model, else None."""
        values = {"alpha_value": self.alpha_value, "compress_pos_emb": self.compress_pos_emb}
        chosen = [f"{name} {value:g}" for name, value in values.items() if value != 1.0]
        if self.uses_rope or not chosen:
            return None
        return (
            f"{' and '.join(chosen)} {'has' if len(chosen) == 1 else 'have'} no effect on "
            f"{self.architecture}, because it has learned positions and no RoPE."
        )

    @property
    def warnings(self) -> list[str]:
        """All warnings of the plan, one line each."""
        length = self.length_warning
        lines = [length.text if length is not None else None, self.rope_warning]
        return [line for line in lines if line is not None]

    @property
    def fits(self) -> bool:
        return all(device.fits for device in self.devices)

    @property
    def weights_bytes(self) -> int:
        return sum(device.weights_bytes for device in self.devices)

    @property
    def cache_bytes(self) -> int:
        return sum(device.cache_bytes for device in self.devices)

    @property
    def workspace_bytes(self) -> int:
        return sum(device.workspace_bytes for device in self.devices)

    @property
    def embedding_bytes(self) -> int:
        """The embedding in main memory of a model on cards."""
        return sum(device.embedding_bytes for device in self.devices)

    @property
    def lora_bytes(self) -> int:
        return sum(device.lora_bytes for device in self.devices)

    @property
    def total_bytes(self) -> int:
        """All buffers on all devices."""
        return sum(device.total_bytes for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and sums as JSON types; `hosts` only with several machines."""
        sums = ("fits", "weights_bytes", "cache_bytes", "workspace_bytes", "embedding_bytes",
                "lora_bytes", "total_bytes", "stretched_length")
        warning = self.length_warning
        return {
            **{name: v for name, v in vars(self).items() if name not in ("devices", "hosts")},
            **{name: getattr(self, name) for name in sums},
            "length_warning": warning.to_dict() if warning is not None else None,
            "rope_warning": self.rope_warning,
            **({"hosts": list(self.hosts)} if self.hosts else {}),
            "devices": [device.to_dict() for device in self.devices],
        }
