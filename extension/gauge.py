"""The memory gauge: a reservation as a picture with its numbers in words beside it.

Pure functions from figures to HTML, for any page: no Gradio, no web UI, no measuring. Every
text that comes from outside (folder names, architectures, errors) is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from exl_loader.cache import PAGE_LEN
from exl_loader.reservation.text import amount

from .gauge_style import STYLE

if TYPE_CHECKING:
    from exl_loader.reservation import DeviceReservation, Reservation

# Cache type -> what a person calls it, as the gauge offers them.
CACHE_BITS = {"fp16": "16-bit", "q8": "8-bit", "q4": "4-bit"}

# The text field that a click writes to; the page puts the choice into its own components.
PICK_ELEM_ID = "exl_pick"

# Gradio reads a field when it sees an `input` event, and then tells those who listen for its
# `change`; its own `input` is for what a keyboard did. The time makes a second click on the
# same choice a new value. Written into the button, because a page runs no script element
# that arrives later.
_PICK_SCRIPT = (
    f"const t=document.querySelector('#{PICK_ELEM_ID} textarea,#{PICK_ELEM_ID} input');"
    "if(t){t.value=this.dataset.pick+' '+Date.now();"
    "t.dispatchEvent(new Event('input',{bubbles:true}))}"
)

# Below this share of the bar the model's parts could not be told apart.
LENS_SHARE = 0.12

Part = tuple[str, str, int]


def gauge_html(
    reservation: Reservation,
    *,
    measured_bytes: int | None = None,
    own_length: int | None = None,
) -> str:
    """Draw a reservation.

    Args:
        reservation: a plan; with `measured_bytes` the one of the loaded model.
        measured_bytes: `LoadedModel.allocated_bytes()` where the model is loaded.
        own_length: most tokens that a click may choose; the model's own length where None.

    Returns:
        an HTML element with its own style; its buttons write `CTX_SIZE CACHE_TYPE TIME` into
        the text field `PICK_ELEM_ID`, where the page has one.
    """
    devices = reservation.devices
    return _card(
        f"Memory gauge: {_verdict_text(reservation, measured_bytes)}",
        [
            _verdict(reservation, measured_bytes),
            f'<p class="exl-model">{_model_line(reservation)}</p>',
            *(_device(device, alone=len(devices) == 1) for device in devices),
            _proof(reservation, measured_bytes),
            _choices(reservation, own_length or reservation.stretched_length),
        ],
    )


def problem_html(error: BaseException | str, *, heading: str = "Cannot be loaded") -> str:
    """Show an error as one readable message, its details folded.

    Args:
        error: an `ExlLoaderError` shows its line and its details; any other error its name.
        heading: the badge in front of it.
    """
    line = str(error) or type(error).__name__
    details = getattr(error, "details", None)
    folded = ""
    if details:
        folded = (
            f"<details><summary>Details</summary><pre>{escape(str(details))}</pre></details>"
        )
    badge = f'<span class="exl-badge exl-bad">{escape(heading)}</span>'
    return _card(
        f"{heading}: {line}",
        [f'<p class="exl-verdict" role="alert">{badge} <span>{escape(line)}</span></p>', folded],
    )


def task_html(name: str, done: int, total: int | None, count: str) -> str:
    """Show a running task as a bar.

    Args:
        name: what a person reads. done, total: units; total None where unknown.
        count: both as text, with the unit.
    """
    share = min(1.0, done / total) if total else 0.0
    bar = (
        f'<div class="exl-bar" role="progressbar" aria-label="{escape(name)}" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{int(100 * share)}" '
        f'aria-valuetext="{escape(count)}">'
        f'<i class="exl-weights" style="width:{share:.2%}"></i></div>'
    )
    head = f'<div class="exl-head"><b>{escape(name)}</b><span>{escape(count)}</span></div>'
    return _card(f"{name}: {count}", [f'<div class="exl-task">{head}{bar}</div>'])


def message_html(heading: str, text: str, *, good: bool = True) -> str:
    """Show a short message in the gauge's style."""
    kind = "exl-good" if good else "exl-soft"
    badge = f'<span class="exl-badge {kind}">{escape(heading)}</span>'
    return _card(
        f"{heading}: {text}",
        [f'<p class="exl-verdict" role="status">{badge} <span>{escape(text)}</span></p>'],
    )


def _card(label: str, parts: Sequence[str]) -> str:
    return (
        f'<section class="exl-gauge" role="group" aria-label="{escape(label)}">'
        f"<style>{STYLE}</style>{''.join(parts)}</section>"
    )


def _verdict_text(reservation: Reservation, measured_bytes: int | None) -> str:
    if measured_bytes is not None:
        return f"loaded, {amount(measured_bytes)} in use"
    if reservation.fits:
        return f"fits, {_spare(reservation.devices)}"
    short = [device for device in reservation.devices if not device.fits]
    where = [f"{amount(device.missing_bytes)} missing on {_label(device)}" for device in short]
    return f"does not fit, {' and '.join(where)}"


def _spare(devices: Sequence[DeviceReservation]) -> str:
    if len(devices) == 1:
        return f"{amount(devices[0].spare_bytes)} stay free"
    return ", ".join(f"{amount(d.spare_bytes)} stay free on {d.device}" for d in devices)


def _verdict(reservation: Reservation, measured_bytes: int | None) -> str:
    kind = "exl-bad" if measured_bytes is None and not reservation.fits else "exl-good"
    word, _, rest = _verdict_text(reservation, measured_bytes).partition(", ")
    badge = f'<span class="exl-badge {kind}">{escape(word.capitalize())}</span>'
    return f'<p class="exl-verdict" role="status">{badge} <span>{escape(rest)}</span></p>'


def _model_line(reservation: Reservation) -> str:
    name = PurePath(reservation.model_dir).name or reservation.model_dir
    kind = f"{reservation.architecture.removesuffix('ForCausalLM')}, {reservation.format.upper()}"
    bits = CACHE_BITS.get(reservation.cache_type, reservation.cache_type)
    parts = (f"{kind}, {reservation.num_layers} layers",
             f"{reservation.ctx_size:,} tokens of context", f"{bits} cache")
    spans = (f"<span>{escape(part)}</span>" for part in parts)
    return " · ".join([f"<b>{escape(name)}</b>", *spans])


def _label(device: DeviceReservation) -> str:
    return "main memory" if device.device.startswith("cpu") else device.device


def _device(device: DeviceReservation, *, alone: bool) -> str:
    """Draw one device: its bar, the enlarged model where it is small, and the legend."""
    parts, beyond = _parts(device)
    used = sum(nbytes for _, _, nbytes in parts)
    scale = max(device.capacity_bytes, used)
    label = _label(device)
    layers = "" if alone else f", layers {device.first_layer} to {device.end_layer - 1}"
    limited = " (the limit)" if _limit_rules(device) else ""
    head = (
        f'<div class="exl-head"><b>{escape(label)}{layers}</b><span>'
        f"{amount(device.total_bytes)} of {amount(device.capacity_bytes)}{limited}</span></div>"
    )
    listed = _listed(device, parts)
    words = ", ".join(f"{name} {amount(nbytes)}" for _, name, nbytes in listed)
    described = escape(f"{label}, {amount(device.capacity_bytes)}: {words}")
    over = ""
    if device.missing_bytes:
        over = f'<i class="exl-over" style="width:{device.missing_bytes / scale:.3%}"></i>'
    stack = _bar(parts, scale) + over
    bar = f'<div class="exl-bar" role="img" aria-label="{described}">{stack}</div>'
    note = f'<p class="exl-note">{beyond}</p>' if beyond else ""
    return (
        f'<div class="exl-device">{head}{bar}{_lens(device, scale)}'
        f"{_legend(listed)}{note}</div>"
    )


def _limit_rules(device: DeviceReservation) -> bool:
    """Whether a limit, and not the system's free memory, is what the device lends."""
    return device.limit_bytes is not None and device.free_bytes >= device.limit_bytes


def _parts(device: DeviceReservation) -> tuple[list[Part], str]:
    """List what fills a device's bar, and say what is taken but not counted against it.

    A limit holds for the buffers alone, so what lies outside them is no part of its bar.
    """
    parts = [
        ("weights", "Weights", device.weights_bytes),
        ("cache", "Cache", device.cache_bytes),
        ("workspace", "Workspace", device.workspace_bytes),
    ]
    assumed = "" if device.overhead_measured else ", assumed"
    outside = ("outside", f"Outside{assumed}", device.overhead_bytes)
    beyond = ""
    if _limit_rules(device):
        beyond = (
            f"Outside the limit: {amount(device.overhead_bytes)}{assumed} for the runtime and "
            "for reading weights."
        )
    else:
        parts.append(outside)
    own_bytes = device.capacity_bytes - device.free_bytes - device.other_bytes
    parts.append(("own", "This program", own_bytes))
    parts.append(("other", "Other processes", device.other_bytes))
    return [part for part in parts if part[2]], beyond


def _listed(device: DeviceReservation, parts: Sequence[Part]) -> list[Part]:
    """The legend's entries: the parts, and what stays free or is missing."""
    if device.missing_bytes:
        return [*parts, ("missing", "Missing", device.missing_bytes)]
    return [*parts, ("free", "Free", device.spare_bytes)]


def _bar(parts: Sequence[Part], scale: int) -> str:
    return "".join(
        f'<i class="exl-{kind}" style="width:{nbytes / scale:.3%}" '
        f'title="{escape(name)}: {amount(nbytes)}"></i>'
        for kind, name, nbytes in parts
    )


def _lens(device: DeviceReservation, scale: int) -> str:
    """Enlarge the model's own parts where they are too small a share to be told apart."""
    own = [part for part in _parts(device)[0] if part[0] in ("weights", "cache", "workspace")]
    total = sum(nbytes for _, _, nbytes in own)
    if not 0 < total / scale < LENS_SHARE:
        return ""
    # Parts too small to be seen are drawn some pixels wide, and the lens begins where they end.
    corner = f"max({total / scale:.2%},{3 * len(own)}px)"
    return (
        f'<div aria-hidden="true"><div class="exl-lens" '
        f'style="clip-path:polygon(0 0,{corner} 0,100% 100%,0 100%)"></div>'
        f'<div class="exl-bar">{_bar(own, total)}</div></div>'
    )


def _legend(parts: Sequence[Part]) -> str:
    entries = (
        f'<div><span class="exl-swatch exl-{kind}" aria-hidden="true"></span>'
        f'<dt>{escape(name)}</dt><dd title="{nbytes:,} bytes">{amount(nbytes)}</dd></div>'
        for kind, name, nbytes in parts
    )
    return f'<dl class="exl-parts">{"".join(entries)}</dl>'


def _proof(reservation: Reservation, measured_bytes: int | None) -> str:
    """Put what was reserved beside what is measured."""
    if measured_bytes is None:
        return ""
    reserved = reservation.total_bytes
    if measured_bytes == reserved:
        agree, kind = "Measured equals reserved, to the byte", "exl-good"
    else:
        agree, kind = f"They differ by {abs(measured_bytes - reserved):,} bytes", "exl-bad"
    return (
        f'<dl class="exl-proof"><dt>Reserved</dt><dd>{reserved:,} bytes</dd>'
        f"<dt>Measured</dt><dd>{measured_bytes:,} bytes</dd>"
        f'<dd class="exl-agree {kind}">{agree}</dd></dl>'
    )


def _choices(reservation: Reservation, own_length: int) -> str:
    """Offer the largest contexts as buttons."""
    buttons = "".join(
        _choice(reservation, cache_type, bits, own_length)
        for cache_type, bits in CACHE_BITS.items()
    )
    return (
        '<div class="exl-choices" role="group" aria-label="Largest context that fits">'
        f'<p class="exl-soft">Largest context that fits</p><div>{buttons}</div></div>'
    )


def _choice(reservation: Reservation, cache_type: str, bits: str, own_length: int) -> str:
    most = reservation.largest_ctx_size.get(cache_type, 0)
    if not most:
        return f'<button type="button" disabled><b>none</b><small>{bits} cache</small></button>'
    tokens = largest_choice(most, own_length)
    whole = "<small>whole length</small>" if most > tokens else ""
    chosen = (tokens, cache_type) == (reservation.ctx_size, reservation.cache_type)
    return (
        f'<button type="button" data-pick="{tokens} {cache_type}" '
        f'aria-pressed="{str(chosen).lower()}" onclick="{escape(_PICK_SCRIPT)}" '
        f'aria-label="Choose {tokens:,} tokens of context, {bits} cache">'
        f"<b>{tokens:,} tokens</b><small>{bits} cache</small>{whole}</button>"
    )


def largest_choice(most: int, own_length: int) -> int:
    """Cap what fits by the model's own length, in whole pages where it has one."""
    return min(most, max(PAGE_LEN, own_length - own_length % PAGE_LEN))
