"""Operations wherever they can run: compiled for CPUs, emulated CUDA kernels, and a card.

Tests are written once: they hand CPU tensors to a `Target`, which brings them over, runs the
operation and brings what it wrote back.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from exl_loader.cache.layout import KeyBias, OpenPages, StoredTokens
from exl_loader.utils.system.processors import cpu_features
from support.kernel_cases import compiled_ops

# The kernels for this machine; for AVX2 and in plain C++, which are compiled for the tests.
OTHER_CPUS = ["x86-64-v3", "x86-64"]
ALL_CPUS = ["native", *OTHER_CPUS]
# AVX-512 without VNNI, whose products differ from those with it; for machines that have it.
AVX512 = "skylake-avx512"
CPUS = ["native", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_CPUS)]
# Lanes, warps and blocks in two orders: what needs a barrier that is not there differs.
EMULATED = ["forward", "shuffled"]
TARGETS = [*EMULATED, pytest.param("gpu", marks=pytest.mark.gpu)]
ALL_TARGETS = [*CPUS, *TARGETS]
# What of an argument's fields is brought to a device.
NESTED = (torch.Tensor, KeyBias, OpenPages, StoredTokens)


def sizes(name: str, *, cpu: Sequence[Any], cuda: Sequence[Any],
          cpus: Sequence[Any] = CPUS) -> pytest.MarkDecorator:
    """Parametrise `ops` over all targets, and `name` over what the target's kernels need.

    Emulation is slow, so sizes at which only the CPU's kernels change are not emulated.
    """
    cases = []
    for targets, values in ((cpus, cpu), (TARGETS, cuda)):
        for target in targets:
            (backend,), marks = (target.values, target.marks) if hasattr(target, "marks") else (
                (target,), ())
            cases += [pytest.param(backend, value, marks=marks) for value in values]
    return pytest.mark.parametrize(("ops", name), cases, indirect=["ops"])


class Target:
    """The operations of `ops` on CPU tensors.

    Args:
        ops: the operations, or an object with some of them.
        device: where they run; None where host and device are one memory.
        kind: of kernels, "cpu" or "cuda".
    """

    def __init__(self, ops: Any, device: str | None, kind: str = "cuda"):
        self.ops = ops
        self.device = device
        self.kind = kind

    def __getattr__(self, operation: str):
        call = getattr(self.ops, operation)

        def run(*args: Any) -> None:
            there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            call(*(self._over(arg, there) for arg in args))
            for here, moved in there.values():
                if here is not moved:
                    here.copy_(moved)

        return run

    def _over(self, arg: Any, there: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if isinstance(arg, torch.Tensor):
            if id(arg) not in there:
                there[id(arg)] = arg, arg if self.device is None else arg.to(self.device)
            return there[id(arg)][1]
        if is_dataclass(arg) and not isinstance(arg, type):
            moved = {f.name: self._over(getattr(arg, f.name), there) for f in fields(arg)
                     if isinstance(getattr(arg, f.name), NESTED)}
            return replace(arg, **moved)
        return arg


@functools.cache
def emulated_launcher() -> Any:
    """The project's kernels on the CPU, built once a process."""
    from support.cuda_emulation import EmulatedLauncher

    return EmulatedLauncher()


@functools.cache
def card_ops() -> Any:
    """The first card's operations, with a small upload buffer, so that packing takes turns."""
    from exl_loader.backends import get_ops

    ops: Any = get_ops("cuda:0")
    ops.upload_buffer = torch.empty(1 << 16, dtype=torch.uint8, device="cuda:0")
    return ops


def target(name: str, make: Any, threads: int = 3) -> Target:
    """Return the target of one of `ALL_TARGETS`.

    Args:
        make: makes CUDA operations of a launcher.
        threads: of a CPU.
    """
    if name == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return Target(card_ops(), "cuda:0")
    if name in ("native", AVX512, *OTHER_CPUS):
        if name in OTHER_CPUS and platform.machine().lower() not in ("x86_64", "amd64"):
            pytest.skip("instruction sets of x86-64")
        if name == AVX512 and "avx512bw" not in cpu_features():
            pytest.skip("no AVX-512")
        ops = compiled_ops("" if name == "native" else name)
        ops.set_threads(threads)
        return Target(ops, None, "cpu")
    launcher = emulated_launcher()
    launcher.set_order(name, seed=1)
    return Target(make(launcher), None)
