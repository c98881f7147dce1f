"""The public record of a device's share of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from ...utils.table import SEGMENTS
from ..segments import Segment, align
from .assignment import DeviceShare
from .costs import DRAFT_PREFIX
from .records import DeviceReservation


def device_record(
    share: DeviceShare, segments: Mapping[tuple[str, str], Segment]
) -> DeviceReservation:
    """Make the public record of a share, which must equal the tensors as they are laid out."""
    budget = share.budget
    keys = [(budget.device, name) for name in SEGMENTS]
    laid_out = tuple(segments[key].nbytes if key in segments else 0 for key in keys)
    summed = (
        share.weights_bytes, share.cache_bytes, share.workspace_bytes, share.embedding_bytes,
        share.lora_bytes,
    )
    assert summed == laid_out, (summed, laid_out)
    lent = budget.limited()
    workspace = segments.get((budget.device, "workspace"))
    return DeviceReservation(
        device=budget.device,
        first_layer=share.layers.start,
        end_layer=share.layers.stop,
        weights_bytes=share.weights_bytes,
        cache_bytes=share.cache_bytes,
        workspace_bytes=share.workspace_bytes,
        overhead_bytes=share.overhead_bytes,
        overhead_measured=budget.overhead_measured,
        capacity_bytes=lent.capacity_bytes,
        free_bytes=lent.free_bytes,
        other_bytes=lent.other_bytes,
        limit_bytes=budget.limit_bytes,
        headroom_bytes=share.headroom_bytes,
        draft_bytes=share.draft_bytes,
        embedding_bytes=share.embedding_bytes,
        lora_bytes=share.lora_bytes,
        open_page_bytes=_bytes_of("open.", workspace),
        key_feedback_bytes=_bytes_of(("key_feedback", "key_mean"), workspace),
    )


def _bytes_of(prefix: str | tuple[str, ...], workspace: Segment | None) -> int:
    """Return the bytes of a workspace's tensors by the start of their names, drafts included."""
    if workspace is None:
        return 0
    specs = (offset.spec for offset in workspace.offsets)
    return sum(
        align(spec.nbytes, spec.device) for spec in specs
        if spec.name.removeprefix(DRAFT_PREFIX).startswith(prefix)
    )
