"""Find the C++ compiler and ninja.

This module compiles and writes nothing. No PyTorch, because `doctor` and a load whose kernels
are built import it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.system import is_mac, is_windows, linux_distributions
from ...utils.system.processes import command_output, split_command

CANDIDATES = ("g++", "clang++", "c++")
# The pip package of Zig's compiler, which contains clang with headers, libraries and linker.
ZIG_PACKAGE = "ziglang"

_MSVC_COMPONENT = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
_MSVC_DEFAULT = "Microsoft.VCToolsVersion.default.txt"
# Without these options the installer installs no compiler.
_MSVC_INSTALL = (
    "winget install Microsoft.VisualStudio.2022.BuildTools --override \"--passive --wait "
    "--add Microsoft.VisualStudio.Workload.VCTools --includeRecommended\""
)

# (ids in /etc/os-release, command that installs a compiler)
_LINUX_PACKAGES = (
    (("debian", "ubuntu"), "sudo apt install g++"),
    (("fedora", "rhel", "centos"), "sudo dnf install gcc-c++"),
    (("arch",), "sudo pacman -S gcc"),
    (("suse", "opensuse"), "sudo zypper install gcc-c++"),
    (("alpine",), "sudo apk add g++"),
)


@dataclass(frozen=True)
class Compiler:
    """A C++ or CUDA compiler of this machine.

    Args:
        command: program and leading arguments, e.g. `("ccache", "g++")`.
        kind: `gcc`, `clang`, `msvc`, `nvcc` or `nvrtc`; decides the flags.
        version: the line that it prints about its version.
        environment_script: batch file that sets MSVC's environment variables.
        identity: distinguishes programs that print the same version; see `program_identity`.
    """

    command: tuple[str, ...]
    kind: str
    version: str
    environment_script: str | None = None
    identity: tuple[str, ...] = ()


# Environment variables that change a compiler's output, or where it searches for headers,
# libraries and its own programs. Sources: GCC's manual ("Environment Variables Affecting GCC"),
# clang's driver, nvcc's manual ("Environment Variables"), MSVC's documentation (CL and LINK), and
# the compiler wrapper of Nix.
_COMPILER_VARIABLES = frozenset({
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "COMPILER_PATH", "LIBRARY_PATH",
    "GCC_EXEC_PREFIX", "GCC_ROOT", "SOURCE_DATE_EPOCH", "COLLECT_GCC_OPTIONS",
    "CCC_OVERRIDE_OPTIONS", "CCC_ADD_ARGS", "CLANG_CONFIG_FILE_SYSTEM_DIR",
    "CLANG_CONFIG_FILE_USER_DIR", "CLANG_NO_DEFAULT_CONFIG", "LD_RUN_PATH", "LDEMULATION",
    "SDKROOT", "DEVELOPER_DIR", "MACOSX_DEPLOYMENT_TARGET", "CL", "_CL_", "LINK", "_LINK_",
    "INCLUDE", "LIB", "LIBPATH", "EXTERNAL_INCLUDE",
})
_COMPILER_PREFIXES = ("NVCC_", "NIX_", "ZIG_", "CCACHE_COMPILER", "CCACHE_PREFIX")
# These make a compiler write additional files.
_UNWANTED_VARIABLES = frozenset({
    "DEPENDENCIES_OUTPUT", "SUNPRO_DEPENDENCIES", "GCC_COMPARE_DEBUG", "CC_PRINT_OPTIONS",
    "CC_PRINT_OPTIONS_FILE", "CC_PRINT_HEADERS", "CC_PRINT_HEADERS_FILE", "CC_LOG_DIAGNOSTICS",
    "CC_LOG_DIAGNOSTICS_FILE",
})


def compiler_variables(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the environment variables that change a compiler's output.

    They are part of a build's key. They stay in a compiler's environment, because the compilers
    of some systems (Nix, Guix, an HPC cluster's modules) find no headers without them.

    Returns:
        Name and value of each, sorted.
    """
    return tuple(sorted(
        (name, value) for name, value in environ.items()
        if value and (name in _COMPILER_VARIABLES or name.startswith(_COMPILER_PREFIXES))
    ))


def compiler_environment(
    environ: Mapping[str, str], variables: tuple[tuple[str, str], ...]
) -> dict[str, str]:
    """Make a compiler's environment, in which only `variables` change its output."""
    kept = {
        name: value for name, value in environ.items()
        if name not in _COMPILER_VARIABLES and name not in _UNWANTED_VARIABLES
        and not name.startswith(_COMPILER_PREFIXES)
    }
    return {**kept, **dict(variables)}


def program_identity(
    command: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return path, size in bytes and modification time in ns of each file that a command names.

    The version is not enough, because a script that adds options to a compiler prints the
    compiler's version.
    """
    found = []
    for number, word in enumerate(command):
        if word.startswith("-"):
            continue
        path = shutil.which(word, path=environ.get("PATH")) if number < 2 else word
        try:
            real = os.path.realpath(path or word)
            status = os.stat(real)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            found.append(f"{real} {status.st_size} {status.st_mtime_ns}")
    return tuple(found)


def find_compiler(environ: Mapping[str, str] = os.environ) -> Compiler | None:
    """Find the C++ compiler to use.

    The first of: `CXX`, Visual Studio's on Windows, g++, clang++ or c++ on the PATH, pip's
    `ziglang`.

    Returns:
        The compiler, or None where the machine has none.

    Raises:
        KernelBuildError: `CXX` is set to a command that does not answer as a compiler.
    """
    chosen = environ.get("CXX", "").strip()
    if chosen:
        compiler = _probe(_split_command(chosen), environ)
        if compiler is None:
            raise KernelBuildError(
                f"CXX is set to {chosen!r}",
                expected="a C++ compiler that answers to --version",
                actual="none",
                remedy="Correct CXX, or unset it to use g++ or clang++ from the PATH",
            )
        return compiler
    if is_windows():
        msvc = _find_msvc(environ)
        if msvc is not None:
            return msvc
    for name in CANDIDATES:
        path = shutil.which(name, path=environ.get("PATH"))
        compiler = _probe((path,), environ) if path else None
        if compiler is not None:
            return compiler
    return _find_zig()


def _find_zig() -> Compiler | None:
    """Find the compiler of `pip install ziglang`, which a user can install without root."""
    if importlib.util.find_spec(ZIG_PACKAGE) is None:
        return None
    compiler = _probe((sys.executable, "-m", ZIG_PACKAGE, "c++"))
    if compiler is None:
        return None
    from importlib import metadata

    # Its answer names the clang inside, and not Zig.
    version = f"zig {metadata.version(ZIG_PACKAGE)}, {compiler.version}"
    return replace(compiler, version=version)


def _split_command(text: str) -> tuple[str, ...]:
    """Split `ccache g++`; a path with spaces that exists is one program."""
    words = [text] if os.path.exists(text) else split_command(text)
    program, *arguments = words
    # An absolute path, because ninja runs the compiler in another folder.
    return (os.path.abspath(program) if os.path.dirname(program) else program, *arguments)


def _probe(
    command: tuple[str, ...], environ: Mapping[str, str] = os.environ
) -> Compiler | None:
    """Ask a gcc or clang for its version; return None if the command gives no such answer."""
    answer = command_output([*command, "--version"])
    if not answer:
        return None
    version = answer.splitlines()[0].strip()
    kind = "clang" if "clang" in answer else "gcc"
    return Compiler(command, kind, version, identity=program_identity(command, environ))


def _find_msvc(environ: Mapping[str, str]) -> Compiler | None:
    """Find Visual Studio's compiler by vswhere, which Microsoft installs at a fixed path.

    The name of the compiler's folder is its version, so the compiler need not be started.
    """
    program_files = environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")
    vswhere = Path(program_files) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    if not vswhere.exists():
        return None
    answer = command_output(
        [str(vswhere), "-latest", "-products", "*", "-requires", _MSVC_COMPONENT]
        + ["-property", "installationPath", "-utf8"]
    )
    if not answer or not answer.strip():
        return None
    root = Path(answer.splitlines()[0].strip()) / "VC"
    build = root / "Auxiliary" / "Build"
    script = build / "vcvars64.bat"
    try:
        # Of several releases, the one whose headers and libraries the script sets.
        release = (build / _MSVC_DEFAULT).read_text(encoding="utf-8-sig").strip()
    except OSError:
        return None
    compiler = root / "Tools" / "MSVC" / release / "bin" / "Hostx64" / "x64" / "cl.exe"
    if not compiler.exists() or not script.exists():
        return None
    version = f"MSVC {release}"
    command = (str(compiler),)
    return Compiler(command, "msvc", version, str(script), program_identity(command, environ))


def find_ninja() -> str | None:
    """Find ninja; the pip package's program first, because its version is pinned."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    name = "ninja.exe" if is_windows() else "ninja"
    packaged = Path(ninja.BIN_DIR) / name
    return str(packaged) if packaged.exists() else shutil.which("ninja")


def compiler_remedy() -> str:
    """Return how to install a C++ compiler on this machine."""
    if is_mac():
        return "Install Apple's command line tools: xcode-select --install"
    if is_windows():
        return (
            f'Install a C++ compiler: "{sys.executable}" -m pip install {ZIG_PACKAGE} (100 MB), '
            "or Visual Studio Build Tools with 'Desktop development with C++': " + _MSVC_INSTALL
        )
    for name in linux_distributions():
        for ids, command in _LINUX_PACKAGES:
            if name in ids:
                return f"Install a C++ compiler: {command}"
    return "Install a C++ compiler (the package g++ or gcc-c++ of your system)"
