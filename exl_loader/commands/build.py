"""`python -m exl_loader build`: compile the kernels ahead of the first load."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ..backends.build.build import build_entry
from ..backends.build.spec import BuildSpec, require_cpu_spec
from ..backends.build.store import Entry, discard, find_entry
from ..backends.cuda.arch import arch_name, parse_archs
from ..backends.cuda.compilers import cuda_spec
from ..backends.cuda.driver import driver_release
from ..utils.progress import default_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.add_argument(
        "--cuda-arch", metavar="ARCH",
        help="compile the CUDA kernels instead, for one or more architectures such as sm_90, 8.6, "
        "sm_80,sm_86 or all",
    )
    parser.add_argument(
        "--force", action="store_true", help="compile again where a finished build exists"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Build, and print where the result is and how long that took.

    Raises:
        KernelBuildError: there is no compiler, or the kernels do not compile.
        InvalidSettings: `--cuda-arch` names no architecture.
    """
    if args.cuda_arch is not None:
        return _run_cuda(args.cuda_arch, args.force, args.json)
    spec = require_cpu_spec()
    entry, made = _build(spec, args.force)
    library = entry.directory / spec.library_name
    result = {"library": str(library), "library_bytes": entry.total_bytes, **made}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_result(result, str(library))
    return 0


def _run_cuda(archs: str, force: bool, as_json: bool) -> int:
    """Build the CUDA kernels for each architecture. No card is needed."""
    driver = driver_release()
    results = []
    for capability in parse_archs(archs):
        entry, made = _build(cuda_spec(capability, driver=driver), force)
        arch = arch_name(capability)
        folder = str(entry.directory)
        results.append(
            {"arch": arch, "folder": folder, "total_bytes": entry.total_bytes, **made}
        )
        if not as_json:
            _print_result(results[-1], f"{arch} in {folder}")
    if as_json:
        print(json.dumps(results, indent=2))
    return 0


def _build(spec: BuildSpec, force: bool) -> tuple[Entry, dict[str, Any]]:
    """Build, and describe how: whether anything was compiled, seconds, compiler and flags."""
    found = find_entry(spec)
    if found is not None and force:
        discard(found.files[0])
        found = None
    began = time.perf_counter()
    entry = build_entry(spec, default_progress())
    return entry, {
        "compiled": found is None,
        "seconds": round(time.perf_counter() - began, 3),
        "compiler": spec.compiler.version,
        "flags": list(spec.flags),
    }


def _print_result(result: dict[str, Any], built: str) -> None:
    if result["compiled"]:
        print(f"compiled {built} in {result['seconds']:.1f} s with {result['compiler']}")
    else:
        print(f"already there: {built}")
