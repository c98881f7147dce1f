"""What the check of a card's kernels runs on: shapes, and the memory they take. No PyTorch."""

from __future__ import annotations

from ...cache.layout import PAGE_LEN, CacheType, code_bytes, num_groups
from ...formats.common import quantized_specs
from ...formats.packed import QuantizedSizes
from ...utils.table import TensorSpec
from ..base import AttentionShape
from . import scratch as sizes
from .scratch_sampling import RESULT_WORDS

# Rows of a prompt, one more than are decoded, and where it begins: it crosses a page, and
# what a token behind it sees lies in two splits. A window spares the reference the rest.
PROMPT, PAST = 33, 240
PAGES = 2
# (bits, rows) of a quantised layer; its windows of 128 rows begin within groups.
GROUPS = ((6, 64), (4, 128), (3, 160))
IN_FEATURES = sum(rows for _, rows in GROUPS)
OUT_FEATURES = 96
SHAPE = AttentionShape(4, 1, 128, 128**-0.5, window=60)
CACHE_TYPES = ("q4", "fp16")
# Logits of a row that two blocks share.
VOCAB = 5000


def _linear_specs(name: str) -> dict[str, TensorSpec]:
    words = sum(rows // 32 * bits for bits, rows in GROUPS)
    sizes = QuantizedSizes(
        OUT_FEATURES, IN_FEATURES, words, len(GROUPS), zeros=False, perm=False
    )
    return quantized_specs("linear", sizes, name)


def check_specs(name: str) -> list[TensorSpec]:
    """List what the check takes of a card, all of it as one segment."""
    tokens, rows = PAGES * PAGE_LEN, PROMPT + 1
    kinds = [CacheType.parse(cache_type) for cache_type in CACHE_TYPES]
    scratch = max(
        sizes.linear_scratch_bytes(rows, IN_FEATURES, OUT_FEATURES),
        *(sizes.attention_scratch_bytes(rows, 1, tokens, SHAPE, kind) for kind in kinds),
        *(sizes.write_cache_scratch_bytes(rows, SHAPE, kind) for kind in kinds),
        sizes.top_logits_scratch_bytes(1, VOCAB),
    )
    heads = (SHAPE.num_heads, SHAPE.head_dim)
    kv_heads = (SHAPE.num_kv_heads, SHAPE.head_dim)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        **{role: (spec.dtype, spec.shape) for role, spec in _linear_specs(name).items()},
        "x": ("float32", (rows, IN_FEATURES)),
        "norm": ("float32", (IN_FEATURES,)),
        "normed": ("float32", (rows, IN_FEATURES)),
        "product": ("float32", (rows, OUT_FEATURES)),
        "q": ("float32", (rows, *heads)),
        "k": ("float32", (rows, *kv_heads)),
        "v": ("float32", (rows, *kv_heads)),
        "attended": ("float32", (rows, *heads)),
        "integers": ("int32", (4 * rows,)),
        "rope_table": ("float32", (rows, 2, SHAPE.head_dim // 2)),
        "inv_freq": ("float32", (SHAPE.head_dim // 2,)),
        "logits": ("float32", (1, VOCAB)),
        "top_logits": ("int32", (1, RESULT_WORDS)),
        "scratch": ("uint8", (scratch,)),
        "staging": ("uint8", (1 << 16,)),
    }
    for cache_type, kind in zip(CACHE_TYPES, kinds, strict=True):
        shapes |= {f"{cache_type}.{role}": found for role, found in cache_shapes(kind).items()}
    return [
        TensorSpec(role, "workspace", dtype, shape, name)
        for role, (dtype, shape) in shapes.items()
    ]


def cache_shapes(kind: CacheType) -> dict[str, tuple[str, tuple[int, ...]]]:
    tokens, bits, head_dim = (PAGES, SHAPE.num_kv_heads, PAGE_LEN), kind.k_bits, SHAPE.head_dim
    if bits == 16:
        return {f"{half}_codes": ("int16", (*tokens, head_dim)) for half in "kv"}
    return {
        f"{half}_{role}": found
        for half in "kv"
        for role, found in (
            ("codes", ("uint8", (*tokens, code_bytes(head_dim, bits)))),
            ("scales", ("float16", (*tokens, num_groups(head_dim, bits)))),
        )
    }
