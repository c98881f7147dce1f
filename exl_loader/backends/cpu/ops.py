"""The operations of `interface.py` as calls of the compiled kernels: no arithmetic here.

A decode step makes hundreds of these calls, so a call does no more than pass addresses:
argument types are declared once, and layers keep their C structs. A recorded step goes
further: `bind` keeps the addresses too. Preconditions are assertions about our own callers;
what a user can get wrong was checked at load.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...formats.packed import DenseLinear
from .attention import AttentionOps
from .library import default_threads, dtype_code, native_linear

if TYPE_CHECKING:
    import torch

    from ..base import Linear

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}

_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64

# C symbol without exl_ -> (result, arguments); see the sources in csrc/cpu.
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "set_threads": (_I, (_I,)),
    "embed": (_I, (_P, _N, _P, _N, _N, _N, _F, _P)),
    "embed_tiled": (_I, (_P, _N, _P, _F, _P)),
    "rms_norm": (None, (_P, _P, _F, _N, _N, _P)),
    "linear": (_I, (_P, _N, _P, _P, _N, _I, _P, _N)),
    "linear_dense": (_I, (_P, _N, _P, _P, _N, _I, _P, _N)),
    "rope_table": (None, (_P, _P, _F, _N, _N, _P)),
    "rope": (None, (_P, _P, _N, _N, _N, _N)),
    "gate": (None, (_P, _P, _P, _N, ctypes.c_int32)),
    "add": (None, (_P, _P, _N)),
    "softcap": (None, (_P, _F, _N)),
    "moe_route": (None, (_P, _N, _N, _N, _I, _P, _P)),
    "gather_rows": (_I, (_P, _N, _P, _N, _N, _P)),
    "scatter_add_rows": (_I, (_P, _P, _P, _N, _N, _P, _N)),
    "pack_exl2": (None, (_P, _N, _N, _P, _N, _P, _N, _N)),
    "pack_gptq": (None, (_P, _N, _N, _P, _P, _N, _P, _N, _N)),
}


def missing_symbols(library: ctypes.CDLL) -> list[str]:
    """Return the functions that the operations call and a library does not have."""
    names = (*_SIGNATURES, *AttentionOps.attention_calls)
    return [f"exl_{name}" for name in names if not hasattr(library, f"exl_{name}")]


class _Prepare:
    """Stands in for a C function and notes the arguments of one call."""

    def __init__(self, function: Any, prepared: list[tuple[Any, tuple[Any, ...]]]):
        self._function, self._prepared = function, prepared

    def __call__(self, *values: Any) -> int:
        self._prepared.append((self._function, values))
        return 0


class CompiledOps(AttentionOps):
    """Every operation of `interface.Ops`, by the library that `build.py` made.

    Args:
        library: the opened library of `csrc/cpu`.

    Raises:
        InvalidSettings: EXL_LOADER_THREADS is no positive number.
    """

    name = "cpu"

    def __init__(self, library: ctypes.CDLL):
        super().__init__(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"exl_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)
        self.set_threads(default_threads())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def set_threads(self, threads: int) -> int:
        """Use `threads` threads from now on, the caller included; not while a call runs."""
        count: int = self._set_threads(threads)
        return count

    def bind(self, operation: str, *args: Any) -> Callable[[], None]:
        """Prepare a call of `operation` with `args` for many replays, its checks made once.

        Tensors are read and written where they lie now; what stands in them may change.
        """
        prepared: list[tuple[Any, tuple[Any, ...]]] = []
        recorder = copy.copy(self)
        for name in (*_SIGNATURES, *self.attention_calls):
            function = getattr(self, f"_{name}")
            setattr(recorder, f"_{name}", _Prepare(function, prepared))
        getattr(recorder, operation)(*args)
        ((function, values),) = prepared

        def call(function: Any = function, values: Any = values, _: Any = args) -> None:
            # `_` keeps the tensors alive, of which `values` has but the addresses.
            if function(*values):
                raise AssertionError(f"{operation}: its arguments are no longer what was bound")

        return call

    def embed(self, ids: torch.Tensor, table: torch.Tensor | DenseLinear, factor: float,
              out: torch.Tensor) -> None:
        assert ids.is_contiguous() and out.is_contiguous()
        if isinstance(table, DenseLinear):
            status = self._embed_tiled(ids.data_ptr(), ids.shape[0],
                                       native_linear(table).address, factor, out.data_ptr())
        else:
            assert table.is_contiguous() and table.shape[1] == out.shape[1]
            status = self._embed(ids.data_ptr(), ids.shape[0], table.data_ptr(),
                                 dtype_code(table.dtype), *table.shape, factor, out.data_ptr())
        assert status == 0, "a token id beyond the vocabulary"

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        rows, size = x.shape
        assert x.is_contiguous() and out.is_contiguous() and weight.shape[0] == size
        self._rms_norm(x.data_ptr(), weight.data_ptr(), eps, rows, size, out.data_ptr())

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        native = w.native or native_linear(w)
        rows, in_features = x.shape
        out_stride, step = out.stride()
        assert in_features == native.in_features and x.is_contiguous()
        assert out.shape[0] == rows and out.shape[1] >= native.out_features and step == 1
        call = self._linear if native.packed else self._linear_dense
        status = call(x.data_ptr(), rows, native.address, out.data_ptr(), out_stride, add,
                      scratch.data_ptr(), scratch.nbytes)
        assert status == 0, "scratch is shorter than linear_scratch_bytes says"

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        rows, _, half = out.shape
        assert positions.is_contiguous() and out.is_contiguous() and inv_freq.shape[0] == half
        self._rope_table(positions.data_ptr(), inv_freq.data_ptr(), factor, rows, half,
                         out.data_ptr())

    def rope(self, x: torch.Tensor, table: torch.Tensor) -> None:
        rows, heads, head_dim = x.shape
        half = table.shape[2]
        assert x.is_contiguous() and table.is_contiguous() and 2 * half <= head_dim
        self._rope(x.data_ptr(), table.data_ptr(), rows, heads, head_dim, half)

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        assert gate.is_contiguous() and up.is_contiguous() and out.is_contiguous()
        assert gate.shape == up.shape == out.shape
        self._gate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(),
                   _ACTIVATIONS[activation])

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
        self._add(x.data_ptr(), y.data_ptr(), x.numel())

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        assert x.is_contiguous()
        self._softcap(x.data_ptr(), cap, x.numel())

    def moe_route(self, router_logits: torch.Tensor, top_k: int, normalize: bool,
                  weights: torch.Tensor, experts: torch.Tensor) -> None:
        rows, num_experts = router_logits.shape
        assert router_logits.is_contiguous() and top_k <= num_experts
        assert weights.is_contiguous() and weights.shape == (rows, top_k) == experts.shape
        self._moe_route(router_logits.data_ptr(), rows, num_experts, top_k, normalize,
                        weights.data_ptr(), experts.data_ptr())

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and rows.is_contiguous()
        status = self._gather_rows(x.data_ptr(), x.shape[0], rows.data_ptr(), rows.shape[0],
                                   x.shape[1], out.data_ptr())
        assert status == 0, "a row beyond x"

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and rows.is_contiguous()
        assert weights.is_contiguous() and weights.shape == rows.shape
        status = self._scatter_add_rows(x.data_ptr(), rows.data_ptr(), weights.data_ptr(),
                                        rows.shape[0], x.shape[1], out.data_ptr(), out.shape[0])
        assert status == 0, "a row beyond out"

    def pack_exl2(self, q_weight: torch.Tensor, groups: torch.Tensor,
                  codes: torch.Tensor) -> None:
        assert q_weight.is_contiguous() and groups.is_contiguous() and codes.is_contiguous()
        self._pack_exl2(q_weight.data_ptr(), *q_weight.shape, groups.data_ptr(),
                        groups.shape[0], codes.data_ptr(), *codes.shape)

    def pack_gptq(self, qweight: torch.Tensor, bits: int, perm: torch.Tensor | None,
                  groups: torch.Tensor, codes: torch.Tensor) -> None:
        assert qweight.is_contiguous() and groups.is_contiguous() and codes.is_contiguous()
        assert all(width == bits for width in groups[:, 0].tolist())
        self._pack_gptq(qweight.data_ptr(), *qweight.shape,
                        None if perm is None else perm.data_ptr(), groups.data_ptr(),
                        groups.shape[0], codes.data_ptr(), *codes.shape)
