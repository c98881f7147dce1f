"""`python -m exl_loader generate`: write text that follows a prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from ..memory.reservation import LoadOptions, plan
from ..memory.reservation.text import compare_allocated, compare_cache_types
from ..text.chat.fitting import context_notice
from ..utils.byte_counts import MIB
from ..utils.output import TerminalWriter
from ..utils.progress import default_progress
from ..utils.system.main_memory import peak_process_bytes
from .model_options import (
    DEMO_MODEL,
    add_load_arguments,
    add_sampling_arguments,
    chosen_options,
    open_model,
    read_text,
    sampling_settings,
)

if TYPE_CHECKING:
    from ..engine import LoadedModel
    from ..generation.generator import Generation

# The demo model was trained on Python sources alone.
DEMO_PROMPT = "import os\n\n\ndef read_lines(path):\n"
OTHER_PROMPT = "Once upon a time"

# 16, 8 and 4 bits: what `--memory` plans beside the chosen type.
COMPARED_CACHE_TYPES = ("fp16", "q8", "q4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_load_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="file with the text to continue; - for stdin"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")
    parser.add_argument(
        "--memory", action="store_true",
        help="print to stderr what each cache type reserves, before anything is loaded, and at the "
        "end the reserved bytes beside the allocated ones",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Generate text and print it to stdout as it comes.

    Raises:
        ExlLoaderError: the folder, an option or the prompt is wrong.
    """
    settings = sampling_settings(args)
    prompt = _prompt(args)
    progress = default_progress()
    if args.memory:
        print(_cache_types(args) + "\n", file=sys.stderr)
    began = time.perf_counter()
    with open_model(args, progress) as model:
        load_s = time.perf_counter() - began
        with model.generate(prompt, settings, progress=progress) as generation:
            if args.json:
                text = "".join(generation)
            else:
                text = ""
                _stream(generation, echo=prompt if _default_prompt(args) else "")
        result = _result(model, generation, load_s) | {"prompt": prompt, "text": text}
        memory = compare_allocated(
            model.reservation, model.allocated_bytes, model.allocated_on_machines()
        )
    if generation.finish_reason == "context":
        notice = context_notice(result["ctx_size"], result["new_tokens"])
        print(f"warning: {notice}", file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=2))
    if args.stats:
        print(_readable(result, generation.stats.draft_summary), file=sys.stderr)
    if args.memory:
        print("\n" + memory, file=sys.stderr)
    return 0


def _cache_types(args: argparse.Namespace) -> str:
    """Plan the model with each cache type of interest, and write the plans as a table."""
    options = LoadOptions(**chosen_options(args)).for_plan()
    chosen = plan(args.model, **options)
    options["ctx_size"] = chosen.ctx_size
    others = [
        plan(args.model, **options | {"cache_type": name})
        for name in COMPARED_CACHE_TYPES if name != chosen.cache_type
    ]
    return compare_cache_types([chosen, *others])


def _default_prompt(args: argparse.Namespace) -> bool:
    return args.prompt is None and args.prompt_file is None


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is not None:
        return read_text(args.prompt_file, "--prompt-file")
    return DEMO_PROMPT if args.model == str(DEMO_MODEL) else OTHER_PROMPT


def _stream(generation: Generation[str], echo: str) -> None:
    """Print pieces as they come.

    Args:
        echo: a prompt that the user did not type, printed first; empty for none.
    """
    last = echo
    writer = TerminalWriter(sys.stdout)
    writer.write(echo)
    for piece in generation:
        writer.write(piece)
        last = piece
    writer.end()
    if not last.endswith("\n"):
        print()


def _result(model: LoadedModel, generation: Generation[str], load_s: float) -> dict[str, Any]:
    stats = generation.stats
    return {
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "load_s": round(load_s, 3),
        "prefill_s": round(stats.prefill_s, 4),
        "decode_s": round(stats.decode_s, 4),
        "prompt_tokens_per_s": round(stats.prompt_tokens_per_s, 2),
        "tokens_per_s": round(stats.tokens_per_s, 2),
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "skipped_drafts": stats.skipped_drafts,
        "ctx_size": model.ctx_size,
        "allocated_bytes": model.allocated_bytes(),
        "peak_memory_bytes": peak_process_bytes(),
    }


def _readable(result: dict[str, Any], drafts: str) -> str:
    parts = [
        f"prompt {result['prompt_tokens']} tokens, {result['prompt_tokens_per_s']:.1f} tokens/s",
        f"new {result['new_tokens']} tokens, {result['tokens_per_s']:.1f} tokens/s"
        f" ({result['finish_reason']})",
        drafts,
        f"loaded in {result['load_s']:.1f} s",
        f"model {result['allocated_bytes'] / MIB:.1f} MiB",
        f"peak of the process {result['peak_memory_bytes'] / MIB:.1f} MiB",
    ]
    return "; ".join(filter(None, parts))
