"""Plan the memory of an evaluation: a model with the fp16 cache, and a cache of each other type.

No PyTorch. `evaluation.py` runs the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..backends import backend_of
from ..cache.layout import CacheType, cache_specs, pages_for
from ..memory.reservation import LoadOptions, Reservation, plan
from ..memory.reservation.budgets import chosen_devices
from ..memory.segments import Segment, lay_out
from ..model.step import beside_cache_shapes
from ..utils.errors import InsufficientMemory, InvalidSettings
from ..utils.integers import round_up
from ..utils.table import DeviceMap, TensorSpec

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig

REFERENCE_TYPE = "fp16"


@dataclass(frozen=True)
class EvaluationPlan:
    """The memory of an evaluation.

    Args:
        reservation: the model with the fp16 cache.
        others: the other cache types, each once.
        caches: the caches of the other types, laid out as one buffer; None where there are
            none.
    """

    reservation: Reservation
    others: tuple[CacheType, ...]
    caches: Segment | None

    @property
    def extra_bytes(self) -> int:
        """Bytes of the caches of the other types."""
        return self.caches.nbytes if self.caches is not None else 0


def parse_cache_types(text: str) -> tuple[CacheType, ...]:
    """Read a list such as `q4,q8_q4`, without the reference type and without repetitions.

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
    **options: Any,
) -> EvaluationPlan:
    """Plan the model with the fp16 cache, and a further cache of each other type.

    Args:
        model_dir: the model folder.
        others: the cache types to compare with fp16.
        config: the folder's.
        options: of `plan`, but for `cache_type` and `device`.

    Raises:
        InsufficientMemory: model and caches do not fit together. No memory was taken.
        ExlLoaderError: see `plan`.
    """
    device = chosen_devices(LoadOptions())[0]
    options["device"] = device
    reservation = plan(model_dir, cache_type=REFERENCE_TYPE, **options)
    _check_workspace(reservation, model_dir, others, options)
    specs = [
        spec
        for cache_type in others
        for spec in _specs(config, reservation.ctx_size, cache_type, device)
    ]
    caches = lay_out(specs)[device, "cache"] if specs else None
    planned = EvaluationPlan(reservation, tuple(others), caches)
    needed = round_up(planned.extra_bytes, backend_of(device).granularity_bytes)
    headroom = reservation.devices[0].headroom_bytes
    if reservation.fits and headroom < needed:
        total = reservation.devices[0].total_bytes + planned.extra_bytes
        raise InsufficientMemory(
            f"{device}: no room for the caches of all types at once",
            expected=f"{total} bytes free, {planned.extra_bytes} of them for other caches",
            actual=f"{needed - headroom} bytes fewer",
            remedy="Compare fewer cache types at a time, or choose a smaller --ctx-size",
        )
    return planned


def _check_workspace(
    reservation: Reservation, model_dir: str, others: Sequence[CacheType],
    options: Mapping[str, Any],
) -> None:
    """Refuse a type that needs more workspace than fp16, because all types share one workspace."""
    lent = reservation.devices[0]
    # Their open pages and what a sample finds are beside their caches.
    chosen = {**options, "ctx_size": reservation.ctx_size, "cache_window": 0}
    for other in others:
        own = plan(model_dir, cache_type=other, **chosen).devices[0]
        needed = own.workspace_bytes - own.key_feedback_bytes
        if needed > lent.workspace_bytes:
            raise InvalidSettings(
                "--cache-type", expected=f"types that run in the workspace of {REFERENCE_TYPE}",
                actual=f"{other}, which needs {needed} bytes instead of "
                f"{lent.workspace_bytes}", remedy="Choose a smaller --ctx-size",
            )


def _specs(
    config: ModelConfig, ctx_size: int, cache_type: CacheType, device: str
) -> list[TensorSpec]:
    """List a cache's tensors, what a sample finds, and an open page for the one text that runs."""
    where = DeviceMap.single(device, config.num_hidden_layers)
    pages = cache_specs(config, pages_for(ctx_size), cache_type, where)
    shapes = {spec.name: (spec.dtype, spec.shape) for spec in pages}
    shapes |= beside_cache_shapes(config, config.num_hidden_layers, 1, cache_type)
    return [
        TensorSpec(f"{cache_type}.{name}", "cache", dtype, shape, device)
        for name, (dtype, shape) in shapes.items()
    ]
