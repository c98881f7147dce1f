"""The memory of comparing cache types: a model with the fp16 cache and all others beside it.

No PyTorch; see `evaluation.py` for what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backends.devices import device_kind
from ..cache.layout import CacheType, cache_specs, pages_for
from ..memory.reservation import Reservation, plan
from ..memory.reservation.budgets import chosen_devices
from ..utils.errors import InsufficientMemory, InvalidSettings
from ..utils.table import DeviceMap, Segment, TensorSpec, place

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig

REFERENCE_TYPE = "fp16"


@dataclass(frozen=True)
class EvaluationPlan:
    """The memory of an evaluation.

    Args:
        reservation: of the model with the fp16 cache.
        others: the other cache types, each once.
        caches: the table of their caches, laid out as one buffer; None where there are none.
    """

    reservation: Reservation
    others: tuple[CacheType, ...]
    caches: Segment | None

    @property
    def extra_bytes(self) -> int:
        """Bytes of the other types' caches."""
        return self.caches.nbytes if self.caches is not None else 0


def parse_cache_types(text: str) -> tuple[CacheType, ...]:
    """Read a list such as `q4,q8_q4`; the reference type and repetitions are left out.

    Raises:
        InvalidSettings: a name is unknown.
    """
    types = dict.fromkeys(CacheType.parse(name) for name in text.split(","))
    types.pop(CacheType.parse(REFERENCE_TYPE), None)
    return tuple(types)


def plan_evaluation(
    model_dir: str,
    others: Sequence[CacheType],
    *,
    config: ModelConfig,
    ctx_size: int | None = None,
    memory_limit: str | None = None,
    alpha_value: float = 1.0,
    compress_pos_emb: float = 1.0,
) -> EvaluationPlan:
    """Plan the model with the fp16 cache and all other caches beside it.

    Args:
        model_dir, ctx_size, memory_limit, alpha_value, compress_pos_emb: see
            `reservation.plan`.
        others: cache types to compare.
        config: the folder's.

    Raises:
        InsufficientMemory: they do not fit together; nothing was taken.
        ExlLoaderError: see `reservation.plan`.
    """
    device = chosen_devices("auto", None)[0]
    reservation = plan(
        model_dir, ctx_size=ctx_size, cache_type=REFERENCE_TYPE, device=device,
        memory_limit=memory_limit, alpha_value=alpha_value,
        compress_pos_emb=compress_pos_emb,
    )
    _check_workspace(reservation, model_dir, others, memory_limit)
    specs = [
        spec
        for cache_type in others
        for spec in _specs(config, reservation.ctx_size, cache_type, device)
    ]
    caches = place(specs)[device, "cache"] if specs else None
    planned = EvaluationPlan(reservation, tuple(others), caches)
    step = device_kind(device).granularity_bytes
    needed = -(-planned.extra_bytes // step) * step
    spare = reservation.devices[0].spare_bytes
    if reservation.fits and spare < needed:
        total = reservation.devices[0].total_bytes + planned.extra_bytes
        raise InsufficientMemory(
            f"{device}: no room for the caches of all types at once",
            expected=f"{total} bytes free, {planned.extra_bytes} of them for other caches",
            actual=f"{needed - spare} bytes fewer",
            remedy="Compare fewer cache types at a time, or lower --ctx-size",
        )
    return planned


def _check_workspace(
    reservation: Reservation, model_dir: str, others: Sequence[CacheType],
    memory_limit: str | None,
) -> None:
    """Refuse a type that needs more workspace than the fp16 cache, which all share."""
    (lent,) = reservation.devices
    for other in others:
        (own,) = plan(
            model_dir, ctx_size=reservation.ctx_size, cache_type=other, device=lent.device,
            memory_limit=memory_limit,
        ).devices
        if own.workspace_bytes > lent.workspace_bytes:
            raise InvalidSettings(
                "--cache-type", expected=f"types that run in the workspace of {REFERENCE_TYPE}",
                actual=f"{other} needs {own.workspace_bytes} bytes, {lent.workspace_bytes} are "
                "there", remedy="Lower --ctx-size",
            )


def _specs(
    config: ModelConfig, ctx_size: int, cache_type: CacheType, device: str
) -> list[TensorSpec]:
    where = DeviceMap.single(device, config.num_hidden_layers)
    return [
        TensorSpec(f"{cache_type}.{spec.name}", spec.segment, spec.dtype, spec.shape, device)
        for spec in cache_specs(config, pages_for(ctx_size), cache_type, where)
    ]
