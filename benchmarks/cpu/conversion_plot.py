"""Draw divergences of conversions by their size as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cpu.plot import COLOURS, LINE_HEIGHT, line, text, write_svg

if TYPE_CHECKING:
    from benchmarks.cpu.conversion import FileType, Result

WIDTH, HEIGHT = 760, 480
LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT = 64, 56, 640, 360
GREY = "#57606a"


class _Panel:
    """Places bits (linear) and divergences (logarithmic) in the picture.

    Args:
        results: everything that is drawn.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        bits = [one.bits for one in results]
        logs = [math.log10(one.divergence) for one in results]
        # A size that was asked for is stored in slightly fewer bits.
        self.bits = math.floor(min(bits) + 0.05), math.ceil(max(bits))
        self.logs = math.floor(min(logs)), max(logs) + 0.1

    def point(self, bits: float, divergence: float) -> tuple[float, float]:
        across = (bits - self.bits[0]) / (self.bits[1] - self.bits[0])
        up = (math.log10(divergence) - self.logs[0]) / (self.logs[1] - self.logs[0])
        return LEFT + PANEL_WIDTH * across, TOP + PANEL_HEIGHT * (1 - up)

    def axes(self) -> Iterator[str]:
        for bits in range(self.bits[0], self.bits[1] + 1):
            x, y = self.point(bits, 10 ** self.logs[0])
            yield line(x, TOP, x, y, "grid")
            yield text(x, y + 18, f"{bits}", "middle", "small")
        for power in range(self.logs[0], math.floor(self.logs[1]) + 1):
            x, y = self.point(self.bits[0], 10**power)
            yield line(x, y, LEFT + PANEL_WIDTH, y, "grid")
            yield text(x - 8, y + 4, f"{10**power:g}", "end", "small")

    def curve(self, results: Sequence[Result], colour: str, label: str) -> Iterator[str]:
        points = [self.point(one.bits, one.divergence) for one in results]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        x, y = points[-1]
        yield text(x + 8, y + 4, label, kind="small")

    def named(self, results: Mapping[str, Result]) -> Iterator[str]:
        """Draw single results; labels at the same bits must not overlap."""
        highest: dict[int, float] = {}
        ordered = sorted(results.items(), key=lambda item: item[1].divergence)
        for name, one in ordered:
            x, y = self.point(one.bits, one.divergence)
            column = round(one.bits * 2)
            label_y = highest[column] = min(y + 4, highest.get(column, HEIGHT) - LINE_HEIGHT)
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS["llama.cpp"]}"/>'
            yield text(x + 7, label_y, name, kind="small")

    def rings(self, results: Sequence[Result]) -> Iterator[str]:
        """Draw results without labels."""
        for one in results:
            x, y = self.point(one.bits, one.divergence)
            yield (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="none" '
                   f'stroke="{COLOURS["llama.cpp"]}" stroke-width="1.5"/>')


def write_picture(
    chosen: Sequence[Result], uniform: Mapping[str, Result],
    llama_cpp: Mapping[FileType, Result], path: Path,
) -> None:
    """Write the picture, without far larger types; arguments as those of `conversion.tables`."""
    most = max(one.bits for one in chosen) + 0.5
    plain = {
        one.name: result for one, result in llama_cpp.items()
        if not one.has_importance and result.bits <= most
    }
    weighted = [
        result for one, result in llama_cpp.items() if one.has_importance and result.bits <= most
    ]
    panel = _Panel([*chosen, *uniform.values(), *plain.values(), *weighted])
    parts = [
        text(LEFT, 30, "Divergence (nats a token) by stored bits a weight", kind="title"),
        *panel.axes(),
        *panel.curve(list(uniform.values()), GREY, "one width everywhere"),
        *panel.curve(chosen, COLOURS["exl_loader"], "chosen mixes"),
        *panel.named(plain),
        *panel.rings(weighted),
    ]
    note = (
        "Lower is better. Blue: exl_loader convert. Orange: file types of llama.cpp; rings: the "
        "same with an importance matrix."
    )
    write_svg(path, parts, note, (WIDTH, HEIGHT), LEFT)
