"""Grids of launches for the largest sizes that a model or an option may have.

A card takes 2^31 - 1 blocks in x and 65,535 in y and z. Nothing is launched and no memory taken:
tensors have a shape alone (PyTorch's `meta` device).
"""

import pytest
import torch

from exl_loader.backends.base import AttentionShape, Batch, Routing
from exl_loader.backends.cuda.attention import AttentionOps, attention_scratch_bytes
from exl_loader.backends.cuda.linear import LinearOps, linear_scratch_bytes
from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.cuda.top_logits import TopLogitsOps, top_logits_scratch_bytes
from exl_loader.backends.layouts import DenseLinear
from exl_loader.backends.top_logits import RESULT_WORDS
from exl_loader.cache.layout import CacheLayer, CacheType, code_bytes, num_groups
from exl_loader.checkpoint.config import (
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    MAX_VOCAB_SIZE,
)
from exl_loader.memory.reservation import LoadOptions
from support.linear_cases import stream_linear
from support.targets import emulated_launcher

MAX_BATCH_SIZE = int(LoadOptions.OPTIONS["max_batch_size"].most)
MAX_CHUNK_SIZE = int(LoadOptions.OPTIONS["chunk_size"].most)

LIMITS = (2**31 - 1, 65535, 65535)


class Shapes:
    """The emulated launcher, which checks shapes and arguments; notes each grid."""

    def __init__(self):
        self.launcher = emulated_launcher()
        self.multiprocessors = self.launcher.multiprocessors
        self.shared_limit_bytes = self.launcher.shared_limit_bytes
        self.grids = []

    def prepare(self, name, grid, block, shared_bytes, *args):
        assert all(0 < n <= limit for n, limit in zip(grid, LIMITS, strict=True)), (name, grid)
        self.grids.append(grid)
        return self.launcher.prepare(name, grid, block, shared_bytes, *args)


def drop(launch):
    """Run nothing."""


@pytest.fixture
def shapes():
    return Shapes()


def floats(*shape):
    return torch.empty(shape, device="meta")


def integers(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


def nbytes(count):
    return torch.empty(count, dtype=torch.uint8, device="meta")


def cache_layer(cache_type, shape, pages):
    kind = CacheType.parse(cache_type)
    tensors = []
    for bits in (kind.k_bits, kind.v_bits):
        width, groups = code_bytes(shape.head_dim, bits), num_groups(shape.head_dim, bits)
        dtype = {16: torch.int16, 32: torch.float32}.get(bits, torch.uint8)
        size = torch.empty((), dtype=dtype).element_size()
        place = pages, shape.num_kv_heads, 256
        tensors.append(torch.empty((*place, width // size), dtype=dtype, device="meta"))
        tensors.append(
            torch.empty((*place, groups), dtype=torch.float16, device="meta") if groups else None
        )
    k_codes, k_scales, v_codes, v_scales = tensors
    return CacheLayer(k_codes, k_scales, v_codes, v_scales, kind)


def batch_of(sequences, rows, pages=4):
    return Batch(integers(rows), integers(sequences + 1), integers(sequences),
                 integers(sequences, pages), pages * 256)


# The most rows as one text and as many texts, and the most texts of one row.
@pytest.mark.parametrize(("sequences", "rows"), [
    (1, MAX_CHUNK_SIZE), (MAX_BATCH_SIZE, MAX_CHUNK_SIZE), (MAX_BATCH_SIZE, MAX_BATCH_SIZE),
])  # fmt: skip
@pytest.mark.parametrize(("cache_type", "heads", "kv_heads", "head_dim"), [
    ("q4", 32, 32, 128), ("fp16", MAX_HEADS, MAX_HEADS, 64), ("q8", MAX_HEADS, 1, 256),
    ("fp32", MAX_HEADS, MAX_HEADS, 64), ("q6", 71, 1, 40),
])  # fmt: skip
def test_attention_and_the_cache(shapes, cache_type, heads, kv_heads, head_dim, sequences, rows):
    shape = AttentionShape(heads, kv_heads, head_dim, 0.1, 0.0, 0)
    layer, batch = cache_layer(cache_type, shape, 4), batch_of(sequences, rows)
    ops = AttentionOps(shapes, drop)
    q, k = floats(rows, heads, head_dim), floats(rows, kv_heads, head_dim)
    scratch = nbytes(attention_scratch_bytes(rows, sequences, 1024, shape))
    ops.attention(q, layer, batch, shape, floats(*q.shape), scratch)
    ops.write_cache(k, k, layer, batch, scratch)
    if head_dim <= 512:
        ops.rope_write_cache(q, k, k, floats(rows, 2, head_dim // 2), layer, batch)
    assert len(shapes.grids) >= 3


def test_rows(shapes):
    rows, size = MAX_CHUNK_SIZE, MAX_HIDDEN_SIZE
    ops, x = MoeOps(shapes, drop), floats(MAX_CHUNK_SIZE, MAX_HIDDEN_SIZE)
    ops.embed(integers(rows), floats(MAX_VOCAB_SIZE, size), 1.0, x)
    for width in (64, size):
        normed = floats(rows * MAX_HEADS if width == 64 else rows, width)
        ops.rms_norm(normed, floats(width), 1e-5, normed)
        ops.layer_norm(normed, floats(1, width), None, 1e-5, normed)
    ops.rope_table(integers(rows), floats(512), 1.0, floats(rows, 2, 512))
    ops.rope(floats(rows, MAX_HEADS, 128), floats(rows, 2, 64))
    gate = floats(rows, MAX_INTERMEDIATE_SIZE)
    ops.gate(gate, gate, "silu", gate)
    ops.activate(gate, "relu2", gate)
    ops.add(x, x)
    ops.add_gated_rows(x, x, floats(rows))
    ops.clamp(x, 1.0)
    ops.softcap(floats(MAX_BATCH_SIZE, MAX_VOCAB_SIZE), 30.0)
    ops.gather_rows(x, integers(MAX_BATCH_SIZE), floats(MAX_BATCH_SIZE, size))
    ops.scatter_add_rows(x, integers(rows), floats(rows), x)
    ops.moe_route(floats(rows, 1024), Routing(8), floats(rows, 8), integers(rows, 8))
    ops.moe_sum(floats(8 * rows, size), floats(rows, 8), integers(rows, 8), x)
    assert len(shapes.grids) == 17


@pytest.mark.parametrize("rows", [1, 2, 33, MAX_CHUNK_SIZE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_products(shapes, rows, dtype):
    for features, outputs in ((MAX_HIDDEN_SIZE, MAX_VOCAB_SIZE), (MAX_INTERMEDIATE_SIZE, 4096)):
        weight = torch.empty((-(-outputs // 16), features, 16), dtype=dtype, device="meta")
        w = DenseLinear(features, outputs, weight)
        scratch = nbytes(linear_scratch_bytes(rows, features))
        LinearOps(shapes, drop).linear(floats(rows, features), w, floats(rows, outputs), scratch,
                                         False)
    assert shapes.grids


@pytest.mark.parametrize("rows", [1, 2, 33, MAX_CHUNK_SIZE])
def test_quantised_products(shapes, rows):
    w = stream_linear([(4, 128)], 64)
    wide = stream_linear([(4, 32)], 1 << 17)
    for layer in (w, wide):
        scratch = nbytes(linear_scratch_bytes(rows, layer.in_features))
        LinearOps(shapes, drop).linear(
            floats(rows, layer.in_features), layer, floats(rows, layer.out_features), scratch,
            False,
        )
    assert shapes.grids


def test_top_logits(shapes):
    rows = MAX_BATCH_SIZE
    scratch = nbytes(top_logits_scratch_bytes(rows, MAX_VOCAB_SIZE))
    TopLogitsOps(shapes, drop).top_logits(
        floats(rows, MAX_VOCAB_SIZE), MAX_VOCAB_SIZE, integers(rows, RESULT_WORDS), scratch
    )
    assert len(shapes.grids) == 3
