"""Source trees and compilers for tests of the CUDA build; no card is needed for any of it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from exl_loader.backends.build.spec import BuildSpec
from exl_loader.backends.build.toolchain import Compiler
from exl_loader.backends.cuda import compilers
from exl_loader.backends.cuda.compilers import CudaCompiler, find_cuda_compilers
from exl_loader.backends.cuda.nvrtc_cc import Nvrtc
from support import REPO

SAMPLES = REPO / "tests" / "support" / "cuda_emulation" / "samples.cu"


@lru_cache
def cuda_compiler(kind: str) -> CudaCompiler | None:
    """The machine's compiler of one kind, `nvrtc` or `nvcc`."""
    return next(find_cuda_compilers({**os.environ, compilers.COMPILER_ENV: kind}), None)


def hide_compilers(monkeypatch, folder: Path) -> dict[str, str]:
    """Make a machine without anything: no packages, no toolkit but `CUDA_HOME`, an empty PATH.

    Returns:
        Its environment.
    """
    monkeypatch.setattr(compilers, "_package_folders", lambda name: [])
    monkeypatch.setattr(
        compilers, "_toolkits",
        lambda environ: [Path(environ["CUDA_HOME"])] if "CUDA_HOME" in environ else [],
    )
    return {"PATH": str(folder / "nothing")}


def make_nvrtc(folder: Path, release: tuple[int, int]) -> Path:
    """Files that look like NVRTC of a release, for Linux; opening them fails."""
    folder.mkdir(parents=True)
    major, minor = release
    (folder / f"libnvrtc.so.{major}").write_bytes(b"1234")
    (folder / f"libnvrtc-builtins.so.{major}.{minor}").write_bytes(b"")
    return folder / f"libnvrtc.so.{major}"


def fake_compiler(**changes) -> CudaCompiler:
    """Return a compiler that does not exist, to compute keys with."""
    fields = {"command": ("nvcc",), "kind": "nvcc", "version": "nvcc V13.0.88 with g++ 12"}
    return CudaCompiler(Compiler(**{**fields, **changes}), (13, 0), Path("nvcc"))


def sample_root(folder: Path, names: tuple[str, ...] = ("samples",)) -> Path:
    """Make a source folder of platform.cuh and of the sample kernels under these names."""
    shutil.copytree(REPO / "csrc" / "cuda" / "nvrtc", folder / "cuda" / "nvrtc")
    shutil.copy(REPO / "csrc" / "cuda" / "platform.cuh", folder / "cuda")
    for name in names:
        shutil.copy(SAMPLES, folder / "cuda" / f"{name}.cu")
    return folder


COMPILED = REPO / "build" / "test-cache" / "compiled"
_MOST_COMPILED = 1500


@dataclass(frozen=True)
class Compiled:
    """The part of a compiler's output that tests look at.

    Args:
        messages: of the compiler.
        traps: number of traps in the machine code.
        ptx: the PTX, if it was asked for.
    """

    messages: str
    traps: int
    ptx: str


def compiled_once(spec: BuildSpec, source: Path, option: str,
                  compile_now: Callable[[], Compiled]) -> Compiled:
    """Compile a source, or return what the same compiler made of the same text before.

    Args:
        spec: of the build. Its compiler, flags and headers count.
        source: the source.
        option: a further option of the compiler.
        compile_now: compiles.
    """
    compiler = spec.compiler
    # The fields count, because an older checkout may have kept results with others.
    kept_fields = Compiled.__match_args__
    options = repr((kept_fields, compiler.version, compiler.identity, spec.flags, option,
                    source.name))
    digest = hashlib.sha256(options.encode())
    for path in (source, *(spec.root / name for name in spec.headers)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    kept = COMPILED / f"{digest.hexdigest()}.json"
    if kept.exists():
        return Compiled(**json.loads(kept.read_text()))
    compiled = compile_now()
    COMPILED.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(compiled)))
    partial.replace(kept)
    oldest = sorted(COMPILED.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in oldest[:-_MOST_COMPILED]:
        path.unlink(missing_ok=True)
    return compiled


# BPT, whose one form in compiled code is BPT.TRAP: the lowest 12 bits of a 16-byte instruction,
# the same from compute capability 7.5 to 12.1 (nvdisasm -hex).
_TRAP_OPCODE = 0x95C


def traps_of(cubin: bytes) -> dict[str, int]:
    """Count the traps in the machine code of each kernel, from an optimised cubin.

    Where functions are not inlined, each also ends with one that is never reached.
    """
    found = {}
    for name, code in _sections(cubin):
        if name.startswith(".text."):
            opcodes = memoryview(code).cast("H")[::8]
            found[name.removeprefix(".text.")] = sum(
                opcode & 0xFFF == _TRAP_OPCODE for opcode in opcodes
            )
    return found


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of an ELF file's sections (64 bits, little-endian)."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_at][4]
    for header in headers:
        start = names + header[0]
        yield elf[start : elf.index(b"\0", start)].decode(), elf[header[4] : header[4] + header[5]]


class KeepingNvrtc(Nvrtc):
    """NVRTC that also keeps the PTX of the cubin which it compiled last."""

    ptx = ""

    def _text(self, function: str, program: ctypes.c_void_p) -> bytes:
        if function == "nvrtcGetCUBIN":
            self.ptx = super()._text("nvrtcGetPTX", program).rstrip(b"\0").decode()
        return super()._text(function, program)


def resource_report(messages: str) -> dict[str, dict[str, int]]:
    """Read registers, stack and spilled bytes of each kernel from the output of `-Xptxas -v`."""
    report: dict[str, dict[str, int]] = {}
    name = ""
    for line in messages.splitlines():
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


@lru_cache
def kernels_of(source: Path) -> list[str]:
    """List the kernels that a source of this checkout registers, macros expanded by g++."""
    command = ["g++", "-x", "c++", "-std=c++17", "-E", "-P", "-DEXL_CUDA_EMULATION"]
    command += ["-I", str(REPO / "csrc"), "-I", str(REPO / "tests" / "support"), str(source)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"register_(\w+)\(", text)
