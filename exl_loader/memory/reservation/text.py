"""A reservation as text: a table, and the error for one that does not fit."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from ...backends import backend_of
from ...backends.base import Process
from ...utils.byte_counts import amount
from ...utils.errors import InsufficientMemory
from ...utils.output import aligned
from .records import DeviceReservation, Reservation

PROCESSES_SHOWN = 3
TEXT_WIDTH = 79


def render(reservation: Reservation) -> str:
    """Write a reservation as a table with a column for each device and a row for each part."""
    devices = reservation.devices
    rows = [
        *_machines(devices),
        ("", [device.device for device in devices]),
        ("layers", [_layers(d) for d in devices]),
        ("weights", [amount(d.weights_bytes) for d in devices]),
        ("cache", [amount(d.cache_bytes) for d in devices]),
        ("workspace", [amount(d.workspace_bytes) for d in devices]),
        *_row_if_any("  open pages", [d.open_page_bytes for d in devices]),
        *_row_if_any("  key feedback", [d.key_feedback_bytes for d in devices]),
        *_row_if_any("embedding", [d.embedding_bytes for d in devices]),
        *_row_if_any("LoRAs", [d.lora_bytes for d in devices]),
        ("total", [amount(d.total_bytes) for d in devices]),
        *_row_if_any("draft model", [d.draft_bytes for d in devices]),
        ("overhead", [_overhead(d) for d in devices]),
        ("free", [amount(d.free_bytes) for d in devices]),
        ("capacity", [amount(d.capacity_bytes) for d in devices]),
        ("other programs", [amount(d.other_bytes) for d in devices]),
    ]
    if any(d.limit_bytes is not None for d in devices):
        limits = ["none" if d.limit_bytes is None else amount(d.limit_bytes) for d in devices]
        rows.append(("limit", limits))
    rows.append(("verdict", [_verdict(d) for d in devices]))
    if len(devices) > 1:
        overall = amount(reservation.total_bytes)
        for name, cells in rows:
            cells.append({"": "all", "total": overall}.get(name, ""))
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(rows[0][1]))]
    lines = [
        f"{name:<15}"
        + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    warned = []
    for warning in reservation.warnings:
        warned += [*textwrap.wrap(f"Warning: {warning}", TEXT_WIDTH), ""]
    return "\n".join(
        [_headline(reservation), "", *lines, "", *warned, *_largest(reservation)]
    )


def _headline(reservation: Reservation) -> str:
    return (
        f"{reservation.model_dir}\n{reservation.architecture}, {reservation.format}, "
        f"{reservation.num_layers} layers; {reservation.ctx_size:,} tokens of context, "
        f"cache {reservation.cache_type}{_of_tokens(reservation)}{_over_machines(reservation)}"
    )


def _over_machines(reservation: Reservation) -> str:
    """Return a line with how many machines have layers; nothing where there is one machine."""
    if not reservation.hosts:
        return ""
    used = len({device.machine for device in reservation.devices})
    return f"\nlayers on {used} of {len(reservation.hosts)} machines"


def _machines(devices: Sequence[DeviceReservation]) -> list[tuple[str, list[str]]]:
    """Return a row with the machine of each device, where there are several machines."""
    names = [device.short_machine_name for device in devices]
    return [("machine", names)] if any(names) else []


def _of_tokens(reservation: Reservation) -> str:
    """Return the size of a cache that holds more than one text; else nothing."""
    return f" of {reservation.cache_size:,} tokens" if reservation.shares_cache else ""


def _layers(device: DeviceReservation) -> str:
    return f"{device.first_layer}-{device.end_layer - 1}" if device.has_layers else "none"


def _row_if_any(name: str, values: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Return a row of byte counts, or no row where all are 0."""
    return [(name, [amount(nbytes) for nbytes in values])] if any(values) else []


def _overhead(device: DeviceReservation) -> str:
    return amount(device.overhead_bytes) + ("" if device.overhead_measured else " (assumed)")


def _verdict(device: DeviceReservation) -> str:
    if device.fits:
        return f"fits, {amount(device.headroom_bytes)} to spare"
    return f"does not fit, {amount(device.missing_bytes)} missing"


def _largest(reservation: Reservation) -> list[str]:
    lines = ["Largest context that fits"]
    is_stretched = reservation.stretched_length > reservation.own_length
    beyond = "beyond the model's " + ("stretched length" if is_stretched else "own length")
    for name, tokens in reservation.largest_ctx_size.items():
        note = f" ({beyond})" if tokens > reservation.stretched_length else ""
        lines.append(f"  {name:<9}{tokens:>12,} tokens{note}" if tokens else f"  {name:<9}none")
    return lines


def compare_cache_types(reservations: Sequence[Reservation]) -> str:
    """Write a table with a row for each cache type of one model at one length.

    Args:
        reservations: one for each cache type, with the same other options.
    """
    first = reservations[0]
    rows = [["", "weights", "cache", "workspace", "reserved", "largest context that fits"]]
    for reservation in reservations:
        name, tokens = reservation.cache_type, reservation.largest_ctx_size[reservation.cache_type]
        rows.append([
            name, amount(reservation.weights_bytes + reservation.embedding_bytes),
            amount(reservation.cache_bytes), amount(reservation.workspace_bytes),
            amount(reservation.total_bytes), f"{tokens:,} tokens" if tokens else "none",
        ])  # fmt: skip
    title = (
        f"{first.model_dir}: what each cache type reserves for {first.ctx_size:,} tokens of context"
    )
    return "\n".join([title, *aligned(rows)])


def compare_allocated(
    reservation: Reservation, allocated: Callable[[str, str], int],
    on_machines: Mapping[tuple[int, str], int] | None = None,
) -> str:
    """Write a table of the reserved bytes beside the allocated ones.

    It has a row for each buffer of this machine, and one for each device of other machines.

    Args:
        reservation: of a loaded model.
        allocated: the allocated bytes of this machine by device and segment.
        on_machines: those of other machines by place and device.
    """
    rows, sums = [["", "reserved", "measured"]], [0, 0]
    for device in reservation.devices:
        reserved = {
            "weights": device.weights_bytes, "cache": device.cache_bytes,
            "workspace": device.workspace_bytes, "embedding": device.embedding_bytes,
            "loras": device.lora_bytes,
        }
        pairs = {
            f"{device.device} {segment}": (nbytes, allocated(device.device, segment))
            for segment, nbytes in reserved.items() if not device.machine
        }
        if device.machine:
            there = (on_machines or {}).get((device.machine, device.device), 0)
            pairs[device.full_name] = device.total_bytes, there
        for name, both in pairs.items():
            if any(both):
                rows.append([name, *(f"{n:,}" for n in both)])
                sums = [total + n for total, n in zip(sums, both, strict=True)]
    rows.append(["bytes together", *(f"{n:,}" for n in sums)])
    return "\n".join(aligned(rows))


def refusal(reservation: Reservation) -> InsufficientMemory:
    """Return the error for a reservation that does not fit, with what would fit instead.

    Returns:
        The error. It names the needed, free and missing bytes of each device and part, the
        cache types that fit at this context, the largest context with this cache type, and the
        other processes that hold memory, where the system lists them.
    """
    short = [device for device in reservation.devices if not device.fits]
    assert short, "a reservation that fits is not refused"
    needed = "; ".join(_needed(device) for device in short)
    found = "; ".join(_found(device) for device in short)
    error = InsufficientMemory(
        f"{', '.join(device.full_name for device in short)}: a context of {reservation.ctx_size} "
        f"tokens with cache {reservation.cache_type}{_of_tokens(reservation)} does not fit",
        expected=needed,
        actual=found,
        remedy=" ".join([*_ways_out(reservation), *_holders(short)]),
        details=render(reservation),
    )
    error.reservation = reservation
    return error


def _limited(device: DeviceReservation) -> bool:
    """Return True where the buffers exceed the user's limit by more than the free memory."""
    limit = device.limit_bytes
    return limit is not None and device.missing_bytes == device.total_bytes - limit


def _needed(device: DeviceReservation) -> str:
    named = {"embedding": device.embedding_bytes} if device.embedding_bytes else {}
    if device.has_layers:
        named = {
            "weights": device.weights_bytes, "cache": device.cache_bytes,
            "workspace": device.workspace_bytes, **named,
        }
    if device.lora_bytes:
        named["LoRAs"] = device.lora_bytes
    if not device.total_bytes:  # main memory for a connection to other machines
        return f"{amount(device.needed_bytes)} of overhead"
    parts = ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in named.items())
    # A limit holds for the buffers alone, so the overhead is no part of the sum.
    if _limited(device):
        return f"{amount(device.total_bytes)} ({parts})"
    return f"{amount(device.needed_bytes)} ({parts}, overhead {amount(device.overhead_bytes)})"


def _found(device: DeviceReservation) -> str:
    # The free memory of the system. `free_bytes` may be less, because it is at most the limit.
    lent = f"{amount(device.needed_bytes - device.missing_bytes)} free"
    if _limited(device):
        lent = f"a limit of {amount(device.limit_bytes or 0)}"
    return f"{lent}, {amount(device.missing_bytes)} missing"


def _ways_out(reservation: Reservation) -> list[str]:
    largest, ctx_size = reservation.largest_ctx_size, reservation.ctx_size
    ways = []
    first = reservation.devices[0].device
    for device in reservation.devices:
        if device.embedding_bytes and not device.fits:
            ways.append(
                f"embedding_device={first} puts the embedding of "
                f"{amount(device.embedding_bytes)} on the card."
            )
    if reservation.shares_cache:
        ways.append("A smaller cache_size takes less memory.")
    fitting = [name for name, tokens in largest.items() if tokens >= ctx_size]
    if fitting:
        ways.append(f"At this context these cache types fit: {', '.join(fitting)}.")
    else:
        ways.append("At this context no cache type fits.")
    tokens = largest[reservation.cache_type]
    if tokens:
        ways.append(f"With cache {reservation.cache_type} the largest context is {tokens} tokens.")
    elif not any(largest.values()):
        ways.append("Not even the shortest context fits. Choose a model with fewer bits.")
    return ways


def _holders(short: list[DeviceReservation]) -> list[str]:
    """Name the processes that hold the most memory of each device that is too small."""
    found: list[Process] = []
    for device in short:
        if _limited(device):
            continue  # the user's own limit is too low, whatever other processes hold
        if device.machine:
            continue  # the processes of another machine are not known here
        found += backend_of(device.device).processes(device.device, PROCESSES_SHOWN)
    if not found:
        return []
    names = ", ".join(f"{p.name} (pid {p.pid}) {amount(p.held_bytes)}" for p in found)
    return [f"Other processes hold memory: {names}."]
