"""What the CUDA kernels' builds are made of: a cubin or PTX a source, for one architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...utils.errors import KernelBuildError
from ..build.spec import BuildSpec, csrc_dir
from ..build.toolchain import compiler_variables
from .arch import Capability, Target, Version
from .toolchain import CudaCompiler, choose_cuda_compiler, target_of

# Neither compiler gets a flag that lets kernels call functions of the CPU: it would compile what
# reads a table of the CPU at run time to a trap. csrc/cache_codec.h declares what both share.
_LANGUAGE = "-std=c++17"
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
    target = target_of(chosen, capability)
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
