"""`python -m exl_loader convert SRC DST`: quantise a model folder to EXL2."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.progress import default_progress
from ..utils.table import MAIN_MEMORY
from .model_options import add_options

if TYPE_CHECKING:
    from ..convert.conversion import Conversion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.add_argument("source", type=Path, metavar="SRC", help="unquantised model folder")
    parser.add_argument("target", type=Path, metavar="DST", help="EXL2 folder to make")
    parser.add_argument(
        "--bits", type=float, default=4.5, help="average bits per weight (default: 4.5)"
    )
    parser.add_argument(
        "--head-bits", type=int, default=6, choices=(6, 8),
        help="bits of the output head (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="text similar to what the model will be used for (default: prose, code, "
        "conversations and several languages)",
    )
    parser.add_argument(
        "--calibration-rows", type=int, default=64, metavar="N",
        help="rows of calibration text (default: 64)",
    )
    parser.add_argument(
        "--calibration-row-len", type=int, default=512, metavar="N",
        help="tokens in a row (default: 512)",
    )
    parser.add_argument(
        "--measurement", type=Path, metavar="FILE",
        help="measurement.json of an earlier conversion of this model, instead of measuring again",
    )
    parser.add_argument(
        "--device", default=MAIN_MEMORY, metavar="DEVICE",
        help="runs layers and quantises them, such as cuda:0 (default: %(default)s)",
    )
    add_options(parser, ["as_architecture"])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was chosen.

    Raises:
        ExlLoaderError: see `convert`.
    """
    from ..convert.work_folder import WorkFolder

    try:
        result = _convert(args)
    except KeyboardInterrupt:
        work = WorkFolder(args.target).path
        if work.exists():
            print(f"The same command continues from {work}.", file=sys.stderr)
        raise
    print(json.dumps(result.as_dict(), indent=2) if args.json else describe(result))
    return 0


def _convert(args: argparse.Namespace) -> Conversion:
    from ..convert import convert

    return convert(
        args.source,
        args.target,
        bits=args.bits,
        head_bits=args.head_bits,
        calibration=args.calibration,
        calibration_rows=args.calibration_rows,
        calibration_row_len=args.calibration_row_len,
        measurement=args.measurement,
        as_architecture=args.as_architecture,
        device=args.device,
        progress=default_progress(),
        announce=lambda reservation: print(reservation, file=sys.stderr),
    )


def describe(result: Conversion) -> str:
    """Describe the result of a conversion in a few lines."""
    mixes = Counter("/".join(map(str, mix.bits)) for mix in result.layers.values())
    layers = ", ".join(f"{count} x {bits} bit" for bits, count in sorted(mixes.items()))
    return "\n".join(
        [
            f"{result.out_dir}: {result.bits_per_weight:.2f} bits per weight, "
            f"{result.file_bytes / 2**20:.1f} MiB of weights",
            f"layers: {layers}; head: {result.head_bits} bit",
            f"calibration: {result.calibration_tokens} tokens; {result.seconds:.0f} s",
        ]
    )
