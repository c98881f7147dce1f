"""Draw the results of speed.py as SVG: cost of a token by depth, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import log2
from pathlib import Path

from benchmarks.cpu.report import Record, Results, comparisons, speed_ratio

WIDTH, HEIGHT = 960, 460
LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT = 64, 56, 400, 330
BAR_LEFT = 640
LINE_HEIGHT = 13
# Blue and orange, which colour-blind people tell apart; dashes for quantised caches.
COLOURS = {"exl_loader": "#1f6feb", "llama.cpp": "#d9730d"}
DASHES = {"fp16": "", "q8": "2 3", "q4": "7 4"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.small{font-size:11px;fill:#57606a}"
    ".title{font-size:15px;font-weight:600}.axis{stroke:#8c959f}.grid{stroke:#d8dee4}"
)


def text(x: float, y: float, label: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{label}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def milliseconds(record: Record) -> float:
    return 1e3 * statistics.median(record["seconds"]) / record["tokens"]


def nice_step(largest: float, steps: int) -> float:
    """Return 1, 2 or 5 times a power of ten, such that about `steps` steps reach `largest`."""
    power = 10.0
    while power * steps > largest:
        power /= 10
    return next((m * power for m in (1, 2, 5, 10, 20, 50) if m * power * steps >= largest),
                100 * power)


def curve_panel(results: Results) -> list[str]:
    """Draw milliseconds of a generated token against the depth."""
    records = results.select(what="decode", beside="curve")
    if not records:
        return []
    deepest = max(max(r["depth"] for r in records), 1)
    step = nice_step(max(map(milliseconds, records)), 5)
    top = step * (int(max(map(milliseconds, records)) / step) + 1)

    def point(depth: float, ms: float) -> tuple[float, float]:
        return (LEFT + PANEL_WIDTH * depth / deepest,
                TOP + PANEL_HEIGHT * (1 - ms / top))

    parts = [text(LEFT, 30, "Milliseconds a generated token, by depth", kind="title")]
    for i in range(round(top / step) + 1):
        y = point(0, i * step)[1]
        parts += [line(LEFT, y, LEFT + PANEL_WIDTH, y, "grid" if i else "axis"),
                  text(LEFT - 8, y + 4, f"{i * step:g}", "end", "small")]
    for depth in sorted({r["depth"] for r in records}):
        parts.append(text(point(depth, 0)[0], TOP + PANEL_HEIGHT + 18, f"{depth:,}", "middle",
                          "small"))
    ends = []
    for name in dict.fromkeys((r["engine"], r["weights"], r["cache"]) for r in records):
        engine, weights, cache = name
        series = sorted(results.select(what="decode", beside="curve", engine=engine,
                                       weights=weights, cache=cache), key=lambda r: r["depth"])
        points = [point(r["depth"], milliseconds(r)) for r in series]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[engine]}" '
                     f'stroke-width="2" stroke-dasharray="{DASHES[cache]}"/>')
        x, y = points[-1]
        ends.append((y + 4, x + 6, f"{engine} {weights} {cache}"))
    lowest = 0.0
    for y, x, label in sorted(ends):  # labels of lines that end close together must not overlap
        lowest = max(y, lowest + LINE_HEIGHT)
        parts.append(text(x, lowest, label, kind="small"))
    return parts


def bar_panel(results: Results) -> list[str]:
    """Draw the speed relative to llama.cpp at the nearest size, on a logarithmic scale."""
    bars = []
    for what, label in (("decode", "decode"), ("prefill", "prefill")):
        best: dict[tuple[str, int], tuple[Record, Record]] = {}
        for own, other in comparisons(results, what):
            if own["beside"] == "curve":
                continue
            key = (own["cache"], own["depth"])
            if key not in best or _distance(own, other) < _distance(*best[key]):
                best[key] = (own, other)
        bars += [(f"{label} {cache}, {depth:,}", speed_ratio(*pair)[0])
                 for (cache, depth), pair in best.items()]
    if not bars:
        return []
    width, pitch = 200.0, PANEL_HEIGHT / len(bars)
    doublings = max(1, *(log2(ratio) for _, ratio in bars))
    parts = [text(BAR_LEFT - 60, 30, "Times llama.cpp's speed, nearest size", kind="title")]
    for i, (label, ratio) in enumerate(bars):
        y = TOP + i * pitch
        end = width * log2(ratio) / doublings
        parts += [
            f'<rect x="{BAR_LEFT + 60 + min(end, 0):.1f}" y="{y:.1f}" width="{abs(end):.1f}" '
            f'height="{0.7 * pitch:.1f}" fill="{COLOURS["exl_loader"]}"/>',
            text(BAR_LEFT + 50 + min(end, 0), y + 0.55 * pitch, label, "end", "small"),
            text(BAR_LEFT + 66 + max(end, 0), y + 0.55 * pitch, f"{ratio:.2f}", kind="small"),
        ]
    parts.append(line(BAR_LEFT + 60, TOP - 6, BAR_LEFT + 60, TOP + PANEL_HEIGHT, "axis"))
    return parts


def _distance(own: Record, other: Record) -> float:
    return float(abs(own["weight_bytes_per_token"] - other["weight_bytes_per_token"]))


def write_svg(
    path: Path, parts: Sequence[str], note: str, size: tuple[int, int], left: int
) -> None:
    """Write a picture of these elements, with a note at its foot.

    Args:
        size: width and height of the picture.
        left: where the note begins.
    """
    width, height = size
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join([*parts, text(left, height - 16, note, kind="small")])
        + "\n</svg>\n", encoding="utf-8"
    )


def write_picture(results: Results, path: Path) -> None:
    """Write the picture, unless there are no measurements."""
    parts = curve_panel(results) + bar_panel(results)
    if not parts:
        return
    note = "Two engines in turns on the same threads; bars are logarithmic and begin at 1."
    write_svg(path, parts, note, (WIDTH, HEIGHT), LEFT)
