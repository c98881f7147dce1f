"""Compilers of CUDA kernels: NVRTC, which PyTorch brings along, or nvcc; and what they build.

NVRTC comes first: it needs no host compiler, and takes a tenth of the time. Nothing here opens a
library or compiles. A load whose kernels are compiled already asks for a version only and, if
the card or the compiler is newer than the table of `arch.py`, asks the compiler for its
architectures.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...utils.errors import InvalidSettings, KernelBuildError, shown
from ...utils.system import is_windows
from ...utils.system.processes import command_output
from ..build.spec import BuildSpec, csrc_dir
from ..build.toolchain import Compiler, compiler_variables, find_compiler, program_identity
from .arch import (
    OLDEST_CUDA,
    Capability,
    Target,
    Version,
    arch_name,
    capability_of,
    is_tabled,
    known_capabilities,
    target_for,
)

COMPILER_ENV = "EXL_LOADER_CUDA_COMPILER"
KINDS = ("nvrtc", "nvcc")

_NVRTC = re.compile(r"libnvrtc(-[0-9a-f]+)?\.so(\.\d+)*|nvrtc64_\d+_\d+\.dll")
_BUILTINS = re.compile(
    r"libnvrtc-builtins(?:-[0-9a-f]+)?\.so\.(\d+)\.(\d+)|nvrtc-builtins64_(\d+)(\d)\.dll"
)
_NVCC_RELEASE = re.compile(r"release (\d+)\.(\d+), (V\S+)")

# Neither compiler gets a flag that lets kernels call functions of the CPU: with it, code that
# reads a table of the CPU at run time would compile to a trap. csrc/cache_codec.h declares what
# both share.
_LANGUAGE = "-std=c++17"
# <cstdint>, which NVRTC lacks.
_NVRTC_INCLUDE = "cuda/nvrtc"


@dataclass(frozen=True)
class CudaCompiler:
    """A compiler of cubins.

    Args:
        compiler: the command that ninja runs.
        cuda: CUDA release of the compiler.
        path: of NVRTC's library, or of nvcc.
    """

    compiler: Compiler
    cuda: Version
    path: Path


def find_cuda_compilers(environ: Mapping[str, str] = os.environ) -> Iterator[CudaCompiler]:
    """List the machine's compilers of cubins, first choice first.

    `EXL_LOADER_CUDA_COMPILER` restricts them to one kind, `nvrtc` or `nvcc`.

    Raises:
        InvalidSettings: that variable has another value.
    """
    chosen = environ.get(COMPILER_ENV, "").strip()
    if chosen and chosen not in KINDS:
        raise InvalidSettings(
            COMPILER_ENV, expected=" or ".join(KINDS), actual=shown(chosen),
            remedy="Correct it, or unset it to take what there is",
        )
    if chosen != "nvcc":
        yield from _find_nvrtc(environ)
    if chosen != "nvrtc":
        yield from _find_nvcc(environ)


def choose_cuda_compiler(
    capability: Capability,
    environ: Mapping[str, str] = os.environ,
    driver: Version | None = None,
) -> CudaCompiler:
    """Choose the compiler for a card.

    Args:
        capability: of the card.
        environ: see `find_cuda_compilers`.
        driver: CUDA release of the driver that will load the cubins. It loads those of its own
            major release and of older ones.

    Returns:
        The first compiler that makes machine code for the card; if none does, the first whose
        PTX the driver compiles.

    Raises:
        KernelBuildError: none compiles for the card. The message names what to install.
    """
    seen, makes_ptx = [], []
    for found in find_cuda_compilers(environ):
        version = found.compiler.version
        target = None if found.cuda < OLDEST_CUDA else target_of(found, capability)
        if found.cuda < OLDEST_CUDA:
            seen.append(f"{version} is too old")
        elif driver is not None and found.cuda[0] > driver[0]:
            seen.append(f"{version} is newer than the driver ({driver[0]}.x)")
        elif target is None:
            seen.append(f"{version} does not know {arch_name(capability)}")
        elif target.is_ptx and driver is not None and found.cuda > driver:
            seen.append(f"{version} does not know {arch_name(capability)}, and its PTX is newer "
                        f"than the driver ({driver[0]}.{driver[1]})")
        elif target.is_ptx:
            makes_ptx.append(found)
        else:
            return found
    if makes_ptx:
        return makes_ptx[0]
    oldest = ".".join(map(str, OLDEST_CUDA))
    raise KernelBuildError(
        f"CUDA compiler for {arch_name(capability)}",
        expected=f"NVRTC, or nvcc with a host compiler, of CUDA {oldest} or newer",
        actual="; ".join(seen) or "none",
        remedy=nvrtc_remedy(driver),
    )


def cuda_spec(
    capability: Capability,
    *,
    compiler: CudaCompiler | None = None,
    root: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    driver: Version | None = None,
) -> BuildSpec:
    """Describe the CUDA kernels' build for a card.

    Args:
        capability: of the card.
        compiler: the compiler; that of `choose_cuda_compiler` if None.
        root: folder of sources that contains `cuda/`; the project's own if None.
        environ: see `find_cuda_compilers`.
        driver: CUDA release of the driver that will load them.

    Raises:
        KernelBuildError: there is no compiler for this card, or sources are missing.
    """
    root = csrc_dir() if root is None else root
    chosen = choose_cuda_compiler(capability, environ, driver) if compiler is None else compiler
    target = target_of(chosen, capability)
    assert target is not None, "the compiler does not know the card"
    sources = sorted(f"cuda/{path.name}" for path in (root / "cuda").glob("*.cu"))
    if not sources:
        raise KernelBuildError(
            f"kernel sources in {root / 'cuda'}", expected="*.cu", actual="none",
            remedy="Install exl_loader again",
        )
    nvrtc = chosen.compiler.kind == "nvrtc"
    headers = [*root.glob("*.h"), *(root / "cuda").glob("*.cuh")]
    headers += (root / _NVRTC_INCLUDE).glob("*") if nvrtc else ()
    return BuildSpec(
        name=f"cuda_{target.name}",
        root=root,
        sources=tuple(sources),
        headers=tuple(sorted(path.relative_to(root).as_posix() for path in headers)),
        compiler=chosen.compiler,
        flags=_flags(nvrtc, target),
        link_flags=(),
        cpu_features=(),
        include_dirs=(".", _NVRTC_INCLUDE) if nvrtc else (".",),
        # NVRTC reads no variables.
        environment=() if nvrtc else compiler_variables(environ),
        device_suffix=".ptx" if target.is_ptx else ".cubin",
    )


def _flags(nvrtc: bool, target: Target) -> tuple[str, ...]:
    if nvrtc:
        return f"--gpu-architecture={target.name}", _LANGUAGE
    return f"-arch={target.name}", "-ptx" if target.is_ptx else "-cubin", _LANGUAGE


def target_of(found: CudaCompiler, capability: Capability) -> Target | None:
    """Choose a compiler's target for a card; see `arch.target_for`."""
    known = known_capabilities(found.cuda)
    if not is_tabled(capability, found.cuda):
        known = _own_capabilities(found) or known
    return target_for(capability, known)


@functools.cache
def _own_capabilities(found: CudaCompiler) -> list[Capability]:
    """Ask a compiler, in a process of its own, for its architectures; [] without an answer."""
    option = "--list-gpu-code" if found.compiler.kind == "nvcc" else "--supported"
    output = command_output([*found.compiler.command, option]) or ""
    # sm_90a is left out: other cards of its generation do not run it.
    return [capability_of(int(number)) for number in re.findall(r"\bsm_(\d+)\b", output)]


def nvrtc_remedy(driver: Version | None = None) -> str:
    """Return what to install to compile CUDA kernels; pip's names differ by CUDA release."""
    package = "nvidia-cuda-nvrtc"
    if driver is not None and driver[0] < 13:
        package += f"-cu{driver[0]}"
    return f"pip install {package} (60 MB; PyTorch for CUDA brings it along)"


def _find_nvrtc(environ: Mapping[str, str]) -> Iterator[CudaCompiler]:
    """Find NVRTC of pip packages and PyTorch, then of toolkits."""
    seen = set()
    for folder in _library_folders(environ):
        for library, cuda in _nvrtc_in(folder):
            if library.resolve() not in seen:
                seen.add(library.resolve())
                yield CudaCompiler(_nvrtc_compiler(library, cuda), cuda, library)


def _nvrtc_in(folder: Path) -> list[tuple[Path, Version]]:
    """Find NVRTC in a folder, with the release in the name of its built-in headers."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
    releases = [match for match in map(_BUILTINS.fullmatch, names) if match]
    # `libnvrtc.so.13` before `libnvrtc.so`, which may be a linker script.
    libraries = sorted((name for name in names if _NVRTC.fullmatch(name)), key=len, reverse=True)
    if not releases or not libraries:
        return []
    newest = max((int(match[1] or match[3]), int(match[2] or match[4])) for match in releases)
    return [(folder / libraries[0], newest)]


def _nvrtc_compiler(library: Path, cuda: Version) -> Compiler:
    script = Path(__file__).with_name("nvrtc_cc.py")
    # -I -S: neither environment variables nor site-packages may change what it does.
    command = (sys.executable, "-I", "-S", str(script), "--library", str(library))
    # The size distinguishes builds of one release (13.0.48 and 13.0.88).
    version = f"NVRTC {cuda[0]}.{cuda[1]} ({library.stat().st_size} bytes)"
    return Compiler(command, "nvrtc", version, identity=program_identity((str(library),)))


def _library_folders(environ: Mapping[str, str]) -> Iterator[Path]:
    for package in _package_folders("nvidia"):
        for pattern in ("cu[0-9]*", "cuda_nvrtc"):
            for toolkit in sorted(package.glob(pattern), reverse=True):
                yield from (toolkit / "lib", toolkit / "bin", toolkit / "bin" / "x86_64")
    for package in _package_folders("torch"):
        yield package / "lib"
    for toolkit in _toolkits(environ):
        yield from (toolkit / "lib64", toolkit / "lib", toolkit / "bin", toolkit / "bin" / "x64")
    if environ.get("CONDA_PREFIX"):
        yield from (Path(environ["CONDA_PREFIX"]) / name for name in ("lib", "Library/bin"))


def _package_folders(name: str) -> list[Path]:
    """Return the folders of an installed package without importing it."""
    found = importlib.util.find_spec(name)
    return [Path(path) for path in (found.submodule_search_locations or ())] if found else []


def _toolkits(environ: Mapping[str, str]) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name, "").strip():
            yield Path(environ[name].strip())
    if not is_windows():
        yield Path("/usr/local/cuda")


def _find_nvcc(environ: Mapping[str, str]) -> Iterator[CudaCompiler]:
    """Find nvcc of a toolkit, the PATH or pip packages; none without a host compiler.

    On Windows the host compiler must be Visual Studio's.
    """
    host = find_compiler(environ)
    if host is None or (is_windows() and host.kind != "msvc"):
        return
    name = "nvcc.exe" if is_windows() else "nvcc"
    paths = [toolkit / "bin" / name for toolkit in _toolkits(environ)]
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if on_path:
        paths.insert(len(paths) - (0 if is_windows() else 1), Path(on_path))
    for package in _package_folders("nvidia"):
        for pattern in ("cu[0-9]*", "cuda_nvcc"):
            paths += [folder / "bin" / name for folder in sorted(package.glob(pattern))]
    for path in dict.fromkeys(paths):
        match = _NVCC_RELEASE.search(command_output([str(path), "--version"]) or "")
        if match:
            version = f"nvcc {match[3]} with {host.version}"
            compiler = replace(
                host, command=(str(path),), kind="nvcc", version=version,
                identity=(*program_identity((str(path),)), *host.identity),
            )
            yield CudaCompiler(compiler, (int(match[1]), int(match[2])), path)
