"""`python -m exl_loader doctor`: report what this machine has and how to add what is missing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends.build import toolchain
from ..backends.build.spec import cpu_spec
from ..backends.build.store import find_built, kernel_dirs, list_built, writable_dir
from ..backends.cuda.cards import query_nvidia_smi
from ..backends.reference import reference_is_forced
from ..utils.errors import ExlLoaderError, InvalidSettings
from ..utils.system import system_name
from ..utils.system.processors import cpu_features, cpu_name
from .doctor_cuda import cuda_rows, examine_cuda
from .doctor_machines import describe_machines_report, examine_machines

# The packages that the engine imports. `extension` needs gradio as well.
REQUIRED_PACKAGES = (
    "torch",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "ninja",
    "jinja2",
    "numpy",
    "rich",
    "filelock",
    "platformdirs",
)
OPTIONAL_PACKAGES = ("gradio", "transformers")

# Instruction sets that decide which kernels are compiled. The JSON report lists every feature.
NOTABLE_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    host = parser.add_mutually_exclusive_group()
    host.add_argument("--webui", type=Path, metavar="PATH",
                      help="examine the loader in this text-generation-webui instead")
    host.add_argument("--tabbyapi", type=Path, metavar="PATH",
                      help="examine the backend in this TabbyAPI instead")
    host.add_argument("--machines", metavar="ADDRESS",
                      help="reach the machines that run serve-stage for this one, which has the "
                      "address, and measure the links between them instead")
    parser.add_argument("--python", type=Path, help="the Python that runs the web UI or TabbyAPI")


def run(args: argparse.Namespace) -> int:
    """Print a report. The exit code is 1 where something is missing."""
    if args.webui is not None:
        return _run_host("--webui", args.webui, args.python, args.json)
    if args.tabbyapi is not None:
        return _run_host("--tabbyapi", args.tabbyapi, args.python, args.json)
    if args.machines is not None:
        found = examine_machines(args.machines)
        print(json.dumps(found, indent=2) if args.json else describe_machines_report(found))
        return 1 if found["problems"] else 0
    report = examine()
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 1 if report["problems"] else 0


def _run_host(option: str, folder: Path, python: Path | None, as_json: bool) -> int:
    """Print what keeps the engine from working in a host. The exit code is 1 where anything does.

    Args:
        option: `--webui` or `--tabbyapi`.
        folder: the host's folder. python: its Python, if it cannot be found.

    Raises:
        InvalidSettings: the extension is not part of this installation.
    """
    try:
        # Not at the top of the file: the installed package has the engine alone.
        from extension.install import tabbyapi, webui
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "extension":
            raise
        raise InvalidSettings(
            option, expected="a checkout of exl_loader, which has the extension",
            actual="an installed package, which has the engine alone",
            remedy="Run doctor in the checkout that install.py was run from",
        ) from None
    is_webui = option == "--webui"
    found = (webui.problems if is_webui else tabbyapi.problems)(folder, python)
    if as_json:
        print(json.dumps({"problems": [vars(problem) for problem in found]}, indent=2))
    else:
        what = "loader" if is_webui else "backend"
        print("\n".join(map(str, found)) or f"the {what} is ready in {folder}")
    return 1 if found else 0


def examine() -> dict[str, Any]:
    """Examine the machine. Nothing is compiled, and none of the reported packages is imported.

    Returns:
        `problems`, a list of {problem, remedy}, and what was found, by subject.
    """
    problems: list[dict[str, str]] = []
    packages = {name: _version(name) for name in REQUIRED_PACKAGES + OPTIONAL_PACKAGES}
    missing = [name for name in REQUIRED_PACKAGES if packages[name] is None]
    if missing:
        problems.append(
            {
                "problem": f"packages are missing: {', '.join(missing)}",
                "remedy": f"pip install {' '.join(missing)}",
            }
        )
    gpus = find_gpus()
    cuda, errors = examine_cuda(gpus)
    problems += map(_problem, errors)
    return {
        "exl_loader": __version__,
        "python": platform.python_version(),
        "system": system_name(),
        "cpu": {
            "name": cpu_name(),
            "threads": os.cpu_count(),
            "features": list(cpu_features()),
        },
        "gpus": gpus,
        "cuda": cuda,
        "compiler": _examine_compiler(problems, bool(cuda["kernels"])),
        "ninja": toolchain.find_ninja(),
        "kernels": _examine_kernels(problems),
        "packages": packages,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _problem(error: ExlLoaderError) -> dict[str, str]:
    found = f": {error.actual}" if error.actual else ""
    return {"problem": f"{error.thing}{found}", "remedy": error.remedy or ""}


def _examine_compiler(
    problems: list[dict[str, str]], has_cards: bool
) -> dict[str, Any] | None:
    """Report the compiler of the CPU kernels. None is a problem unless a card can run models."""
    try:
        compiler = toolchain.find_compiler()
    except ExlLoaderError as error:
        problems.append(_problem(error))
        return None
    if compiler is None:
        if has_cards:
            return None
        problems.append(
            {
                "problem": "no C++ compiler, so models run on the slow reference operations",
                "remedy": toolchain.compiler_remedy(),
            }
        )
        return None
    return {
        "command": list(compiler.command),
        "kind": compiler.kind,
        "version": compiler.version,
    }


def _examine_kernels(problems: list[dict[str, str]]) -> dict[str, Any]:
    """Report the folder of compiled kernels, its builds, and the build of this version."""
    current = None
    folder = str(kernel_dirs()[0])
    try:
        folder = str(writable_dir())
        spec = cpu_spec()
        current = find_built(spec) if spec else None
    except ExlLoaderError as error:
        problems.append(_problem(error))
    return {
        "folder": folder,
        "current": str(current) if current else None,
        "builds": [
            {"folder": str(entry.directory), "total_bytes": entry.total_bytes}
            for entry in list_built()
        ],
        "reference_forced": reference_is_forced(),
    }


def find_gpus() -> list[dict[str, Any]]:
    """List NVIDIA GPUs under their driver's names; [] without a driver."""
    query = "--query-gpu=compute_cap,memory.total,driver_version,name"
    return [
        # nvidia-smi reports memory in MiB.
        {
            "name": name,
            "memory_bytes": int(memory) << 20,
            "driver": driver,
            "compute_capability": capability,
        }
        for capability, memory, driver, name in query_nvidia_smi(query, cells=4)
        if memory.isdigit()
    ]


def describe(report: dict[str, Any]) -> str:
    """Write a report as text for a person."""
    cpu, compiler, kernels = report["cpu"], report["compiler"], report["kernels"]
    notable = [name for name in NOTABLE_FEATURES if name in cpu["features"]]
    gpus = [
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB, driver {gpu['driver']}"
        for gpu in report["gpus"]
    ]
    packages = [f"{name} {version}" for name, version in report["packages"].items() if version]
    current = kernels["current"] or (
        "not compiled yet (the first load compiles them, or: exl_loader build)"
    )
    rows = [
        ("exl_loader", f"{report['exl_loader']}, Python {report['python']}, {report['system']}"),
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads"),
        ("features", " ".join(notable) or "none of note"),
        ("GPU", "; ".join(gpus) or "none"),
        *cuda_rows(report["cuda"]),
        ("compiler", f"{' '.join(compiler['command'])}: {compiler['version']}"
         if compiler else "none"),
        ("ninja", report["ninja"] or "none"),
        ("kernels", current),
        ("kept in", f"{kernels['folder']} ({len(kernels['builds'])} builds)"),
        ("packages", ", ".join(packages)),
    ]
    lines = [f"{name + ':':<13}{value}" for name, value in rows]
    if not report["problems"]:
        return "\n".join([*lines, "", "Nothing is missing."])
    for problem in report["problems"]:
        lines += ["", f"missing: {problem['problem']}", f"      -> {problem['remedy']}"]
    return "\n".join(lines)
