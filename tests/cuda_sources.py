"""Source trees and compilers for tests of the CUDA build; no card is needed for any of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from exl_loader.kernels.cuda.toolchain import CudaCompiler, find_cuda_compilers

REPO = Path(__file__).resolve().parents[1]
SAMPLES = REPO / "tests" / "cuda_emulation" / "samples.cu"


@lru_cache
def cuda_compiler(kind: str) -> CudaCompiler | None:
    """The machine's compiler of one kind, `nvrtc` or `nvcc`."""
    return next(find_cuda_compilers({**_environ(), "EXL_LOADER_CUDA_COMPILER": kind}), None)


def _environ() -> dict[str, str]:
    import os

    return dict(os.environ)


def sample_root(folder: Path, names: tuple[str, ...] = ("samples",)) -> Path:
    """A source folder of platform.cuh and the emulation's sample kernels, under these names."""
    shutil.copytree(REPO / "csrc" / "cuda" / "nvrtc", folder / "cuda" / "nvrtc")
    shutil.copy(REPO / "csrc" / "cuda" / "platform.cuh", folder / "cuda")
    for name in names:
        shutil.copy(SAMPLES, folder / "cuda" / f"{name}.cu")
    return folder


def resource_report(words: str) -> dict[str, dict[str, int]]:
    """Read what `-Xptxas -v` says of each kernel: registers, stack and spilled bytes."""
    report: dict[str, dict[str, int]] = {}
    name = ""
    for line in words.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            report[name] = {}
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # Lines of functions that are called rather than inlined name no kernel.
            report.setdefault(name, {})["stack"] = int(match[1])
            report[name]["spilled"] = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            report[name]["registers"] = int(match[1])
    return report


def kernels_of(source: Path) -> list[str]:
    """Names of the kernels that a source registers, macros expanded by the host compiler."""
    command = ["g++", "-x", "c++", "-std=c++17", "-E", "-P", "-DEXL_CUDA_EMULATION"]
    command += ["-I", str(REPO / "csrc"), "-I", str(REPO / "tests"), str(source)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"register_(\w+)\(", text)
