"""The check of a card's kernels against the reference, before a model is loaded.

A faulty driver, an overheated card, or a kernel that a new architecture executes differently must
not show as a text without sense. So the first time a process opens a card's kernels, each
family of operations runs once on small inputs, and the results are compared with `ReferenceOps`
on the CPU. `doctor` shows the outcome.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...cache.layout import (
    PAGE_LEN,
    CacheLayer,
    CacheType,
    OpenPages,
    StoredTokens,
    open_bits,
    stored_shapes,
)
from ...formats.layer import QuantizedSizes, scale_values
from ...memory.buffers import allocate
from ...memory.segments import lay_out
from ...utils.errors import DeviceError, drop_locals
from ...utils.table import MAIN_MEMORY, TensorSpec
from ..base import AttentionShape, Batch, Routing
from ..kernel_structs import ACTIVATIONS
from ..reference import fp16 as reference_fp16
from ..reference.codec import dequantize, rotate_back
from ..reference.feedback import feedback_matrix
from ..reference.ops import ReferenceOps
from ..top_logits import HEADER_WORDS, RESULT_WORDS
from .attention import attention_scratch_bytes
from .layout import StreamLinear, group_table, row_block_table, stream_shapes
from .linear import linear_scratch_bytes
from .moe import expert_table_shape
from .pack import pack_streams
from .top_logits import top_logits_scratch_bytes

if TYPE_CHECKING:
    from ..cpu_access import CpuAccess
    from .ops import CudaOps

# Rows of a prompt, one more than are decoded, and its first position: it crosses a page, and the
# token after it sees two kv_splits. The sliding window saves the reference the other tokens.
PROMPT, PAST = 33, 240
PAGES = 2
# (bits, rows) of a quantised layer. Its row blocks of 128 rows start within groups.
GROUPS = ((6, 64), (4, 128), (3, 160))
IN_FEATURES = sum(rows for _, rows in GROUPS)
OUT_FEATURES = 96
# Elements of a row that a block normalises.
WIDE = 2 * IN_FEATURES
SHAPE = AttentionShape(4, 1, 128, 128**-0.5, sliding_window=60)
CACHE_TYPES = ("q4", "fp16")
# Types whose open pages have 8 and 16 bits, and the bits' order in prompts; and their number.
OPEN_CACHE_TYPES = ("q4", "q6")
OPEN_PAGES = 2
# Types whose keys are rounded with feedback, to levels in tables and to even ones.
FEEDBACK_CACHE_TYPES = ("q4", "q6")
# Logits of a row, which two blocks share.
VOCAB = 5000

# Relative L2 errors. Activations of products have 15 bits, attention multiplies float16, norms
# are float32; a cache loses what its type does on normal data (docs/cache_quality.md).
_PRODUCT_BOUND, _ATTENTION_BOUND, _NORM_BOUND = 5e-4, 4e-3, 1e-5
_WRITE_BOUNDS = {4: 0.1, 6: 0.025, 8: 0.01, 16: 1e-4}

_REMEDY = (
    "Nothing was loaded. Update NVIDIA's driver and run `exl_loader build --force`; if that "
    "does not help, run on the CPU (device='cpu') and report what `exl_loader doctor --json` says"
)


def check_card(ops: CudaOps, name: str) -> None:
    """Run a card's operations once and compare their results.

    The memory that this takes, less than 2 MiB of the card and a page of main memory, is
    released.

    Args:
        ops: `CudaOps` of the card.
        name: of the card, such as `cuda:0`.

    Raises:
        DeviceError: a result is wrong, or a kernel failed.
        InsufficientMemory: the card has less memory left than that.
    """
    buffers = allocate(lay_out(check_specs(name)).values())
    # The reference runs hundreds of small operations. On a busy machine threads would wait for
    # each other a hundred times as long as they compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # No local variable has the views, because an error keeps this function's frame.
        _Check(ops, name, buffers.views("workspace") | buffers.views("embedding")).run()
    except BaseException as error:
        drop_locals(error)  # which are views of the buffer
        if not isinstance(error, RuntimeError):
            raise
        # PyTorch reports a failed kernel at the copy that waits for it.
        raise _refusal(name, "kernels that run to their end", str(error)) from error
    finally:
        torch.set_num_threads(threads)
        buffers.release()


def _refusal(name: str, expected: str, actual: str) -> DeviceError:
    return DeviceError(
        f"{name}: its kernels, checked before use", expected=expected, actual=actual,
        remedy=_REMEDY,
    )


class _Check:
    """One run of the check, in memory of the card.

    Args:
        ops, name: as those of `check_card`.
        views: tensors of `check_specs`, by name.
    """

    def __init__(self, ops: CudaOps, name: str, views: dict[str, torch.Tensor]):
        self.ops, self.name, self.views = ops, name, views
        self._cpu_access: CpuAccess = ops.cpu_access
        self.reference = ReferenceOps()
        self.rng = np.random.default_rng(20)

    def run(self) -> None:
        self._embedding()
        self._rows()
        self._rope()
        self._mixture()
        self._products()
        for cache_type in CACHE_TYPES:
            self._attention(cache_type)
        for cache_type in OPEN_CACHE_TYPES:
            self._open_pages(cache_type)
        for cache_type in FEEDBACK_CACHE_TYPES:
            self._key_feedback(cache_type)
        self._top_logits()

    def _put(self, role: str, values: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Write values to a view from element `first` on; return these elements' tensor."""
        view = self.views[role].flatten()[first : first + values.numel()].view(values.shape)
        self._cpu_access.write(view, values.numpy())
        return view

    def _get(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._cpu_access.read(tensor).copy())

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape, np.float32))

    def _compare(self, what: str, actual: torch.Tensor, expected: torch.Tensor,
                 bound: float) -> None:
        wanted = expected.double()
        error = float((actual.double() - wanted).norm() / wanted.norm())
        if not error <= bound:  # NaN is no match
            raise _refusal(self.name, f"{what} within {bound:.0e} of the CPU's",
                           f"a relative error of {error:.2g}")

    def _embedding(self) -> None:
        """Check that kernels read main memory, bit for bit."""
        table, ids = self.views["embedding"], torch.tensor([2, 0, 3, 2], dtype=torch.int32)
        table.copy_(self._normal(*table.shape))
        expected = torch.empty(len(ids), IN_FEATURES)
        self.reference.embed(ids, table, 2.5, expected)
        out = self.views["y"][: len(ids)]
        self.ops.embed(self._put("integers", ids), table, 2.5, out)
        if not torch.equal(self._get(out), expected):
            raise _refusal(self.name, "rows of an embedding in main memory", "others")

    def _rows(self) -> None:
        """Check operations on rows without weight matrices."""
        for size in (IN_FEATURES, WIDE):  # a warp's row, a block's
            x, weight, bias = self._normal(3, size), self._normal(1, size), self._normal(1, size)
            out = torch.empty_like(x)
            self._equal("a norm", "rms_norm", ("x", x), ("weight", weight[0]), 1e-5, ("y", out))
            for added in (("bias", bias), None):
                self._equal("a LayerNorm", "layer_norm", ("x", x), ("weight", weight), added,
                            1e-5, ("y", out))
        heads = self._normal(2 * SHAPE.num_heads, SHAPE.head_dim)
        self._equal("a LayerNorm of heads", "layer_norm", ("x", heads),
                    ("weight", self._normal(SHAPE.num_heads, SHAPE.head_dim)), None, 1e-5,
                    ("y", torch.empty_like(heads)))
        x, y = self._normal(2, 3, IN_FEATURES)
        for activation in ACTIVATIONS:
            self._equal(f"a gate of {activation}", "gate", ("x", x), ("y", y), activation,
                        ("x", x))
        self._equal("an activation", "activate", ("x", x), "gelu", ("y", torch.empty_like(x)))
        self._equal("a sum", "add", ("x", x), ("y", y), 0.3, result=0)
        self._equal("a limit", "clamp", ("x", x), 0.8, result=0)
        self._equal("a soft cap", "softcap", ("x", x), 0.8, result=0)

    def _rope(self) -> None:
        """Check RoPE at a far position."""
        positions = torch.tensor([3, 100_003], dtype=torch.int32)
        frequencies = (1e4 ** -(torch.arange(SHAPE.head_dim // 2) / (SHAPE.head_dim // 2))).float()
        table = torch.empty(2, 2, SHAPE.head_dim // 2)
        self._equal("RoPE's angles", "rope_table", ("integers", positions),
                    ("inv_freq", frequencies), 1.0, ("rope_table", table))
        self.reference.rope_table(positions, frequencies, 1.0, table)
        mean = self._normal(SHAPE.num_heads, SHAPE.head_dim)
        for name, interleaved, less in (
            ("RoPE", False, None), ("interleaved RoPE", True, None),
            ("RoPE less a mean", False, ("key_mean", mean)),
        ):
            heads = self._normal(2, SHAPE.num_heads, SHAPE.head_dim)
            self._equal(name, "rope", ("q", heads), ("rope_table", table), interleaved, less,
                        result=0)

    def _mixture(self) -> None:
        """Check the choice of experts and their sum."""
        count, top_k = 8, 3
        logits, correction = self._normal(3, count), self._normal(count)
        weights, experts = torch.empty(3, top_k), torch.empty(3, top_k, dtype=torch.int32)
        correction_on_card = self._put("correction", correction)
        for routing in (Routing(top_k, "softmax", True, 1.5, correction),
                        Routing(top_k, "sigmoid", False, 1.5, correction)):
            on_card = [self._put(*part) for part in
                       (("router", logits), ("weights", weights), ("integers", experts))]
            self.reference.moe_route(logits, routing, weights, experts)
            self.ops.moe_route(on_card[0], replace(routing, correction=correction_on_card),
                               *on_card[1:])
            for actual, expected in zip(on_card[1:], (weights, experts), strict=True):
                self._compare("the choice of experts", self._get(actual), expected, _NORM_BOUND)
        x, pairs = self._normal(3, IN_FEATURES), self._normal(3 * top_k, IN_FEATURES)
        self._equal("the sum of experts", "moe_sum", ("y", pairs), ("weights", weights),
                    ("integers", experts), ("x", x))
        self._equal("a shared expert", "add_gated_rows", ("x", x), ("y", pairs[:3]),
                    ("weights", weights[:, 0].contiguous()), result=0)
        rows = torch.tensor([2, 0], dtype=torch.int32)
        self._equal("an expert's rows", "gather_rows", ("x", x), ("integers", rows),
                    ("y", torch.empty(2, IN_FEATURES)))
        self._equal("a sum of an expert's rows", "scatter_add_rows", ("y", pairs[:2]),
                    ("integers", rows), ("weights", weights[0, :2]), ("x", x))

    def _equal(self, what: str, operation: str, *args: Any, result: int = -1) -> None:
        """Compare a result of the card with the reference's.

        Args:
            what: the error's words for the operation.
            operation: a name in `base.Ops`.
            args: its arguments, a tensor as a pair with the role of the view that it is put in.
                A result that replaces an argument has its role.
            result: the index of the argument that receives the result.
        """
        on_card = [self._put(*arg) if isinstance(arg, tuple) else arg for arg in args]
        on_cpu = [arg[1].clone() if isinstance(arg, tuple) else arg for arg in args]
        getattr(self.ops, operation)(*on_card)
        getattr(self.reference, operation)(*on_cpu)
        self._compare(what, self._get(on_card[result]), on_cpu[result], _NORM_BOUND)

    def _top_logits(self) -> None:
        """Check the ids of a row's top logits, in order."""
        row, out = self._normal(1, VOCAB), self.views["top_logits"]
        self.ops.top_logits(self._put("logits", row), VOCAB, out, self.views["scratch"])
        words = self._get(out)[0].numpy()
        ids = words[HEADER_WORDS : HEADER_WORDS + max(int(words[1]), 1)]
        if not np.array_equal(ids, np.argsort(-row[0].numpy(), kind="stable")[: len(ids)]):
            raise _refusal(self.name, "the top logits in order", "others")

    def _products(self) -> None:
        """Check a layer that the card packs, bit for bit, and its products.

        These are of one row, of a prompt, and of experts that the card reads from a table.
        """
        table = group_table(list(GROUPS), zero_bits=0)
        codes = np.concatenate([self.rng.integers(0, 1 << bits, (rows, OUT_FEATURES), np.uint8)
                                for bits, rows in GROUPS])
        levels = self.rng.integers(0, 16, (len(GROUPS), OUT_FEATURES), np.uint8)
        units = self.rng.uniform(4e-6, 8e-5, len(GROUPS)).astype(np.float16)
        layer = self._pack(codes, levels, units, table)
        scales = scale_values(torch.from_numpy(levels), torch.from_numpy(units)[:, None]).numpy()
        weight = np.concatenate([
            scales[index].astype(np.float64) * (codes[first : first + rows] - float(1 << bits - 1))
            for index, (bits, first, rows, _) in enumerate(table)
        ])
        for rows, what in ((1, "a product of one row"), (PROMPT, "a prompt's product")):
            x, out = self._normal(rows, IN_FEATURES), self.views["product"][:rows]
            self.ops.linear(self._put("x", x), layer, out, self.views["scratch"])
            expected = torch.from_numpy(x.numpy() @ weight)
            self._compare(what, self._get(out), expected, _PRODUCT_BOUND)
        x = self._normal(2, IN_FEATURES)
        experts = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
        table_of_two = self.ops.expert_table([layer, layer], self.views["expert_table"])
        assert table_of_two is not None, "both are StreamLinear"
        out = self.views["product"][: experts.numel()]
        self.ops.linear_pairs(self._put("x", x), table_of_two, self._put("integers", experts), out,
                              self.views["scratch"])
        expected = torch.from_numpy(x.numpy() @ weight).repeat_interleave(2, dim=0)
        self._compare("products of chosen experts", self._get(out), expected, _PRODUCT_BOUND)

    def _pack(self, codes: np.ndarray[Any, Any], levels: np.ndarray[Any, Any],
              units: np.ndarray[Any, Any], table: list[tuple[int, int, int, int]]) -> StreamLinear:
        positions = row_block_table(table, zero_bits=0)
        groups = self._put("groups", torch.tensor(table, dtype=torch.int32))
        layer = StreamLinear(
            IN_FEATURES, OUT_FEATURES, self.views["codes"], groups,
            self._put("row_blocks", torch.tensor(positions, dtype=torch.int32)), positions,
            scale_units=self._put("scale_units", torch.from_numpy(units)),
        )
        expected = np.empty(tuple(layer.codes.shape), np.uint8)
        pack_streams(codes, levels, None, np.array(table, np.int32), expected)
        lent, self.ops.upload_buffer = self.ops.upload_buffer, self.views["upload_buffer"]
        try:
            words = torch.from_numpy(_exl2_words(codes, table))
            self.ops.pack_exl2_streams(words, torch.from_numpy(levels), groups, layer.codes)
        finally:
            self.ops.upload_buffer = lent
        differing = int((self._get(layer.codes).numpy() != expected).sum())
        if differing:
            raise _refusal(self.name, f"{expected.size} bytes of a packed layer as on the CPU",
                           f"{differing} others")
        return layer

    def _attention(self, cache_type: str) -> None:
        """Check writing and attention of a prompt after a text, and of a token after that."""
        kind = CacheType.parse(cache_type)
        layer = self._cache(cache_type, kind)
        sinks = self._normal(SHAPE.num_heads) if kind.k_bits == 4 else None
        for past, rows, what in ((PAST, PROMPT, "a prompt"), (PAST + PROMPT, 1, "a token")):
            self._step(what, past, rows, layer, SHAPE, sinks)

    def _open_pages(self, cache_type: str) -> None:
        """Check open pages: of a text's first token, of a prompt in a new page, of a token."""
        kind = CacheType.parse(cache_type)
        layer = self._cache(cache_type, kind)
        layer.k_open, layer.v_open = (
            OpenPages(*(self._stored_tokens(f"{cache_type}.{name}.{half}", open_bits(kind.k_bits))
                        for name in ("open_page", "first")))
            for half in "kv"
        )
        # Without a window, so that the prompt sees the first token.
        shape = replace(SHAPE, sliding_window=0)
        for past, rows, what in ((0, 1, "a first token"), (PAGE_LEN, PROMPT, "a prompt"),
                                 (PAGE_LEN + PROMPT, 1, "a token")):
            self._step(what, past, rows, layer, shape, None)

    def _key_feedback(self, cache_type: str) -> None:
        """Check keys that are rounded with feedback."""
        layer = self._cache(cache_type, CacheType.parse(cache_type))
        expected = self._read_back(layer)
        normal = self._normal(SHAPE.head_dim, SHAPE.head_dim).double()
        # The diagonal keeps the least eigenvalue from 0.
        moments = normal @ normal.T / SHAPE.head_dim + 0.1 * torch.eye(SHAPE.head_dim)
        feedback = feedback_matrix(moments)[None].half()
        expected.key_feedback = feedback
        layer.key_feedback = self._put("key_feedback", feedback)
        k, v = self._normal(2, PROMPT, SHAPE.num_kv_heads, SHAPE.head_dim)
        on_cpu, on_card = self._batches(PAST, PROMPT)
        self.reference.write_cache(k, v, expected, on_cpu, self.views["scratch"])
        self.ops.write_cache(self._put("k", k), self._put("v", v), layer, on_card,
                             self.views["scratch"])
        pages = on_cpu.page_table[0].long()[on_cpu.positions.long() // PAGE_LEN]
        ours, theirs = (_rows_of(stored, pages, on_cpu, True)
                        for stored in (self._read_back(layer).keys, expected.keys))
        self._compare(f"feedback of keys in a {cache_type} cache", ours, theirs,
                      0.3 * _WRITE_BOUNDS[layer.cache_type.k_bits])

    def _stored_tokens(self, role: str, bits: int) -> StoredTokens:
        return StoredTokens(self.views[f"{role}_codes"], self.views.get(f"{role}_scales"), bits)

    def _step(self, what: str, past: int, rows: int, layer: CacheLayer, shape: AttentionShape,
              sinks: torch.Tensor | None) -> None:
        """Check writing and attention of the rows of a call.

        Args:
            what: the errors' words for the rows.
            past, rows: tokens of the sequence before the call and in it.
            layer: on the card.
            shape: of attention.
            sinks: [num_heads]; None for none.
        """
        sinks_on_card = None if sinks is None else self._put("sinks", sinks)
        scratch, kind = self.views["scratch"], layer.cache_type
        cache = f"a {kind} cache"
        q = self._normal(rows, SHAPE.num_heads, SHAPE.head_dim)
        k, v = self._normal(2, rows, SHAPE.num_kv_heads, SHAPE.head_dim)
        on_cpu, on_card = self._batches(past, rows)
        self.ops.write_cache(self._put("k", k), self._put("v", v), layer, on_card, scratch)
        written = self._read_back(layer)
        for half, x, stored, opened in (("k", k, written.keys, written.k_open),
                                        ("v", v, written.values, written.v_open)):
            pages = on_cpu.page_table[0].long()[on_cpu.positions.long() // PAGE_LEN]
            rows_in_pages = _rows_of(stored, pages, on_cpu, stored.scales is not None)
            self._compare(f"{half} of {what} in {cache}", rows_in_pages, x,
                          _WRITE_BOUNDS[stored.bits])
            if opened is not None:
                pages = torch.full_like(pages, OPEN_PAGES - 1)
                rows_in_pages = _rows_of(opened.tokens, pages, on_cpu, True)
                self._compare(f"{half} of {what} in an open page of {cache}", rows_in_pages, x,
                              _WRITE_BOUNDS[opened.tokens.bits])
                if past == 0:
                    rows_in_pages = _rows_of(opened.first, pages[:1], on_cpu, True)
                    self._compare(f"{half} of {what} beside the open pages of {cache}",
                                  rows_in_pages, x[:1], _WRITE_BOUNDS[opened.tokens.bits])
        expected, out = torch.empty_like(q), self.views["attended"][:rows]
        self.reference.attention(q.clone(), written, on_cpu, shape, expected, scratch, sinks)
        self.ops.attention(self._put("q", q), layer, on_card, shape, out, scratch, sinks_on_card)
        opened_too = " with open pages" if layer.num_open_pages else ""
        self._compare(f"attention of {what} over {cache}{opened_too}", self._get(out), expected,
                      _ATTENTION_BOUND)

    def _cache(self, cache_type: str, kind: CacheType) -> CacheLayer:
        """Return a cache on the card with random contents."""
        tensors: dict[str, torch.Tensor] = {}
        for role, (dtype, shape) in cache_shapes(kind).items():
            if dtype == "int16":
                values = reference_fp16.encode(self._normal(*shape).flatten(0, 2)).view(shape)
            elif dtype == "float16":
                values = self._normal(*shape).half()
            else:
                values = torch.from_numpy(self.rng.integers(0, 256, shape, np.uint8))
            tensors[role] = self._put(f"{cache_type}.{role}", values)
        return CacheLayer(
            tensors["k_codes"], tensors.get("k_scales"), tensors["v_codes"],
            tensors.get("v_scales"), kind,
        )  # fmt: skip

    def _read_back(self, layer: CacheLayer) -> CacheLayer:
        k, v = self._read_tokens(layer.keys), self._read_tokens(layer.values)
        k_open, v_open = (
            None if opened is None else
            OpenPages(self._read_tokens(opened.tokens), self._read_tokens(opened.first))
            for opened in (layer.k_open, layer.v_open)
        )
        return CacheLayer(k.codes, k.scales, v.codes, v.scales, layer.cache_type, k_open, v_open)

    def _read_tokens(self, stored: StoredTokens) -> StoredTokens:
        scales = None if stored.scales is None else self._get(stored.scales)
        return StoredTokens(self._get(stored.codes), scales, stored.bits)

    def _batches(self, past: int, rows: int) -> tuple[Batch, Batch]:
        """Return a batch of one sequence with its pages in reverse, on the CPU and the card."""
        values = [
            torch.arange(past, past + rows, dtype=torch.int32),
            torch.tensor([0, rows], dtype=torch.int32),
            torch.tensor([past], dtype=torch.int32),
            torch.arange(PAGES - 1, -1, -1, dtype=torch.int32)[None],
            torch.tensor([OPEN_PAGES - 1], dtype=torch.int32),
        ]
        placed, first = [], 0
        for part in values:
            placed.append(self._put("integers", part, first))
            first += part.numel()
        on_cpu, on_card = (
            Batch(positions, q_start, past_len, page_table, past + rows, open_pages=open_pages)
            for positions, q_start, past_len, page_table, open_pages in (values, placed)
        )
        return on_cpu, on_card


def _linear_shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    words = sum(rows // 32 * bits for bits, rows in GROUPS)
    sizes = QuantizedSizes(
        OUT_FEATURES, IN_FEATURES, words, len(GROUPS), zero_bits=0, perm=False
    )
    return stream_shapes(sizes)


def check_specs(name: str) -> list[TensorSpec]:
    """Return the tensors that the check needs: on a card in one segment, and an embedding."""
    tokens, rows = PAGES * PAGE_LEN, PROMPT + 1
    scratch = max(
        linear_scratch_bytes(rows, IN_FEATURES),
        attention_scratch_bytes(rows, 1, tokens, SHAPE),
        top_logits_scratch_bytes(1, VOCAB),
    )
    heads = (SHAPE.num_heads, SHAPE.head_dim)
    kv_heads = (SHAPE.num_kv_heads, SHAPE.head_dim)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        **_linear_shapes(),
        "x": ("float32", (rows, IN_FEATURES)),
        "y": ("float32", (rows, IN_FEATURES)),
        "weight": ("float32", (WIDE,)),
        "bias": ("float32", (WIDE,)),
        "sinks": ("float32", (SHAPE.num_heads,)),
        "router": ("float32", (3, 8)),
        "correction": ("float32", (8,)),
        "weights": ("float32", (3, 3)),
        "product": ("float32", (rows, OUT_FEATURES)),
        "q": ("float32", (rows, *heads)),
        "k": ("float32", (rows, *kv_heads)),
        "v": ("float32", (rows, *kv_heads)),
        "key_feedback": ("float16", (SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.head_dim)),
        "key_mean": ("float32", heads),
        "attended": ("float32", (rows, *heads)),
        "integers": ("int32", (4 * rows,)),
        "rope_table": ("float32", (rows, 2, SHAPE.head_dim // 2)),
        "inv_freq": ("float32", (SHAPE.head_dim // 2,)),
        "logits": ("float32", (1, VOCAB)),
        "top_logits": ("int32", (1, RESULT_WORDS)),
        "expert_table": ("uint8", expert_table_shape(1, 2)[2:]),
        "scratch": ("uint8", (scratch,)),
        "upload_buffer": ("uint8", (1 << 16,)),
    }
    for cache_type in dict.fromkeys((*CACHE_TYPES, *OPEN_CACHE_TYPES, *FEEDBACK_CACHE_TYPES)):
        kind = CacheType.parse(cache_type)
        shapes |= {f"{cache_type}.{role}": found for role, found in cache_shapes(kind).items()}
    for cache_type in OPEN_CACHE_TYPES:
        bits = open_bits(CacheType.parse(cache_type).k_bits)
        for kind_of_tokens, length in (("open_page", PAGE_LEN), ("first", 1)):
            in_pages = OPEN_PAGES, SHAPE.num_kv_heads, length
            for half in "kv":
                shapes |= stored_shapes(
                    f"{cache_type}.{kind_of_tokens}.{half}", in_pages, SHAPE.head_dim, bits
                )
    embedding = TensorSpec(
        "embedding", "embedding", "float16", (4, IN_FEATURES), MAIN_MEMORY, read_by=name
    )
    return [
        *(TensorSpec(role, "workspace", dtype, shape, name)
          for role, (dtype, shape) in shapes.items()),
        embedding,
    ]


def cache_shapes(kind: CacheType) -> dict[str, tuple[str, tuple[int, ...]]]:
    tokens = PAGES, SHAPE.num_kv_heads, PAGE_LEN
    return {
        **stored_shapes("k", tokens, SHAPE.head_dim, kind.k_bits),
        **stored_shapes("v", tokens, SHAPE.head_dim, kind.v_bits),
    }


def _rows_of(stored: StoredTokens, pages: torch.Tensor, batch: Batch,
             is_rotated: bool) -> torch.Tensor:
    """Decode a batch's rows on the CPU, as float32 [T, kv_heads, head_dim].

    Args:
        stored: pages, or open pages.
        pages: of each row, int64 [T].
        batch: of one sequence.
        is_rotated: whether stored vectors are.
    """
    place = pages, slice(None), batch.positions.long() % PAGE_LEN
    codes = stored.codes[place]
    flat = codes.flatten(0, 1)
    if stored.scales is None:
        values = reference_fp16.decode(flat)
    else:
        values = dequantize(flat, stored.scales[place].flatten(0, 1), SHAPE.head_dim, stored.bits)
    values = rotate_back(values.double()) if is_rotated else values
    return values.view(*codes.shape[:2], -1)


def _exl2_words(codes: np.ndarray[Any, Any],
                table: list[tuple[int, int, int, int]]) -> np.ndarray[Any, Any]:
    """Pack codes uint8 [K, N] as EXL2's `q_weight`, int32: a column of a group is a run of bits."""
    words = []
    for bits, first, rows, _ in table:
        fields = codes[first : first + rows, None] >> np.arange(bits, dtype=np.uint8)[:, None] & 1
        stream = fields.reshape(rows * bits // 32, 32, -1).astype(np.uint32)
        places = np.arange(32, dtype=np.uint32)[:, None]
        words.append((stream << places).sum(axis=1, dtype=np.uint32))
    return np.concatenate(words).view(np.int32)
