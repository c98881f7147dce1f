"""Calls of the compiled CPU kernels: signatures, and the base class of the operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POINTER = ctypes.c_void_p
INT = ctypes.c_int
INT32 = ctypes.c_int32
INT64 = ctypes.c_int64
FLOAT = ctypes.c_float

# Arguments that ctypes accepts for the types above. `ctypes.byref` returns an `object`.
Value = int | float | None | object


@dataclass(frozen=True)
class Signature:
    """A C function of csrc/cpu, whose name is `exl_` and its key in a table of signatures.

    Args:
        arguments: types of its arguments.
        rule: the precondition that the function checks itself, for the error message. The
            function returns 0 if the precondition holds. None for a function without a result.
    """

    arguments: tuple[type, ...]
    rule: str | None = None


@dataclass(frozen=True)
class Kernel:
    """An opened function: `function` returns 0 or None, or else its arguments break `rule`."""

    function: Callable[..., int | None]
    rule: str | None


# Runs a kernel with these arguments, or stores both to run them later.
Issue = Callable[[Kernel, tuple[Value, ...]], None]


def run_now(kernel: Kernel, values: tuple[Value, ...]) -> None:
    """Run a kernel.

    Raises:
        AssertionError: the arguments break the kernel's rule.
    """
    if kernel.function(*values):
        raise AssertionError(kernel.rule)


def open_kernels(
    library: ctypes.CDLL, signatures: Mapping[str, Signature]
) -> dict[str, Kernel]:
    """Declare the arguments and results of a library's functions; return them by name."""
    kernels = {}
    for name, signature in signatures.items():
        function = library[f"exl_{name}"]
        function.restype = None if signature.rule is None else INT
        function.argtypes = signature.arguments
        kernels[name] = Kernel(function, signature.rule)
    return kernels


class KernelOps:
    """Base class of the CPU's operations.

    A decode step makes hundreds of calls, so an operation only passes addresses. Preconditions
    are assertions about our own callers. Input of users was checked at load.

    Args:
        kernels: from `open_kernels`.
        issue: called with each kernel and its arguments, in order.
    """

    def __init__(self, kernels: Mapping[str, Kernel], issue: Issue = run_now):
        self._kernels = kernels
        self._issue = issue

    def _call(self, name: str, *values: Value) -> None:
        self._issue(self._kernels[name], values)


def address(tensor: torch.Tensor | None) -> int | None:
    """Return a contiguous tensor's address; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu", tensor.shape
    pointer: int = tensor.data_ptr()
    return pointer
