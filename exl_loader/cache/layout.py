"""The layout of the key/value cache: its types and its bytes. No PyTorch.

`paging.py` decides which sequence holds which page.

Layout
------
The cache of a layer consists of up to four tensors, separate for keys and values, with pages of
`PAGE_LEN` tokens. One head of one page is contiguous, so it is read sequentially:

    fp32     codes: float32 [pages, kv_heads, PAGE_LEN, head_dim], no scales
    fp16     codes: int16, the same shape, no scales
    q8 - q3  codes: uint8 [pages, kv_heads, PAGE_LEN, code_bytes]
             scales: float16 [pages, kv_heads, PAGE_LEN, groups]

Quantised vectors are first rotated and cut into groups of 32 elements. If head_dim is not a
multiple of 32, the last group is shorter and its codes are padded to a multiple of 8.
`backends/reference/codec.py` defines the meaning of codes and scales.

A quantised cache also keeps the *open page* of each running sequence, the page that it is still
writing, in more bits, because a row depends most on the tokens just before it:

    open         as the tensors above, with open pages in place of pages and `open_bits` bits
    open.first   the first token of each sequence, [open pages, kv_heads, 1, ...], as well

Which keys a row sees in which form follows from positions alone: those of its own page and the
first one from the open page, all others from the codes. So a text has the same bits alone, in a
batch, in chunks, and after a beginning that another text has stored. Open pages store rotated
vectors, because attention rotates its queries once.

Keys of fewer than 8 bits are rounded with feedback (`backends/reference/feedback.py`), and RoPE
subtracts their mean first (`model/key_mean.py`). Of each layer:

    key_feedback   float16 [kv_heads, head_dim, head_dim], head_dim of the columns padded to a
                   multiple of 32 with zeros
    key_mean       float32 [kv_heads, head_dim]
    key_mean_room  int32 [3, kv_heads * MAX_BIAS_PAIRS], for the `KeyBias` that makes up for it

fp16 has the size of float16 but not its format: rounding keys and values to float16 changes logits
by 4e-4, and 16 bits with a shared scale by 6e-5 (`backends/reference/fp16.py`). fp32 is for
verification without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..utils.errors import InvalidSettings, shown
from ..utils.integers import ceil_div, round_up
from ..utils.table import MAIN_MEMORY, DeviceMap, TensorSpec

if TYPE_CHECKING:
    import torch

    from ..checkpoint.config import ModelConfig

PAGE_LEN = 256
GROUP = 32
SCALE_BYTES = 2

# Bits of one element -> name of the cache type with this size for keys and values.
BITS_NAMES = {32: "fp32", 16: "fp16", 8: "q8", 6: "q6", 4: "q4", 3: "q3"}
_NAMED_BITS = {name: bits for bits, name in BITS_NAMES.items()} | {"fp8": 8}
_UNPACKED_DTYPES = {32: "float32", 16: "int16"}

# Bits of an open page beside codes of so many bits. The error of 8 bits is small beside that of
# the 4-bit or 3-bit codes of all other pages.
_OPEN_BITS = {8: 16, 6: 16, 4: 8, 3: 8}

# Pairs of a key bias that attention can add, of each key/value head: csrc/cpu/key_bias.h and
# csrc/cuda/key_bias.cuh have room for so many.
MAX_BIAS_PAIRS = 32
# Query heads of one key/value head with such a bias: csrc/cpu/attention.h has room for so many.
MAX_BIAS_SHARING = 128

# Codes of a short last group are padded to a multiple of this, so that 6-bit and 3-bit codes end on
# a byte.
CODE_STEP = 8


def group_sizes(head_dim: int) -> list[int]:
    """Return the number of elements of each group of a head, such as [32, 32, 16] for 80."""
    return [min(GROUP, head_dim - start) for start in range(0, head_dim, GROUP)]


def code_bytes(head_dim: int, bits: int) -> int:
    """Return the bytes of the codes of one head of one token, without scales."""
    if bits in _UNPACKED_DTYPES:
        return head_dim * bits // 8
    return round_up(head_dim, CODE_STEP) * bits // 8


def num_groups(head_dim: int, bits: int) -> int:
    """Return the number of scales of one head of one token; 0 for unquantised types."""
    return 0 if bits in _UNPACKED_DTYPES else ceil_div(head_dim, GROUP)


def has_feedback(bits: int) -> bool:
    """True if keys of so many bits are rounded with feedback, and stored without their mean.

    Keys of 8 bits lose little as it is.
    """
    return bits < 8


def open_bits(bits: int) -> int:
    """Return the bits of an open page beside codes of so many bits; 0 where there is none."""
    return _OPEN_BITS.get(bits, 0)


@dataclass(frozen=True)
class CacheType:
    """How keys and values are stored.

    Args:
        k_bits: bits per element of keys: 32, 16, 8, 6, 4 or 3.
        v_bits: bits per element of values.
    """

    k_bits: int
    v_bits: int

    @classmethod
    def parse(cls, name: str | CacheType) -> CacheType:
        """Read the name of a cache type.

        Args:
            name: `fp32`, `fp16`, `q8`, `q6`, `q4`, `q3`, or two of them joined by `_`, keys
                first (`q8_q4`). Case does not matter. `fp8`, which the web UI offers, is read as
                `q8`, which has the same size.

        Raises:
            InvalidSettings: the name is unknown; the message lists the known names.
        """
        if isinstance(name, CacheType):
            return name
        parts = name.strip().lower().split("_") if isinstance(name, str) else []
        if len(parts) not in (1, 2) or not all(part in _NAMED_BITS for part in parts):
            raise InvalidSettings(
                "cache_type",
                expected=f"one of {', '.join(BITS_NAMES.values())}, or keys and values apart "
                "such as q8_q4",
                actual=shown(name),
            )
        return cls(_NAMED_BITS[parts[0]], _NAMED_BITS[parts[-1]])

    def __str__(self) -> str:
        keys, values = BITS_NAMES[self.k_bits], BITS_NAMES[self.v_bits]
        return keys if keys == values else f"{keys}_{values}"

    @property
    def k_rotated(self) -> bool:
        """True if keys are stored rotated: with 8 bits or fewer."""
        return self.k_bits not in _UNPACKED_DTYPES

    @property
    def v_rotated(self) -> bool:
        """True if values are stored rotated."""
        return self.v_bits not in _UNPACKED_DTYPES

    @property
    def has_open_pages(self) -> bool:
        """True if keys or values are quantised, so that a running sequence has an open page."""
        return self.k_rotated or self.v_rotated

    def bytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Return the bytes of one token in one layer: keys, values and scales.

        With head_dim a multiple of 32 and b bits, b < 16, this is
        kv_heads * head_dim * (k_bits + v_bits + 1) / 8.
        """
        head = sum(
            code_bytes(head_dim, bits) + SCALE_BYTES * num_groups(head_dim, bits)
            for bits in (self.k_bits, self.v_bits)
        )
        return num_kv_heads * head


def pages_for(num_tokens: int) -> int:
    """Return the number of pages for this many tokens of one sequence."""
    return ceil_div(num_tokens, PAGE_LEN)


def cache_specs(
    config: ModelConfig,
    num_pages: int,
    cache_type: CacheType,
    device_map: DeviceMap | None = None,
) -> list[TensorSpec]:
    """List the cache's tensors, `cache.{layer}.k_codes|k_scales|v_codes|v_scales`.

    The layer in a name is the model's number, also where the machine has a part of the layers.

    Args:
        config: gives num_hidden_layers, num_key_value_heads and head_dim.
        num_pages: pages of `PAGE_LEN` tokens, shared by all sequences.
        cache_type: how keys and values are stored.
        device_map: the device of each layer; None for main memory.
    """
    devices = device_map or DeviceMap.single(MAIN_MEMORY, config.num_hidden_layers)
    tokens = (num_pages, config.num_key_value_heads, PAGE_LEN)
    specs: list[TensorSpec] = []
    for layer, device in zip(devices.numbers, devices.layers, strict=True):
        for role, bits in (("k", cache_type.k_bits), ("v", cache_type.v_bits)):
            shapes = stored_shapes(f"cache.{layer}.{role}", tokens, config.head_dim, bits)
            specs += [
                TensorSpec(name, "cache", dtype, shape, device)
                for name, (dtype, shape) in shapes.items()
            ]
    return specs


def open_page_shapes(
    config: ModelConfig, num_layers: int, num_open_pages: int, cache_type: CacheType
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors of a device's open pages, `open.*`.

    They are part of the workspace, so that the pages of all types have sizes in the ratio of
    their bits. The first dimension is the layer, by its place on the device.

    Args:
        config: gives num_key_value_heads and head_dim.
        num_layers: decoder layers on the device.
        num_open_pages: sequences that may run at once.
        cache_type: how keys and values are stored.
    """
    heads = config.num_key_value_heads
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, length in (("open", PAGE_LEN), ("open.first", 1)):
        for role, bits in (("k", cache_type.k_bits), ("v", cache_type.v_bits)):
            if open_bits(bits):
                tokens = num_layers, num_open_pages, heads, length
                shapes |= stored_shapes(
                    f"{name}.{role}", tokens, config.head_dim, open_bits(bits)
                )
    return shapes


def stored_shapes(
    prefix: str, tokens: tuple[int, ...], head_dim: int, bits: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of `{prefix}_codes` and, if quantised, of `{prefix}_scales`.

    Args:
        prefix: the start of their names.
        tokens: the first dimensions, which end with key/value heads and tokens.
        head_dim: elements a head.
        bits: of one element.
    """
    if bits in _UNPACKED_DTYPES:
        return {f"{prefix}_codes": (_UNPACKED_DTYPES[bits], (*tokens, head_dim))}
    return {
        f"{prefix}_codes": ("uint8", (*tokens, code_bytes(head_dim, bits))),
        f"{prefix}_scales": ("float16", (*tokens, num_groups(head_dim, bits))),
    }


def key_sample_shapes(
    config: ModelConfig, num_layers: int, cache_type: CacheType
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of what a sample finds for a device's keys, part of the workspace.

    Args:
        config: gives num_key_value_heads, head_dim, and whether there is RoPE.
        num_layers: decoder layers on the device, the first dimension.
        cache_type: how keys are stored.
    """
    if not has_feedback(cache_type.k_bits):
        return {}
    heads, head_dim = config.num_key_value_heads, config.head_dim
    shape = num_layers, heads, head_dim, round_up(head_dim, GROUP)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"key_feedback": ("float16", shape)}
    if config.ropes:
        shapes["key_mean"] = "float32", (num_layers, heads, head_dim)
        shapes["key_mean_room"] = "int32", (num_layers, 3, heads * MAX_BIAS_PAIRS)
    return shapes


@dataclass(eq=False)
class KeyBias:
    """The bias that the stored keys of a layer lack and attention adds.

    Args:
        pairs: int32 [kv_heads, P], element i of each pair (i, half + i). Heads with fewer
            pairs are padded with pairs of zeros.
        first, second: float32 [kv_heads, P], the bias of elements i and half + i.
        half: rotary_dim / 2.
    """

    pairs: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    half: int


@dataclass(frozen=True, eq=False)
class StoredTokens:
    """Keys or values of a layer: views of the tensors that `cache_specs` lists.

    Args:
        codes: [pages, kv_heads, tokens of a page, ...], in the dtype of `bits`.
        scales: float16 [pages, kv_heads, tokens of a page, groups]; None if not quantised.
        bits: per element.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    bits: int

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a page to another page."""
        for tensor in (self.codes, self.scales):
            if tensor is not None:
                tensor[target, :, :count].copy_(tensor[source, :, :count])


@dataclass(frozen=True, eq=False)
class OpenPages:
    """The open pages of a layer's keys or values, stored rotated.

    Args:
        tokens: [open pages, kv_heads, PAGE_LEN, ...].
        first: the first token of each sequence, [open pages, kv_heads, 1, ...].
    """

    tokens: StoredTokens
    first: StoredTokens


@dataclass
class CacheLayer:
    """The cache of one layer at run time: views with the shapes of `cache_specs`.

    Args:
        k_codes, v_codes: keys and values.
        k_scales, v_scales: None if they are not quantised.
        cache_type: how they are stored.
        k_open, v_open: open pages of quantised keys and values; None for none.
        key_bias: what the stored keys lack, from the bias of their projection and from
            `key_mean`; None for nothing.
        key_feedback: float16 [kv_heads, head_dim, padded head_dim], how rounding errors of a
            key are fed to its further elements; None to round each element alone.
        key_mean: float32 [kv_heads, head_dim], which RoPE subtracts from keys; None for nothing.
        key_mean_room: int32 [3, kv_heads * MAX_BIAS_PAIRS], for `key_bias`; or None.
        native: the compiled operations' own description of the layer.
    """

    k_codes: torch.Tensor
    k_scales: torch.Tensor | None
    v_codes: torch.Tensor
    v_scales: torch.Tensor | None
    cache_type: CacheType
    k_open: OpenPages | None = None
    v_open: OpenPages | None = None
    key_bias: KeyBias | None = None
    key_feedback: torch.Tensor | None = None
    key_mean: torch.Tensor | None = None
    key_mean_room: torch.Tensor | None = None
    native: Any = field(default=None, compare=False, repr=False)

    def take_open_pages(self, views: Mapping[str, torch.Tensor], index: int) -> None:
        """Take the layer's open pages from the tensors that `open_page_shapes` plans.

        Args:
            views: the device's tensors by name; without open pages nothing is taken.
            index: the layer's place on its device.
        """
        self.k_open, self.v_open = (
            OpenPages(_stored(views, f"open.{role}", index, bits),
                      _stored(views, f"open.first.{role}", index, bits))
            if f"open.{role}_codes" in views else None
            for role, bits in (("k", open_bits(self.cache_type.k_bits)),
                               ("v", open_bits(self.cache_type.v_bits)))
        )

    def take_key_sample(self, views: Mapping[str, torch.Tensor], index: int) -> None:
        """Take the layer's part of the tensors that `key_sample_shapes` plans.

        Args:
            views: the device's tensors by name; what is missing is not taken.
            index: the layer's place on its device.
        """
        for name in ("key_feedback", "key_mean", "key_mean_room"):
            setattr(self, name, views[name][index] if name in views else None)

    @property
    def keys(self) -> StoredTokens:
        """The pages of keys."""
        return StoredTokens(self.k_codes, self.k_scales, self.cache_type.k_bits)

    @property
    def values(self) -> StoredTokens:
        """The pages of values."""
        return StoredTokens(self.v_codes, self.v_scales, self.cache_type.v_bits)

    @property
    def num_open_pages(self) -> int:
        """Number of open pages; 0 if the layer has none."""
        opened = self.k_open or self.v_open
        return 0 if opened is None else len(opened.tokens.codes)

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` stored tokens of a page to another page."""
        self.keys.copy_tokens(source, target, count)
        self.values.copy_tokens(source, target, count)

    def copy_open_page(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of an open page, and its first token, to another one."""
        for opened in (self.k_open, self.v_open):
            if opened is not None:
                opened.tokens.copy_tokens(source, target, count)
                opened.first.copy_tokens(source, target, 1)


def _stored(
    views: Mapping[str, torch.Tensor], name: str, index: int, bits: int
) -> StoredTokens:
    scales = views.get(f"{name}_scales")
    return StoredTokens(
        views[f"{name}_codes"][index], None if scales is None else scales[index], bits
    )
