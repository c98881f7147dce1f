"""What a plan says: per device and in all, in bytes, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...backends import backend_of
from .length import LengthWarning, length_warning, stretched


@dataclass(frozen=True)
class DeviceReservation:
    """What a model will take of one device. All `_bytes` are exact integers.

    Args:
        device: `cpu`, `cuda:0`, ...
        first_layer, end_layer: the decoder layers it holds, first included, end not.
        weights_bytes, cache_bytes, workspace_bytes: the three buffers, alignment included.
        overhead_bytes: what is taken outside our buffers: rounding to the device's pages,
            the runtime's own context, the largest tensor on its way through the CPU.
        overhead_measured: False where a part of it could only be assumed (a card that is not
            here, or on which this process has no context yet).
        capacity_bytes: what the device has, or the limit if that is less.
        free_bytes: what it lends now, at most the limit.
        other_bytes: what other processes and the system hold of the capacity.
        limit_bytes: most that the three buffers may take, by `memory_limit`, `gpu_split` or
            the environment; None without a limit.
        spare_bytes: what stays free when all is taken; negative where it does not fit. A limit
            has to hold the buffers, the system's free memory the buffers and the overhead.
        draft_bytes: of the three buffers, what a draft model takes.
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
    spare_bytes: int
    draft_bytes: int = 0

    @property
    def memory_name(self) -> str:
        """What a person calls the memory: `main memory`, or the name of a card."""
        return "main memory" if backend_of(self.device).is_main_memory else self.device

    @property
    def total_bytes(self) -> int:
        """The three buffers: what `LoadedModel.allocated_bytes()` will be on this device."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def needed_bytes(self) -> int:
        """The buffers and what lies outside them: what the system has to have free."""
        return self.total_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """How much too little there is; 0 where it fits."""
        return max(0, -self.spare_bytes)

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and sums under their own names."""
        sums = ("total_bytes", "needed_bytes", "missing_bytes", "fits")
        return asdict(self) | {name: getattr(self, name) for name in sums}


@dataclass(frozen=True)
class Reservation:
    """The memory that a model will take, computed before anything is loaded.

    Args:
        model_dir: the folder.
        architecture, format: what the model is and how its weights are stored.
        num_layers: decoder layers.
        own_length: the model's own length in tokens, with the RoPE scaling of its config.
        alpha_value, compress_pos_emb: the RoPE settings in use.
        ctx_size: tokens the cache is planned for.
        cache_type: as `CacheType` writes it, e.g. `fp16` or `q8_q4`.
        chunk_size: most tokens in one forward pass. max_batch_size: most sequences in one.
        devices: one record a device that is used, in the order of the layers.
        largest_ctx_size: cache type -> most tokens that fit now (0: not even one page), for
            the types fp16, q8, q6, q4 and the one asked for.
        bytes_by_cache_type: for the same types, the bytes of all buffers at this context.
        model_draft, ctx_size_draft: the draft model's folder and context; None and 0 without.
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

    @property
    def stretched_length(self) -> int:
        """The model's own length in tokens, as far as the RoPE settings stretch it."""
        return stretched(self.own_length, self.alpha_value, self.compress_pos_emb)

    @property
    def length_warning(self) -> LengthWarning | None:
        """What is wrong with a context beyond the stretched length; None within it."""
        return length_warning(
            self.ctx_size, self.own_length, self.alpha_value, self.compress_pos_emb
        )

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
    def total_bytes(self) -> int:
        """All buffers on all devices."""
        return sum(device.total_bytes for device in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, under the attributes' names."""
        sums = ("fits", "weights_bytes", "cache_bytes", "workspace_bytes", "total_bytes",
                "stretched_length")
        warning = self.length_warning
        return {
            **{name: value for name, value in vars(self).items() if name != "devices"},
            **{name: getattr(self, name) for name in sums},
            "length_warning": warning.to_dict() if warning is not None else None,
            "devices": [device.to_dict() for device in self.devices],
        }
