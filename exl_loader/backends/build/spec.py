"""Describe a build: its inputs, and the key that names its result in the cache.

The key is a hash of everything that can change the binary: sources, headers, flags, the
compiler with its whole command and the environment variables that it reads, and the CPU. Equal
keys mean equal binaries, so a cached binary can be used.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.system import is_windows, system_kind
from ...utils.system.libraries import LIBRARY_SUFFIX
from ...utils.system.processors import cpu_features
from .toolchain import (
    Compiler,
    compiler_remedy,
    compiler_variables,
    find_compiler,
)

# Part of every key; raised when the contents of a build directory change their meaning.
LAYOUT_VERSION = 3

# Kinds of `Compiler` whose output is loaded by the CUDA driver.
CUBIN_COMPILERS = ("nvcc", "nvrtc")

_GNU_FLAGS = ("-O3", "-std=c++17", "-pthread", "-fno-math-errno", "-ffp-contract=off",
              "-Wall", "-Wextra")
# /MT: Python's folder may have a C++ runtime older than the compiler, and the process has one.
_MSVC_FLAGS = ("/nologo", "/O2", "/std:c++17", "/permissive-", "/EHsc", "/MT", "/W3")


@dataclass(frozen=True)
class BuildSpec:
    """The inputs of a build: one library, or with a CUDA compiler one cubin for each source.

    Args:
        name: `cpu`, `cuda_sm_90`; first part of the directory's name.
        root: folder to which `sources`, `headers` and `include_dirs` are relative.
        sources: one translation unit each, sorted.
        headers: every file that a source may include, sorted.
        compiler: the compiler.
        flags: for compiling, without include paths and names of files.
        link_flags: for linking; cubins are not linked.
        cpu_features: of the machine that will run the binary, because the meaning of
            `-march=native` depends on them.
        include_dirs: folders that `#include "..."` searches, in this order.
        environment: name and value of each variable that changes the compiler's output, see
            `toolchain.compiler_variables`.
        device_suffix: of a CUDA compiler's output, `.cubin` or `.ptx`.
    """

    name: str
    root: Path
    sources: tuple[str, ...]
    headers: tuple[str, ...]
    compiler: Compiler
    flags: tuple[str, ...]
    link_flags: tuple[str, ...]
    cpu_features: tuple[str, ...]
    include_dirs: tuple[str, ...] = (".",)
    environment: tuple[tuple[str, str], ...] = ()
    device_suffix: str = ".cubin"

    @cached_property
    def key(self) -> str:
        """Hash of all that can change the binary, 16 hex digits.

        Raises:
            KernelBuildError: a source cannot be read.
        """
        digest = hashlib.sha256()

        def put(*parts: str | bytes) -> None:
            # Lengths first, so that two different lists of parts never give the same bytes.
            for part in (str(len(parts)), *parts):
                # Paths and variables may hold bytes that are no UTF-8.
                data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
                digest.update(f"{len(data)}:".encode() + data)

        put(str(LAYOUT_VERSION), self.name, system_kind())
        put(self.compiler.kind, self.compiler.version, self.compiler.environment_script or "")
        # A CUDA compiler's command contains only paths; `identity` identifies the compiler.
        put(*(() if self.makes_cubins else self.compiler.command))
        put(*self.compiler.identity)
        put(*(part for variable in self.environment for part in variable))
        put(*self.flags)
        put(*self.link_flags)
        put(self.device_suffix)
        put(*self.cpu_features)
        put(*self.include_dirs)
        for group in (self.sources, self.headers):
            put(*group)
            for name in group:
                put(self._read(name))
        return digest.hexdigest()[:16]

    @property
    def directory_name(self) -> str:
        """Name of the directory that the finished build has in the cache."""
        return f"{self.name}-{self.key}"

    @property
    def library_name(self) -> str:
        """File name of the shared library."""
        return f"exl_{self.name}{LIBRARY_SUFFIX}"

    @property
    def makes_cubins(self) -> bool:
        """True if the build is one cubin for each source, False if it is one library."""
        return self.compiler.kind in CUBIN_COMPILERS

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Names of all files of the finished build."""
        if self.makes_cubins:
            return tuple(f"{Path(source).stem}{self.device_suffix}" for source in self.sources)
        return (self.library_name,)

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise KernelBuildError(
                f"kernel source {self.root / name}",
                actual=error.strerror or str(error),
                remedy="Install exl_loader again",
            ) from error


def csrc_dir() -> Path:
    """Find the kernel sources: inside an installed package, or beside it in a checkout.

    Raises:
        KernelBuildError: neither folder exists.
    """
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / "csrc", package.parent / "csrc"):
        if (candidate / "cpu").is_dir():
            return candidate
    raise KernelBuildError(
        "kernel sources",
        expected=f"a folder {package / 'csrc'}",
        actual="none",
        remedy="Install exl_loader again",
    )


def cpu_spec(root: Path | None = None, environ: Mapping[str, str] = os.environ) -> BuildSpec | None:
    """Describe the CPU kernels' build for this machine.

    Args:
        root: folder of sources with `cpu/` in it; the project's own where None.
        environ: `CXX` chooses a compiler, `EXL_LOADER_MARCH` an instruction set instead of this
            machine's, by the names of the compiler's -march, such as `x86-64-v3`.

    Returns:
        The spec, or None where the machine has no C++ compiler.

    Raises:
        KernelBuildError: sources are missing, or `CXX` names no compiler.
    """
    root = csrc_dir() if root is None else root
    compiler = find_compiler(environ)
    if compiler is None:
        return None
    features = cpu_features()
    march = environ.get("EXL_LOADER_MARCH", "").strip()
    sources = sorted(path.name for path in (root / "cpu").glob("*.cpp"))
    if not sources:
        raise KernelBuildError(
            f"kernel sources in {root / 'cpu'}",
            expected="*.cpp",
            actual="none",
            remedy="Install exl_loader again",
        )
    headers = [path.relative_to(root).as_posix() for path in root.glob("*.h")]
    headers += [path.relative_to(root).as_posix() for path in (root / "cpu").glob("*.h")]
    return BuildSpec(
        name="cpu",
        root=root,
        sources=tuple(f"cpu/{name}" for name in sources),
        headers=tuple(sorted(headers)),
        compiler=compiler,
        flags=compile_flags(compiler, features, march),
        link_flags=link_flags(compiler),
        cpu_features=features,
        environment=compiler_variables(environ),
    )


def require_cpu_spec() -> BuildSpec:
    """Describe the CPU kernels' build as `cpu_spec` does, and require a compiler.

    Raises:
        KernelBuildError: there is no compiler; the error has the command that installs one.
    """
    spec = cpu_spec()
    if spec is None:
        raise KernelBuildError(
            "C++ compiler", expected="g++ or clang++", actual="none", remedy=compiler_remedy()
        )
    return spec


def compile_flags(
    compiler: Compiler, features: tuple[str, ...], march: str = ""
) -> tuple[str, ...]:
    """Choose compile flags.

    Never -ffast-math, because a row's result could then depend on the rows beside it.

    Args:
        compiler: the compiler.
        features: from `cpu_features()`, machine type first.
        march: an instruction set by the compiler's name; this machine's if empty.
    """
    if compiler.kind == "msvc":
        known = (("avx512f", "AVX512"), ("avx2", "AVX2"), ("avx", "AVX"))
        arch = march or next((name for feature, name in known if feature in features), "")
        return (*_MSVC_FLAGS, f"/arch:{arch}") if arch else _MSVC_FLAGS
    # On ARM -mcpu names both the instruction set and the tuning; clang there has no
    # -march=native.
    option = "-mcpu" if features[0] in ("aarch64", "arm64") else "-march"
    return (*_gnu_flags(compiler), f"{option}={march or 'native'}")


def _gnu_flags(compiler: Compiler) -> tuple[str, ...]:
    if not is_windows():
        return (*_GNU_FLAGS, "-fPIC")
    if compiler.kind != "gcc":
        return _GNU_FLAGS
    # On Windows GCC aligns the stack to 16 bytes, and spills registers of 32 and 64 bytes to it
    # with aligned moves (GCC bug 54412). This option makes the assembler write unaligned moves.
    return (*_GNU_FLAGS, "-Wa,-muse-unaligned-vector-move")


def link_flags(compiler: Compiler) -> tuple[str, ...]:
    """Choose the flags that link objects into a shared library.

    On Windows the C++ runtime is linked in, because a process would not find it there.
    """
    if compiler.kind == "msvc":
        return ("/nologo", "/LD")
    if is_windows():
        return ("-shared", "-static", "-pthread")
    return ("-shared", "-pthread")
