"""Calls of the compiled CPU kernels: signatures, and the base class of the operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        replayed: whether the library has its twin for `Replay`.
    """

    arguments: tuple[type, ...]
    rule: str | None = None
    replayed: bool = True


@dataclass(frozen=True)
class Kernel:
    """An opened function: `function` returns 0 or None, or else its arguments break `rule`.

    `replayed` is the address of its twin of csrc/cpu/replay.h, None without one.
    """

    function: Callable[..., int | None]
    signature: Signature
    replayed: int | None

    @property
    def rule(self) -> str | None:
        return self.signature.rule


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
        twin = library[f"exl_replay_{name}"] if signature.replayed else None
        replayed = None if twin is None else ctypes.cast(twin, POINTER).value
        kernels[name] = Kernel(function, signature, replayed)
    return kernels


class _Argument(ctypes.Union):
    """ExlArgument of csrc/cpu/replay.h."""

    _fields_ = [("integer", INT64), ("real", FLOAT), ("pointer", POINTER)]


class _Call(ctypes.Structure):
    """ExlCall of csrc/cpu/replay.h."""

    _fields_ = [("function", POINTER), ("arguments", POINTER)]


class Replay:
    """Consecutive calls of kernels with the same arguments every time, as one call of C.

    Args:
        library: the opened library.
        issued: kernels, which have `replayed`, and their arguments, in order.
        kept: objects that own the memory behind addresses among the arguments.
    """

    def __init__(self, library: ctypes.CDLL, issued: Sequence[tuple[Kernel, tuple[Value, ...]]],
                 kept: object):
        self._run = library["exl_replay"]
        self._run.restype, self._run.argtypes = INT64, (POINTER, INT64)
        self._rules = [kernel.rule for kernel, _ in issued]
        self._arguments = [_arguments(kernel, values) for kernel, values in issued]
        self._calls = (_Call * len(issued))(*(
            _Call(kernel.replayed, ctypes.addressof(arguments))
            for (kernel, _), arguments in zip(issued, self._arguments, strict=True)
        ))
        # `ctypes.byref` among the arguments keeps its struct alive.
        self._kept = (kept, issued)

    def __call__(self) -> None:
        """Make the calls.

        Raises:
            AssertionError: the arguments of a call break its kernel's rule.
        """
        failed = self._run(self._calls, len(self._rules))
        if failed >= 0:
            raise AssertionError(self._rules[failed])


def _arguments(kernel: Kernel, values: tuple[Value, ...]) -> ctypes.Array[_Argument]:
    kinds = kernel.signature.arguments
    return (_Argument * len(kinds))(*(
        _argument(kind, value) for kind, value in zip(kinds, values, strict=True)
    ))


def _argument(kind: type, value: Any) -> _Argument:
    if kind is FLOAT:
        return _Argument(real=value)
    if kind is not POINTER:
        return _Argument(integer=value)
    if value is None or isinstance(value, int):
        return _Argument(pointer=value)
    return _Argument(pointer=ctypes.cast(value, POINTER).value)


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
