"""`serve-stage`: run layers of a model for another machine, which is in front of it."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from ..utils.errors import InvalidSettings
from ..utils.output import for_terminal
from .model_options import add_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the models' folder, this machine's devices, and where the first machine is."""
    parser.description = (
        "Run layers of a model for the first machine, which loads it with --machines. Waits for "
        "it, serves one session after another, and ends by Ctrl-C. Traffic is neither encrypted "
        "nor authenticated: use a network that only trusted machines reach."
    )
    parser.add_argument("models", metavar="MODELS", type=Path,
                        help="the model's folder, or a folder of models' folders")
    add_options(parser, ["device", "memory_limit"])
    group = parser.add_argument_group("where the first machine is; torchrun says it by itself")
    group.add_argument("--machines", metavar="ADDRESS",
                       help="the first machine's address, such as tcp://192.168.1.10:29500")
    group.add_argument("--rank", type=int, help="this machine's number: 1 for the second one")
    group.add_argument("--world-size", type=int, metavar="N",
                       help="how many machines there are, the first one included")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from ..machines.address import checked_seat, is_under_torchrun, parse_address, torchrun_seat
    from ..memory.reservation import LoadOptions
    from ..memory.reservation.answers import PlanAnswers

    given = (args.machines, args.rank, args.world_size)
    if any(value is not None for value in given):
        if None in given:
            raise InvalidSettings(
                "serve-stage", expected="--machines, --rank and --world-size together",
                actual="some of them",
            )
        seat = checked_seat(parse_address(args.machines), args.rank, args.world_size)
    elif is_under_torchrun():
        seat = torchrun_seat()
        checked_seat(seat.address, seat.rank, seat.world_size)
    else:
        raise InvalidSettings(
            "serve-stage", expected="--machines, --rank and --world-size, or a start by torchrun",
            actual="neither",
        )
    answers = PlanAnswers(
        args.models, LoadOptions(device=args.device, memory_limit=args.memory_limit)
    )
    from ..machines.station import Station
    from ..stage_server import StageServer

    station = Station(seat, _say)
    station.serve(StageServer(station, answers, _say))
    return 0


def _say(line: str) -> None:
    time = datetime.now().strftime("%H:%M:%S")
    print(f"{time} {for_terminal(line)}", file=sys.stderr, flush=True)
