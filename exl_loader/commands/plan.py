"""`plan`: the memory that a model will take, computed from headers, without loading it."""

from __future__ import annotations

import argparse
import json

from ..machines.connected import connection_of
from ..memory.reservation import LoadOptions, plan
from ..memory.reservation.text import render
from ..utils.progress import default_progress
from .model_options import add_options, chosen_options, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model folder and the options of `plan`.

    `replacing` is left out, because no model is loaded in this process.
    """
    parser.add_argument("model_dir", metavar="MODEL", type=folder, help="folder with config.json")
    add_options(parser, [name for name in LoadOptions.names("plan") if name != "replacing"])
    parser.add_argument("--json", action="store_true", help="print the figures in bytes as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan. The exit code is 0 whether the model fits or not: `fits` is an answer."""
    options = chosen_options(args)
    # The plan uses the same connection. Here it is said for whom this waits.
    connection_of(options["machines"], default_progress())
    reservation = plan(args.model_dir, **options)
    print(json.dumps(reservation.to_dict(), indent=2) if args.json else render(reservation))
    return 0
