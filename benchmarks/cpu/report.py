"""Keep the results of speed.py as JSON, compare them pair by pair, print them as tables.

The file has an object with a list of records for each machine.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

OURS = "exl_loader"
# The tables are between these two marks of a document.
FIRST_MARK, LAST_MARK = "<!-- cpu -->", "<!-- end cpu -->"
KEY = ("what", "engine", "weights", "cache", "depth", "beside", "requests")
# `what` of a contestant that ended by itself; such a record has a `reason`.
SKIPPED = "skipped"
# The targets: (what, cache) -> depth -> ratio to llama.cpp.
TARGETS = {
    ("decode", "fp16"): {0: 1.0, 2048: 1.3},
    ("decode", "q4"): {0: 1.0, 2048: 2.5},
    ("prefill", "fp16"): {0: 1.2, 2048: 1.3},
    ("prefill", "q4"): {0: 1.2, 2048: 4.0},
}


class Results:
    """Records of one machine, one for each KEY; `seconds` holds one time a round.

    Args:
        path: the file. machine: its name.
    """

    def __init__(self, path: Path, machine: str, records: Iterable[Record] = ()):
        self.path, self.machine = path, machine
        self._records = {_key(record): record for record in records}

    @classmethod
    def read(cls, path: Path, machine: str) -> Results:
        """Read a machine's records; none where the file lacks them."""
        return cls(path, machine, _read(path).get(machine, ()))

    def put(self, record: Record) -> None:
        """Keep a record; it replaces an older one of the same measurement, or that it failed."""
        self._records.pop(_key({**record, "what": SKIPPED}), None)
        self._records[_key(record)] = record

    def drop(self, **wanted: Any) -> None:
        """Forget the records with these values."""
        for record in self.select(**wanted):
            del self._records[_key(record)]

    def write(self) -> None:
        """Write the machine's records beside those of others."""
        machines = _read(self.path) | {self.machine: list(self._records.values())}
        parts = []
        for name, records in machines.items():
            lines = ",\n".join(json.dumps(record) for record in records)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        self.path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    def select(self, **wanted: Any) -> list[Record]:
        return [
            record for record in self._records.values()
            if all(record.get(field) == value for field, value in wanted.items())
        ]  # fmt: skip


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(field) for field in KEY)


def _read(path: Path) -> dict[str, list[Record]]:
    if not path.exists():
        return {}
    machines: dict[str, list[Record]] = json.loads(path.read_text(encoding="utf-8"))
    return machines


def read_machines(path: Path) -> list[Results]:
    """Read the records of every machine, in the file's order."""
    return [Results(path, machine, records) for machine, records in _read(path).items()]


def slug(machine: str) -> str:
    """Return a machine's name for file names."""
    return re.sub("[^a-z0-9]+", "-", machine.lower()).strip("-")


def nearest(bytes_per_token: dict[str, int]) -> str | None:
    """Return the name of llama.cpp's weights that are nearest in size to ours."""
    own = bytes_per_token["EXL2"]
    sizes = {name: size for name, size in bytes_per_token.items() if name != "EXL2"}
    return min(sizes, key=lambda name: abs(sizes[name] - own)) if sizes else None


def tokens_per_s(record: Record) -> float:
    return float(record["tokens"] / statistics.median(record["seconds"]))


def speed_ratio(record: Record, other: Record) -> tuple[float, float, float]:
    """Return median, least and largest of how many times faster `record` is, by rounds."""
    pairs = zip(record["seconds"], other["seconds"], strict=True)
    ratios = [theirs / ours for ours, theirs in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def step_bytes(record: Record) -> float:
    """Return the bytes that one decoding step has to read: weights, and the cache to its depth."""
    depth = record["depth"] + record["tokens"] / 2
    return float(record["weight_bytes_per_token"] + depth * record["cache_bytes_per_token"])


def read_share(record: Record) -> float:
    """Return the share of the bandwidth that plain loads reached just before, median of rounds."""
    nbytes = step_bytes(record) * record["tokens"]
    pairs = zip(record["seconds"], record["read_bytes_per_s"], strict=True)
    return statistics.median(nbytes / seconds / read for seconds, read in pairs)


def comparisons(results: Results, what: str) -> list[tuple[Record, Record]]:
    """Pair each of our measurements with those of llama.cpp that took turns with it."""
    pairs = []
    for own in results.select(what=what, engine=OURS):
        rivals = results.select(what=what, engine="llama.cpp", depth=own.get("depth"),
                                beside=own.get("beside"), cache=own["cache"],
                                requests=own.get("requests"))
        pairs += [(own, other) for other in rivals if len(other["seconds"]) == len(own["seconds"])]
    return sorted(pairs, key=lambda p: (_cache_order(p[0]), p[0].get("depth", 0),
                                        p[0].get("requests", 0), p[1]["weight_bytes_per_token"]))


def _cache_order(record: Record) -> int:
    return ("fp16", "q8", "q4").index(record["cache"])


def tables(results: Results) -> str:
    """Return everything that was measured, as Markdown."""
    parts = [
        _speed(results, "decode", "Generated tokens/s"),
        _speed(results, "prefill", "Prompt tokens/s"),
        _cache_types(results),
        _curve(results),
        _bandwidth(results),
        _batch(results),
        _first_token(results),
        _load(results),
        _skipped(results),
    ]
    return "\n\n".join(part for part in parts if part)


def document_part(machines: list[Results], folder: Path) -> str:
    """Return a section for each machine, with its picture, if there is one, and its tables.

    Args:
        folder: of the document, which has the pictures in `images`.
    """
    parts = []
    for results in machines:
        parts.append(f"### {results.machine}")
        picture = f"images/{picture_name(results.machine)}"
        if (folder / picture).exists():
            alt = f"Cost of a token by depth, and ratios: {results.machine}"
            parts.append(f"![{alt}]({picture})")
        parts.append(tables(results))
    return "\n\n".join(parts)


def picture_name(machine: str) -> str:
    return f"benchmarks-cpu-{slug(machine)}.svg"


def update_document(machines: list[Results], path: Path) -> None:
    """Put the sections between the document's marks; a document without marks stays as it is."""
    text = path.read_text(encoding="utf-8")
    before, first, rest = text.partition(FIRST_MARK)
    _, last, after = rest.partition(LAST_MARK)
    if last:
        part = document_part(machines, path.parent)
        path.write_text(f"{before}{first}\n{part}\n{last}{after}", encoding="utf-8")


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"**{title}**", "", *lines])


def _speed(results: Results, what: str, title: str) -> str:
    rows = []
    for own, other in comparisons(results, what):
        if own["beside"] == "curve":
            continue
        ratio, least, most = speed_ratio(own, other)
        target = TARGETS.get((what, own["cache"]), {}).get(own["depth"])
        rows.append([own["cache"], f"{own['depth']:,}", f"{tokens_per_s(own):.1f}",
                     f"{other['weights']} {tokens_per_s(other):.1f}",
                     f"{ratio:.2f} ({least:.2f} to {most:.2f})", f"≥ {target}" if target else ""])
    return _table(title, ["cache", "depth", "exl_loader", "llama.cpp", "ratio, pair by pair",
                         "target"], rows)


def _first_token(results: Results) -> str:
    rows = []
    for own, other in comparisons(results, "first_token"):
        ratio = speed_ratio(own, other)[0]
        ours, theirs = (statistics.median(r["seconds"]) for r in (own, other))
        rows.append([own["cache"], str(own["tokens"]), f"{ours:.2f} s",
                     f"{other['weights']} {theirs:.2f} s", f"{ratio:.2f}"])
    return _table("Time to the first token", ["cache", "prompt tokens", "exl_loader", "llama.cpp",
                                             "ratio"], rows)


def _batch(results: Results) -> str:
    rows = []
    for own, other in comparisons(results, "batch"):
        ratio, least, most = speed_ratio(own, other)
        rows.append([own["cache"], str(own["requests"]), f"{tokens_per_s(own):.1f}",
                     f"{other['weights']} {tokens_per_s(other):.1f}",
                     f"{ratio:.2f} ({least:.2f} to {most:.2f})"])
    return _table("Requests at once (generated tokens/s of all)", [
        "cache", "requests", "exl_loader", "llama.cpp", "ratio, pair by pair"], rows)


def _skipped(results: Results) -> str:
    rows = [
        [record["engine"], record["weights"], record["cache"], record.get("build", ""),
         record["reason"]]
        for record in results.select(what=SKIPPED)
    ]
    return _table("Skipped", ["engine", "weights", "cache", "built for", "why"], rows)


def _bandwidth(results: Results) -> str:
    rows = []
    for record in results.select(what="decode"):
        if record["beside"] != record["cache"]:
            continue
        read = statistics.median(record["read_bytes_per_s"])
        rows.append([record["engine"], record["weights"], record["cache"],
                     f"{record['depth']:,}", f"{step_bytes(record) / 1e6:.0f} MB",
                     f"{step_bytes(record) * tokens_per_s(record) / 1e9:.1f} GB/s",
                     f"{read / 1e9:.1f} GB/s", f"{read_share(record):.0%}"])
    return _table("Memory read in decoding", ["engine", "weights", "cache", "depth", "a token",
                                             "achieved", "machine's bandwidth", "share, median"],
                 rows)


def _cache_types(results: Results) -> str:
    rows = []
    for own in results.select(what="decode", engine=OURS):
        if own["cache"] == "fp16":
            continue
        for plain in results.select(what="decode", engine=OURS, cache="fp16",
                                    depth=own["depth"], beside=own["beside"]):
            ratio, least, most = speed_ratio(own, plain)
            rows.append([own["cache"], f"{own['depth']:,}", f"{tokens_per_s(own):.1f}",
                         f"{tokens_per_s(plain):.1f}", f"{ratio:.2f} ({least:.2f} to {most:.2f})"])
    return _table("Our quantised caches beside our own fp16 (generated tokens/s; target 0.95)",
                 ["cache", "depth", "quantised", "fp16", "ratio, pair by pair"], rows)


def _curve(results: Results) -> str:
    """Return the cost by depth, and its distance from a straight line."""
    rows = []
    curve = results.select(what="decode", beside="curve")
    depths = sorted({r["depth"] for r in curve})
    for engine, weights, cache in dict.fromkeys(
        (r["engine"], r["weights"], r["cache"]) for r in curve
    ):
        series = [r for r in curve if (r["engine"], r["weights"], r["cache"])
                  == (engine, weights, cache)]
        costs = {r["depth"]: 1e3 / tokens_per_s(r) for r in series}
        slope, start, worst = straight_line(costs)
        rows.append([engine, weights, cache, *(f"{costs[d]:.1f}" for d in depths),
                     f"{start:.1f} + {1e3 * slope:.2f} a 1,000", f"{worst:.0%}"])
    head = ["engine", "weights", "cache", *(f"{d:,}" for d in depths), "line", "largest distance"]
    return _table("Milliseconds a generated token, by depth", head, rows)


def straight_line(costs: dict[int, float]) -> tuple[float, float, float]:
    """Fit a line by least squares: slope, value at 0, and the largest relative distance."""
    if len(costs) < 2:
        return 0.0, next(iter(costs.values())), 0.0
    slope, start = statistics.linear_regression(list(costs), list(costs.values()))
    worst = max(abs(cost / (start + slope * depth) - 1) for depth, cost in costs.items())
    return slope, start, worst


def _load(results: Results) -> str:
    rows = []
    for record in results.select(what="load"):
        seconds = statistics.median(record["seconds"])
        rate = _rate(record, record["seconds"])
        reserving = [tasks["reserving memory"] for tasks in record.get("tasks", ()) if tasks]
        reading = [tasks["loading weights"] for tasks in record.get("tasks", ()) if tasks]
        rows.append([record["engine"], record["weights"], f"{record['file_bytes'] / 1e6:.0f} MB",
                     f"{seconds:.2f} s", rate,
                     f"{statistics.median(reserving):.2f} s" if reserving else "",
                     _rate(record, reading) if reading else "",
                     f"{record['peak_bytes'] / 2**20:.0f} MiB"])
    head = ["engine", "weights", "file", "load", "rate", "of it the system providing memory",
            "reading and repacking alone", "peak memory"]
    return _table("Loading from the page cache, and peak memory of the process", head, rows)


def _rate(record: dict, seconds: list[float]) -> str:
    return f"{record['file_bytes'] / statistics.median(seconds) / 1e9:.2f} GB/s"
