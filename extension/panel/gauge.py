"""The memory gauge: a reservation drawn as bars, with its numbers in text.

Pure functions from figures to HTML, for any page, without Gradio and without measuring. Every
text that comes from outside (folder names, architectures, errors) is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from exl_loader import LoadOptions
from exl_loader.utils.byte_counts import GIB, amount

from .gauge_style import STYLE

if TYPE_CHECKING:
    from exl_loader import Reservation
    from exl_loader.memory.reservation import DeviceReservation

# Tokens of a page of the cache: the step of a slider of the context, and its least value.
PAGE_LEN = int(LoadOptions.OPTIONS["ctx_size"].step or 1)

# Cache type -> its name in the gauge, in the order of the gauge's buttons.
CACHE_BITS = {"fp16": "16-bit", "q8": "8-bit", "q6": "6-bit", "q4": "4-bit", "q3": "3-bit"}

# Id of the page's text field that the gauge writes the choice of a click to.
PICK_ELEM_ID = "exl_pick"

# Gradio reads a field after an `input` event and then sends the field's `change` event. Scripts
# are attributes of elements, because a page does not run script elements that are added later.
# The time makes a second click on the same choice a different value.
_PICK_SCRIPT = (
    f"const t=document.querySelector('#{PICK_ELEM_ID} textarea,#{PICK_ELEM_ID} input');"
    "if(t){t.value=this.dataset.pick+' '+Date.now();"
    "t.dispatchEvent(new Event('input',{bubbles:true}))}"
)

# Below this share of the bar the model's parts cannot be distinguished.
LENS_SHARE = 0.12

# The model's own parts, which are enlarged below the bar.
_MODEL_PARTS = ("weights", "cache", "open", "workspace", "embedding", "loras")

# A part of a device's bar: class of its colour, name, bytes.
Part = tuple[str, str, int]


def gauge_html(reservation: Reservation, *, measured_bytes: int | None = None) -> str:
    """Draw a reservation, its details folded.

    Args:
        reservation: of a planned load, or with `measured_bytes` of the loaded model.
        measured_bytes: `LoadedModel.allocated_bytes()` if the model is loaded.

    Returns:
        an HTML element with its own style. Its buttons write `CTX_SIZE CACHE_TYPE TIME` into
        the text field PICK_ELEM_ID, with CTX_SIZE 0 to keep the current context.
    """
    devices = reservation.devices
    largest = _choices(reservation)
    fits = measured_bytes is not None or reservation.fits
    details = [
        f"<p>{escape(_kind(reservation))}</p>",
        *(_device_details(device, alone=len(devices) == 1) for device in devices),
        _proof(reservation, measured_bytes),
        largest if fits else "",
    ]
    return card_html(
        f"Memory gauge: {_verdict_text(reservation, measured_bytes)}",
        [
            _verdict(reservation, measured_bytes),
            _warnings(reservation),
            f'<p class="exl-model">{_model_line(reservation)}</p>',
            *(_device(device, alone=len(devices) == 1) for device in devices),
            _savings(reservation),
            "" if fits else largest,
            # `page_script.keep_state` finds the details of the next drawing by this name.
            f'<details data-name="reservation"><summary>Details</summary>{"".join(details)}'
            "</details>",
        ],
    )


def problem_html(error: BaseException | str, *, heading: str = "Cannot be loaded") -> str:
    """Show an error as one readable message, its details folded.

    Args:
        error: its text is shown and, of an `ExlLoaderError`, its details.
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
    return card_html(
        f"{heading}: {line}",
        [f'<p class="exl-verdict" role="alert">{badge} <span>{escape(line)}</span></p>', folded],
    )


def task_html(name: str, done: int, total: int | None, count: str) -> str:
    """Show a running task as a bar.

    Args:
        name: shown to the user. done, total: units; total is None if it is unknown.
        count: both as text with the unit; may be empty.
    """
    if total:
        share = min(1.0, done / total)
        count = f"{count} · {int(100 * share)} %"
        now = f'aria-valuenow="{int(100 * share)}" '
        filled = f'<i class="exl-weights" style="width:{share:.2%}"></i>'
    else:
        # Without a value the bar counts as indeterminate, for screen readers as well.
        now, filled = "", '<i class="exl-weights exl-busy"></i>'
    bar = (
        f'<div class="exl-bar" role="progressbar" aria-label="{escape(name)}" '
        f'aria-valuemin="0" aria-valuemax="100" {now}'
        f'aria-valuetext="{escape(count or name)}">{filled}</div>'
    )
    head = f'<div class="exl-head"><b>{escape(name)}</b><span>{escape(count)}</span></div>'
    return card_html(f"{name}: {count}", [f'<div class="exl-task">{head}{bar}</div>'])


def message_html(heading: str, text: str, *, good: bool = True) -> str:
    """Show a short message in the gauge's style."""
    kind = "exl-good" if good else "exl-soft"
    badge = f'<span class="exl-badge {kind}">{escape(heading)}</span>'
    return card_html(
        f"{heading}: {text}",
        [f'<p class="exl-verdict" role="status">{badge} <span>{escape(text)}</span></p>'],
    )


def card_html(label: str, parts: Sequence[str]) -> str:
    """Frame HTML in the gauge's style.

    Args:
        label: what it says, for screen readers.
        parts: HTML, one below the other.
    """
    return (
        f'<section class="exl-gauge" role="group" aria-label="{escape(label)}">'
        f"<style>{STYLE}</style>{''.join(parts)}</section>"
    )


def _verdict_text(reservation: Reservation, measured_bytes: int | None) -> str:
    if measured_bytes is not None:
        return f"loaded, {amount(measured_bytes)} in use"
    devices = reservation.devices
    if reservation.fits:
        # Of the devices that hold layers: memory of cards and main memory have different prices.
        running = [device for device in devices if device.has_layers]
        needed = sum(_needed_bytes(device) for device in running)
        free = needed + sum(device.headroom_bytes for device in running)
        return f"fits, needs {_needs_and_free(needed, free)}"
    short = [device for device in devices if not device.fits]
    needs = [_device_needs(device, alone=len(devices) == 1) for device in short]
    return f"does not fit, {'; '.join(needs)}"


def _device_needs(device: DeviceReservation, *, alone: bool) -> str:
    needed = _needed_bytes(device)
    label = "" if alone else f"{device.memory_name} "
    return f"{label}needs {_needs_and_free(needed, needed + device.headroom_bytes)}"


def _needed_bytes(device: DeviceReservation) -> int:
    """Return the bytes that must be free: with a limit the buffers, else the overhead as well."""
    return device.total_bytes if _limit_rules(device) else device.needed_bytes


def _needs_and_free(needed: int, free: int) -> str:
    """Write both numbers with as few digits as make them differ."""
    free = max(0, free)
    for write in (_brief, amount, "{:,} bytes".format):
        if write(needed) != write(free):
            break
    return f"{write(needed)}, {write(free)} free"


def _brief(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else amount(nbytes)


def _verdict(reservation: Reservation, measured_bytes: int | None) -> str:
    kind = "exl-bad" if measured_bytes is None and not reservation.fits else "exl-good"
    word, _, rest = _verdict_text(reservation, measured_bytes).partition(", ")
    badge = f'<span class="exl-badge {kind}">{escape(word.capitalize())}</span>'
    agree = ""
    if measured_bytes is not None:
        agree = f"<span>{_agreement(reservation, measured_bytes)}</span>"
    return f'<p class="exl-verdict" role="status">{badge} <span>{escape(rest)}</span>{agree}</p>'


def _warnings(reservation: Reservation) -> str:
    """Show the plan's warnings, such as that of a context beyond the model's length."""
    return "".join(
        f'<p class="exl-warning" role="alert">{escape(text[:1].upper() + text[1:])}</p>'
        for text in reservation.warnings
    )


def _model_line(reservation: Reservation) -> str:
    name = PurePath(reservation.model_dir).name or reservation.model_dir
    bits = CACHE_BITS.get(reservation.cache_type, reservation.cache_type)
    parts = [f"{reservation.ctx_size:,} tokens of context", f"{bits} cache"]
    if reservation.shares_cache:
        parts[1] += f" of {reservation.cache_size:,} tokens"
    spans = (f"<span>{escape(part)}</span>" for part in parts)
    return " · ".join([f"<b>{escape(name)}</b>", *spans])


def _kind(reservation: Reservation) -> str:
    architecture = reservation.architecture.removesuffix("ForCausalLM")
    return f"{architecture}, {reservation.format.upper()}, {reservation.num_layers} layers"


def _device(device: DeviceReservation, *, alone: bool) -> str:
    """Draw one device: its bar, the end of its memory, and the model enlarged if it is small."""
    parts = _parts(device)
    used = sum(nbytes for _, _, nbytes in parts)
    scale = max(device.capacity_bytes, used)
    label, edge = device.memory_name, device.capacity_bytes / scale
    head = ""
    if not alone:
        held = "the embedding" if device.embedding_bytes else "the connection"
        if device.has_layers:
            held = f"layers {device.first_layer} to {device.end_layer - 1}"
        head = (
            f'<div class="exl-head"><b>{escape(label)}, {held}</b>'
            f"<span>{_device_needs(device, alone=True)}</span></div>"
        )
    amounts = ", ".join(f"{name} {amount(nbytes)}" for _, name, nbytes in _listed(device))
    described = escape(f"{label}, {amount(device.capacity_bytes)}: {amounts}")
    over = ""
    if device.missing_bytes:
        over = f'<i class="exl-over" style="width:{device.missing_bytes / scale:.3%}"></i>'
    ends = "the limit is" if _limit_rules(device) else f"{label} ends"
    # The text is on the side of the line that has the room for it.
    side = f"margin-left:{edge:.3%}" if edge < 0.5 else f"width:{edge:.3%};text-align:right"
    return (
        f'<div class="exl-device">{head}<div class="exl-track">'
        f'<div class="exl-bar" role="img" aria-label="{described}">{_bar(parts, scale)}{over}'
        f'</div><b class="exl-end" style="left:{edge:.3%}"></b></div>'
        f'<p class="exl-ends" style="{side}">{escape(ends)} at '
        f"{amount(device.capacity_bytes)}</p>{_lens(parts, scale)}{_key(parts)}</div>"
    )


def _limit_rules(device: DeviceReservation) -> bool:
    """Return whether a limit, not the system's free memory, bounds the load."""
    return device.limit_bytes is not None and device.free_bytes >= device.limit_bytes


def _parts(device: DeviceReservation) -> list[Part]:
    """List the parts of a device's bar in the order in which they are drawn.

    Memory in use comes first, so that missing memory is beyond the end of the device's
    memory. A limit applies to the buffers only, so with a limit the bar has no overhead.
    """
    own_bytes = device.capacity_bytes - device.free_bytes - device.other_bytes
    parts = [
        ("other", "Other processes", device.other_bytes),
        ("own", "This program", own_bytes),
        ("weights", "Weights", device.weights_bytes),
        ("cache", "Cache", device.cache_bytes),
        ("open", "Newest tokens", device.open_page_bytes),
        ("workspace", "Workspace", device.workspace_bytes - device.open_page_bytes),
        ("embedding", "Embedding", device.embedding_bytes),
        ("loras", "LoRAs", device.lora_bytes),
    ]
    if not _limit_rules(device):
        parts.append(("overhead", _overhead_name(device), device.overhead_bytes))
    return [part for part in parts if part[2]]


def _overhead_name(device: DeviceReservation) -> str:
    return "Overhead" if device.overhead_measured else "Overhead, assumed"


def _listed(device: DeviceReservation) -> list[Part]:
    """List the legend's entries: the parts, and the memory that stays free or is missing."""
    if device.missing_bytes:
        return [*_parts(device), ("missing", "Missing", device.missing_bytes)]
    return [*_parts(device), ("free", "Free", device.headroom_bytes)]


def _device_details(device: DeviceReservation, *, alone: bool) -> str:
    """List a device's parts with their bytes."""
    heading = "" if alone else f"<h4>{escape(device.memory_name)}</h4>"
    note = ""
    if _limit_rules(device):
        note = (
            f'<p class="exl-note">{_overhead_name(device)}: {amount(device.overhead_bytes)} '
            "outside the limit, for the runtime and for reading weights.</p>"
        )
    return f"{heading}{_legend(_listed(device))}{note}"


def _bar(parts: Sequence[Part], scale: int) -> str:
    return "".join(
        f'<i class="exl-{kind}" style="width:{nbytes / scale:.3%}" '
        f'title="{escape(name)}: {amount(nbytes)}"></i>'
        for kind, name, nbytes in parts
    )


def _lens(parts: Sequence[Part], scale: int) -> str:
    """Enlarge the model's own parts if their share is too small to distinguish them."""
    own = [part for part in parts if part[0] in _MODEL_PARTS]
    total = sum(nbytes for _, _, nbytes in own)
    if not 0 < total / scale < LENS_SHARE:
        return ""
    taken = [nbytes for kind, _, nbytes in parts if kind in ("other", "own")]
    # Parts too small to be seen are drawn a few pixels wide.
    first = f"max({sum(taken) / scale:.2%},{3 * len(taken)}px)"
    end = f"calc({first} + max({total / scale:.2%},{3 * len(own)}px))"
    return (
        f'<div aria-hidden="true"><div class="exl-lens" '
        f'style="clip-path:polygon({first} 0,{end} 0,100% 100%,0 100%)"></div>'
        f'<div class="exl-bar">{_bar(own, total)}</div></div>'
    )


def _key(parts: Sequence[Part]) -> str:
    """Name the colours in one line; the bytes are in the details."""
    entries = (
        f'<span><i class="exl-swatch exl-{kind}"></i>{escape(name)}</span>'
        for kind, name, _ in parts
    )
    return f'<p class="exl-key" aria-hidden="true">{"".join(entries)}</p>'


def _legend(parts: Sequence[Part]) -> str:
    entries = (
        f'<div><span class="exl-swatch exl-{kind}" aria-hidden="true"></span>'
        f'<dt>{escape(name)}</dt><dd title="{nbytes:,} bytes">{amount(nbytes)}</dd></div>'
        for kind, name, nbytes in parts
    )
    return f'<dl class="exl-parts">{"".join(entries)}</dl>'


def _agreement(reservation: Reservation, measured_bytes: int) -> str:
    difference = abs(measured_bytes - reservation.total_bytes)
    if difference:
        return f'<b class="exl-bad">They differ by {difference:,} bytes</b>'
    return '<b class="exl-good">Measured equals reserved, to the byte</b>'


def _proof(reservation: Reservation, measured_bytes: int | None) -> str:
    """Show the reserved and the measured bytes side by side."""
    if measured_bytes is None:
        return ""
    return (
        f'<dl class="exl-proof"><dt>Reserved</dt><dd>{reservation.total_bytes:,} bytes</dd>'
        f"<dt>Measured</dt><dd>{measured_bytes:,} bytes</dd></dl>"
    )


def _savings(reservation: Reservation) -> str:
    """Offer the cache types as buttons, with the memory that each saves at this context."""
    whole = reservation.bytes_by_cache_type["fp16"]
    buttons = []
    for cache_type, nbytes in reservation.bytes_by_cache_type.items():
        bits = CACHE_BITS.get(cache_type, cache_type)
        saved = f"saves {amount(whole - nbytes)}" if nbytes < whole else "saves nothing"
        buttons.append(_button(
            f"0 {cache_type}", f"Choose {bits} cache, {saved}",
            f"<b>{escape(bits)} cache</b>", saved,
            chosen=cache_type == reservation.cache_type,
        ))
    return (
        '<div class="exl-choices" role="group" aria-label="What each cache type saves">'
        f'<div>{"".join(buttons)}</div></div>'
    )


def _choices(reservation: Reservation) -> str:
    """Offer the largest contexts as buttons."""
    length = reservation.stretched_length
    buttons = "".join(_choice(reservation, *named) for named in CACHE_BITS.items())
    whole = ""
    if any(most > length for most in reservation.largest_ctx_size.values()):
        whole = f" (the model's own length is {length:,})"
    return (
        '<div class="exl-choices" role="group" aria-label="Largest context that fits">'
        f'<p class="exl-soft">Largest context that fits{whole}</p><div>{buttons}</div></div>'
    )


def _choice(reservation: Reservation, cache_type: str, bits: str) -> str:
    most = reservation.largest_ctx_size.get(cache_type, 0)
    if not most:
        return f'<button type="button" disabled><b>none</b><small>{bits} cache</small></button>'
    tokens = largest_choice(most, reservation.stretched_length)
    return _button(
        f"{tokens} {cache_type}", f"Choose {tokens:,} tokens of context, {bits} cache",
        f"<b>{tokens:,} tokens</b>", f"{bits} cache",
        chosen=(tokens, cache_type) == (reservation.ctx_size, reservation.cache_type),
    )


def _button(pick: str, label: str, heading: str, note: str, *, chosen: bool) -> str:
    return (
        f'<button type="button" data-pick="{escape(pick)}" '
        f'aria-pressed="{str(chosen).lower()}" onclick="{escape(_PICK_SCRIPT)}" '
        f'aria-label="{escape(label)}">{heading}<small>{escape(note)}</small></button>'
    )


def largest_choice(most: int, own_length: int) -> int:
    """Limit the largest context that fits to the model's own length, in whole pages."""
    return min(most, max(PAGE_LEN, own_length - own_length % PAGE_LEN))
