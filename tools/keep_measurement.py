"""Write a measurement.json in few bytes, to be kept in this repository.

    python tools/keep_measurement.py MODEL/measurement.json tools/smollm2-measurement.json

Ways to store a block that no budget from LEAST to MOST bits a weight needs are left out, except for
the smallest and the largest of each block, and numbers are rounded to 4 digits. The result is read
like every measurement.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

DIGITS = 4


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def kept(ways: list[dict[str, Any]], num_weights: int, least: float,
         most: float) -> list[dict[str, Any]]:
    """Return the ways of a block within the sizes, and its smallest and largest."""
    ends = ways[0]["total_bits"], ways[-1]["total_bits"]
    found = []
    for way in ways:
        if way["total_bits"] in ends or least <= way["total_bits"] / num_weights <= most:
            # A relative error of 0.001 has an accuracy of 0.999: the error is what is rounded.
            found.append(way | {"accuracy": round(1 - rounded(1 - way["accuracy"]), 10)})
    return found


def smaller(values: dict[str, Any], least: float, most: float) -> dict[str, Any]:
    """Return the contents of a measurement without what is left out.

    Args:
        values: of a file whose blocks have no parts.
        least, most: bits a weight.
    """
    entries = {}
    for name, ways in values["measurement"].items():
        # The largest way has 8 bits a weight and little more.
        num_weights = ways[-1]["total_bits"] / 8
        entries[name] = kept(ways, num_weights, least, most)
    own = dict(values["exl_loader"])
    own["divergence"] = {name: rounded(value) for name, value in own["divergence"].items()}
    return {**values, "measurement": entries, "exl_loader": own}


def write(values: dict[str, Any], path: Path) -> None:
    """Write a line for each way, so that a change shows where it is."""
    lines = []
    for name, ways in values["measurement"].items():
        rows = ",\n".join(json.dumps(way, separators=(",", ":")) for way in ways)
        lines.append(f"{json.dumps(name)}: [\n{rows}\n]")
    rest = {key: value for key, value in values.items() if key != "measurement"}
    text = "{\"measurement\": {\n" + ",\n".join(lines) + "\n},\n" + json.dumps(rest)[1:] + "\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--least", type=float, default=3.5, help="bits a weight")
    parser.add_argument("--most", type=float, default=math.inf, help="bits a weight")
    args = parser.parse_args()
    write(smaller(json.loads(args.measurement.read_text()), args.least, args.most), args.target)
    print(f"{args.target}: {args.target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
