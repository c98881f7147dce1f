"""What the CUDA kernels' builds are made of: one cubin a source, for one architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...errors import KernelBuildError
from ..spec import BuildSpec, csrc_dir
from ..toolchain import compiler_variables
from .arch import Capability, Version, arch_name, compiled_capability
from .toolchain import CudaCompiler, choose_cuda_compiler

# Constants and functions that CPU and CUDA share are constexpr and know of no device;
# each compiler has its own way to let kernels use them.
_NVCC_FLAGS = ("-cubin", "-std=c++17")
_NVRTC_FLAGS = ("-std=c++17",)
# <cstdint>, which NVRTC lacks.
_NVRTC_INCLUDE = "cuda/nvrtc"


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
        compiler: what compiles; `choose_cuda_compiler`'s choice where None.
        root: folder of sources with `cuda/` in it; the project's own where None.
        environ: see `toolchain.find_cuda_compilers`.
        driver: CUDA release of the driver that will load them.

    Raises:
        KernelBuildError: there is no compiler for this card, or sources are missing.
    """
    root = csrc_dir() if root is None else root
    chosen = choose_cuda_compiler(capability, environ, driver) if compiler is None else compiler
    target = compiled_capability(capability, chosen.cuda)
    assert target is not None, "choose_cuda_compiler chose one that cannot"
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
        name=f"cuda_{arch_name(target)}",
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
    )


def _flags(nvrtc: bool, target: Capability) -> tuple[str, ...]:
    option = "--gpu-architecture" if nvrtc else "-arch"
    return (f"{option}={arch_name(target)}", *(_NVRTC_FLAGS if nvrtc else _NVCC_FLAGS))
