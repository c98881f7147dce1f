"""`plan`: the memory a model will take, computed from headers, without loading it."""

from __future__ import annotations

import argparse
import json

from ..memory.reservation import plan
from ..memory.reservation.text import render
from ..model.workspace import DEFAULT_CHUNK_SIZE, DEFAULT_MAX_BATCH_SIZE
from .model_options import add_draft_arguments, add_rope_arguments, ctx_size, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`; they are those of `reservation.plan`."""
    parser.add_argument("model_dir", metavar="MODEL", type=folder, help="folder with config.json")
    parser.add_argument(
        "--ctx-size",
        metavar="N|auto",
        type=ctx_size,
        help="tokens of context, or auto for the most that fit "
        "(default: the model's own length, at most 8192)",
    )
    parser.add_argument(
        "--cache-type",
        metavar="TYPE",
        default="fp16",
        help="fp16, q8, q6, q4, or keys and values apart such as q8_q4 (default: fp16)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda:0, or several: cuda:0,cuda:1 (default: auto)"
    )
    parser.add_argument(
        "--gpu-split", metavar="GIB,GIB", help="GiB to use of each card, such as 20,24"
    )
    parser.add_argument(
        "--vram", metavar="SIZE", help="plan for cards that are not here: 24GiB, or 24GiB,12GiB"
    )
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="most to use of each device, such as 16GiB"
    )
    parser.add_argument(
        "--chunk-size",
        metavar="N",
        type=int,
        default=DEFAULT_CHUNK_SIZE,
        help="most tokens in one forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch-size",
        metavar="N",
        type=int,
        default=DEFAULT_MAX_BATCH_SIZE,
        help="most sequences in one forward pass (default: %(default)s)",
    )
    add_rope_arguments(parser)
    add_draft_arguments(parser)
    parser.add_argument("--json", action="store_true", help="bytes, for a program to read")


def run(args: argparse.Namespace) -> int:
    """Print the plan. The exit code is 0 whether it fits or not: `fits` is an answer."""
    reservation = plan(
        args.model_dir,
        args.ctx_size,
        args.cache_type,
        device=args.device,
        gpu_split=args.gpu_split,
        vram=args.vram,
        memory_limit=args.memory_limit,
        chunk_size=args.chunk_size,
        max_batch_size=args.max_batch_size,
        alpha_value=args.alpha_value,
        compress_pos_emb=args.compress_pos_emb,
        model_draft=args.model_draft,
        ctx_size_draft=args.ctx_size_draft,
    )
    print(json.dumps(reservation.to_dict(), indent=2) if args.json else render(reservation))
    return 0
