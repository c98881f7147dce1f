"""Build csrc/cuda for the CPU, and launch its kernels there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import BuildSpec
from exl_loader.backends.build.toolchain import find_compiler
from exl_loader.utils.system.processors import cpu_features
from support import REPO

FOLDER = "tests/support/cuda_emulation"
# Of objects, kept from one build to the next.
OBJECTS = REPO / "build" / "test-cache" / "objects"

# Built with -fsanitize; the process needs their runtimes first (sanitized.py sees to that).
SANITIZE_ENV = "EXL_EMULATION_SANITIZE"

RUNNER = ("runner.cpp", "collectives.cpp", "shared_memory.cpp")
FLAGS = (
    "-x", "c++", "-std=c++17", "-g1", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-strict-aliasing", "-DEXL_CUDA_EMULATION", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas",
)
NATIVE_FLAGS = ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()
SANITIZE_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}

# What every supported card has: 64 KiB on compute capability 7.5.
SHARED_LIMIT_BYTES = 64 << 10
_MAX_THREADS = 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)

# Kernel -> threads of its __launch_bounds__, which the host's compiler does not see. A card
# refuses a block with more. tests/backends/cuda/test_cuda_build.py compares them with the
# compiled kernels.
_LAUNCH_BOUNDS = {
    r"attention_(decode|prefill)_\w+": 256,
    r"attention_generic": 128,
    r"cache_write(_feedback_long)?": 256,
    r"cache_write_feedback": 128,
    r"dense_decode_\w+": 512,
    r"dense_prefill_\w+": 128,
    r"dense_prepare_\w+": 256,
    r"linear_decode_\w+": 512,
    r"linear_prefill_\w+": 256,
    r"quantize_(rows|pairs)": 128,
    r"pack_(exl2|gptq)": 128,
    r"embed|gather_rows|scatter_add_rows|add_gated_rows|moe_sum": 256,
    r"activate|add|clamp|gate|softcap": 256,
    r"moe_route": 32,
    r"(layer|rms)_norm": 512,
    r"(layer|rms)_norm_heads|rope|rope_table": 128,
    r"(survey|count|take)_logits": 512,
}

_KINDS: dict[str, tuple[type, ...]] = {
    "p": (ctypes.c_void_p,),
    "i": (ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_bool),
    "f": (ctypes.c_float, ctypes.c_double),
    "s": (ctypes.Structure,),
}


def launch_bound(kernel: str) -> int:
    """Return the most threads of a block of a kernel; 1024 where it names no bound."""
    return next(
        (threads for pattern, threads in _LAUNCH_BOUNDS.items()
         if re.fullmatch(f"({pattern})_kernel", kernel)), _MAX_THREADS,
    )


class EmulationError(Exception):
    """A kernel did something invalid; the message names the thread and the place."""


def sanitized() -> bool:
    """Whether this process runs kernels under AddressSanitizer and UBSan."""
    return os.environ.get(SANITIZE_ENV, "") not in ("", "0")


def emulation_spec(sources: Sequence[Path] | None = None, root: Path = REPO) -> BuildSpec:
    """Describe the library of emulated kernels.

    Args:
        sources: `.cu` files under `root`; all of `csrc/cuda` where None.
        root: a checkout, or a folder with (changed) copies of its csrc and tests/cuda_emulation.
    """
    found = find_compiler()
    assert found is not None, "the emulation needs g++ or clang++"
    # Objects are those of this compiler and this CPU.
    machine = repr((found.version, found.identity, cpu_features()))
    objects = OBJECTS / hashlib.sha256(machine.encode()).hexdigest()[:16]
    keeping = (sys.executable, "-I", "-S", str(REPO / FOLDER / "cached_cc.py"), str(objects))
    compiler = replace(found, command=(*keeping, *found.command))
    kernels = sorted((root / "csrc" / "cuda").glob("*.cu")) if sources is None else sources
    runner = [root / FOLDER / name for name in RUNNER]
    headers = [*(root / "csrc").glob("*.h"), *(root / "csrc" / "cuda").glob("*.cuh")]
    headers += (root / FOLDER).glob("*.h")

    def names(paths) -> tuple[str, ...]:
        return tuple(sorted(path.relative_to(root).as_posix() for path in paths))

    # What serves few tests is compiled more quickly: -Og takes two thirds of the time of -O1.
    optimise = "-Og" if sanitized() or sources is not None else "-O2"
    extra = SANITIZE_FLAGS if sanitized() else ()
    return BuildSpec(
        name="cuda_emulation",
        root=root,
        sources=names([*kernels, *runner]),
        headers=names(headers),
        compiler=compiler,
        flags=(optimise, *FLAGS, *NATIVE_FLAGS, *extra),
        link_flags=("-shared", *extra),
        cpu_features=cpu_features(),
        include_dirs=("csrc", "tests/support"),
    )


class EmulatedLauncher:
    """Launches kernels on the CPU; the interface of exl_loader/backends/cuda/launcher.py.

    Args:
        spec: what to build; all kernels of the project where None.
        order: in which blocks, warps and lanes run: `forward`, `reverse` or `shuffled`.
        seed: of `shuffled`; the same seed gives the same order.
        shared_limit_bytes: what a block may have; by default what the smallest card offers.
        multiprocessors: number that the card reports.
    """

    def __init__(
        self,
        spec: BuildSpec | None = None,
        *,
        order: str = "forward",
        seed: int = 0,
        shared_limit_bytes: int = SHARED_LIMIT_BYTES,
        multiprocessors: int = 4,
    ) -> None:
        self.shared_limit_bytes = shared_limit_bytes
        self.multiprocessors = multiprocessors
        self._library = ctypes.CDLL(str(build(emulation_spec() if spec is None else spec)))
        self._library.exl_emulated_signature.restype = ctypes.c_char_p
        self._library.exl_emulated_switches.restype = ctypes.c_uint64
        self._message = ctypes.create_string_buffer(2048)
        self.set_order(order, seed)

    def set_order(self, order: str, seed: int = 0) -> None:
        """Change the order in which blocks, warps and lanes run."""
        self._order = (ORDERS[order], ctypes.c_uint64(seed))

    def switches(self) -> int:
        """How often one thread gave way to another, since the library was opened."""
        return self._library.exl_emulated_switches()

    def prepare(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int, *args: Any
    ) -> Callable[[], None]:
        """Check a launch against the kernel's own arguments and a card's limits.

        Args:
            name: of the kernel.
            grid: blocks in x, y and z.
            block: threads, a multiple of 32.
            shared_bytes: dynamic shared memory of a block.
            args: ctypes values, of the kernel's parameter types.

        Returns:
            What runs the launch; to be called any number of times.

        Raises:
            EmulationError: the launch cannot be made; when called: the kernel misbehaved.
        """
        self._check_shape(name, grid, block, shared_bytes)
        self._check_arguments(name, args)
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(arg) for arg in args))
        blocks = (ctypes.c_uint32 * 3)(*grid)

        def launch() -> None:
            # Bound here: the values that the pointers point to have to live as long.
            _ = args
            self._library.exl_emulated_order(*self._order)
            failed = self._library.exl_emulated_launch(
                name.encode(), blocks, block, shared_bytes, pointers, self._message,
                len(self._message),
            )
            if failed:
                raise EmulationError(self._message.value.decode())

        return launch

    def _check_shape(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int
    ) -> None:
        if block % 32 or not 0 < block <= _MAX_THREADS:
            raise EmulationError(f"{name}: {block} threads a block, not whole warps up to 1024")
        if block > launch_bound(name):
            raise EmulationError(f"{name}: {block} threads a block, of {launch_bound(name)}")
        if not all(0 < n <= limit for n, limit in zip(grid, _MAX_GRID, strict=True)):
            raise EmulationError(f"{name}: a grid of {grid}, beyond 1 to {_MAX_GRID}")
        if not 0 <= shared_bytes <= self.shared_limit_bytes:
            raise EmulationError(
                f"{name}: {shared_bytes} bytes of shared memory, of {self.shared_limit_bytes}"
            )

    def _check_arguments(self, name: str, args: tuple[Any, ...]) -> None:
        signature = self._library.exl_emulated_signature(name.encode())
        if signature is None:
            raise EmulationError(f"no kernel {name}")
        wanted = signature.decode().split()
        if len(wanted) != len(args):
            raise EmulationError(f"{name}: {len(args)} arguments, not {len(wanted)}")
        for index, (what, arg) in enumerate(zip(wanted, args, strict=True)):
            if not isinstance(arg, _KINDS[what[0]]) or ctypes.sizeof(arg) != int(what[1:]):
                raise EmulationError(
                    f"{name}: argument {index} is a {type(arg).__name__}, not {what}"
                )
