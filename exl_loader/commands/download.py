"""`python -m exl_loader download REPO[:REVISION]`: a model of the hub, after its plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..memory.reservation import LoadOptions
from ..memory.reservation.text import render
from ..utils.byte_counts import amount
from ..utils.errors import InvalidSettings, shown
from ..utils.progress import default_progress
from .hub import parse_repo
from .model_options import add_options, chosen_options, folder

if TYPE_CHECKING:
    from .model_download import ModelDownload

# Options of the plan that is shown.
PLAN_OPTIONS = (
    "ctx_size", "cache_type", "device", "gpu_split", "vram", "memory_limit", "embedding_device",
    "chunk_size", "as_architecture",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.add_argument(
        "repo", metavar="REPO[:REVISION]",
        help="such as OWNER/NAME or OWNER/NAME:4.0bpw; or the address of its page",
    )
    parser.add_argument("--revision", metavar="NAME",
                        help="branch, tag or commit (default main); EXL2 repositories keep each "
                        "size in a branch")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dir", metavar="FOLDER", type=folder, help="the model's folder")
    where.add_argument("--models-dir", metavar="FOLDER", type=folder, default=".",
                       help="the folder of model folders, in which the model gets one named as in "
                       "text-generation-webui (default: the current folder)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and download nothing")
    add_options(parser, PLAN_OPTIONS)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Show the plan, then download what is missing.

    Raises:
        ExlLoaderError: see `model_download.prepared` and `ModelDownload.fetch`.
    """
    from .model_download import prepared

    repo_id, revision = parse_repo(args.repo)
    if args.revision is not None:
        if revision not in (None, args.revision):
            raise InvalidSettings(
                "--revision", expected=f"{shown(revision)}, as in REPO:REVISION, or nothing",
                actual=shown(args.revision),
            )
        revision = args.revision
    progress = default_progress()
    with prepared(
        repo_id, revision, target=Path(args.dir) if args.dir else None,
        models_dir=Path(args.models_dir), options=LoadOptions(**chosen_options(args)),
        progress=progress,
    ) as model:
        report = _report(model)
        if not args.json:
            print(_readable(model, report), flush=True)
        model.check_disk()
        if not args.dry_run:
            try:
                model.fetch(progress)
            except KeyboardInterrupt:
                print("The same command goes on where this one was.", file=sys.stderr)
                raise
    if args.json:
        print(json.dumps(report, indent=2))
    elif not args.dry_run:
        print(f"{model.target} is complete. `python -m exl_loader chat` or `generate` runs it.")
    return 0


def _report(model: ModelDownload) -> dict[str, Any]:
    return {
        "repo": model.repo.repo_id,
        "revision": model.repo.revision,
        "commit": model.repo.commit,
        "folder": str(model.target),
        "files": {file.name: file.size for file in model.files},
        "total_bytes": model.total_bytes,
        "missing_bytes": model.missing_bytes(),
        "free_bytes": model.free_bytes(),
        "plan": model.reservation.to_dict(),
    }


def _readable(model: ModelDownload, report: dict[str, Any]) -> str:
    """Write the plan, and what is going to be downloaded."""
    missing, total = report["missing_bytes"], report["total_bytes"]
    there = f", {amount(total - missing)} of it here already" if missing < total else ""
    return "\n".join([
        render(model.reservation), "",
        f"{model.repo.repo_id}:{model.repo.revision} (commit {model.repo.commit[:12]}): "
        f"{amount(total)} in {len(model.files)} files{there}; "
        f"{amount(report['free_bytes'])} free on the disk",
    ])
