"""The key/value cache: its types, its bytes, and its pages. No PyTorch.

Layout
------
A layer's cache is four tensors, keys and values apart, cut into pages of `PAGE_LEN` tokens.
A page's head is contiguous, so that reading one head of one page is one sequential run:

    fp32, fp16   codes: float [pages, kv_heads, PAGE_LEN, head_dim], no scales
    q8, q6, q4   codes: uint8 [pages, kv_heads, PAGE_LEN, code_bytes]
                 scales: float16 [pages, kv_heads, PAGE_LEN, groups]

Quantised vectors are rotated first and cut into groups of 32 elements; where head_dim is no
multiple of 32 the last group is shorter and its codes are padded to a multiple of 8. What
the codes and scales mean is defined in `kernels/reference_codec.py`.

fp16 keeps keys and values as they are, rounded to float16. That rounding alone moves logits
by about 1e-4; fp32 exists for verification, where it must not stand in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import CacheFull, InvalidSettings
from .table import DeviceMap, TensorSpec

if TYPE_CHECKING:
    import torch

    from .config import ModelConfig

PAGE_LEN = 256
GROUP = 32
SCALE_BYTES = 2

# Bits of one element -> the name of a cache type that keeps keys and values so.
BITS_NAMES = {32: "fp32", 16: "fp16", 8: "q8", 6: "q6", 4: "q4"}
_NAMED_BITS = {name: bits for bits, name in BITS_NAMES.items()} | {"fp8": 8}
_FLOAT_DTYPES = {32: "float32", 16: "float16"}

# Codes of a short last group are padded to this, so that 6 bits end on a whole byte.
CODE_STEP = 8


def group_sizes(head_dim: int) -> list[int]:
    """Return the elements of each scale's group of one head, e.g. 80 -> [32, 32, 16]."""
    return [min(GROUP, head_dim - start) for start in range(0, head_dim, GROUP)]


def code_bytes(head_dim: int, bits: int) -> int:
    """Return the bytes of one head's codes for one token, scales not counted."""
    if bits in _FLOAT_DTYPES:
        return head_dim * bits // 8
    return -(-head_dim // CODE_STEP) * CODE_STEP * bits // 8


def num_groups(head_dim: int, bits: int) -> int:
    """Return the scales that one head of one token has; unquantised types have none."""
    return 0 if bits in _FLOAT_DTYPES else -(-head_dim // GROUP)


@dataclass(frozen=True)
class CacheType:
    """How keys and values are kept.

    Args:
        k_bits: bits of a key's element: 32, 16 (both unquantised), 8, 6 or 4.
        v_bits: the same for values.
    """

    k_bits: int
    v_bits: int

    @classmethod
    def parse(cls, name: str | CacheType) -> CacheType:
        """Read a cache type as a user writes it.

        Args:
            name: `fp32`, `fp16`, `q8`, `q6`, `q4`, or two of them joined by `_`, keys first
                (`q8_q4`). Upper case is the same; `fp8`, which the web UI's list offers, is
                `q8`, the type of the same size.

        Raises:
            InvalidSettings: the name is unknown; the known ones are listed.
        """
        if isinstance(name, CacheType):
            return name
        parts = name.strip().lower().split("_") if isinstance(name, str) else []
        if len(parts) not in (1, 2) or not all(part in _NAMED_BITS for part in parts):
            raise InvalidSettings(
                "cache_type",
                expected=f"one of {', '.join(BITS_NAMES.values())}, or keys and values apart "
                "such as q8_q4",
                actual=repr(name),
            )
        return cls(_NAMED_BITS[parts[0]], _NAMED_BITS[parts[-1]])

    def __str__(self) -> str:
        keys, values = BITS_NAMES[self.k_bits], BITS_NAMES[self.v_bits]
        return keys if keys == values else f"{keys}_{values}"

    @property
    def k_rotated(self) -> bool:
        """Whether keys are stored rotated, as all quantised vectors are."""
        return self.k_bits not in _FLOAT_DTYPES

    @property
    def v_rotated(self) -> bool:
        """Whether values are stored rotated."""
        return self.v_bits not in _FLOAT_DTYPES

    def bytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """Return what one token takes in one layer, keys, values and scales together.

        With head_dim a multiple of 32 and b bits, b < 16, this is
        kv_heads * head_dim * (k_bits + v_bits + 1) / 8.
        """
        head = sum(
            code_bytes(head_dim, bits) + SCALE_BYTES * num_groups(head_dim, bits)
            for bits in (self.k_bits, self.v_bits)
        )
        return num_kv_heads * head


def pages_for(num_tokens: int) -> int:
    """Return the pages that hold so many tokens of one sequence."""
    return -(-num_tokens // PAGE_LEN)


def cache_specs(
    config: ModelConfig,
    num_pages: int,
    cache_type: CacheType,
    device_map: DeviceMap | None = None,
) -> list[TensorSpec]:
    """List the cache's tensors, `cache.{layer}.k_codes|k_scales|v_codes|v_scales`.

    Args:
        config: gives num_hidden_layers, num_key_value_heads and head_dim.
        num_pages: pages of `PAGE_LEN` tokens, shared by all sequences.
        cache_type: how keys and values are kept.
        device_map: the device of each layer; the CPU where it is None.
    """
    devices = (device_map or DeviceMap.single("cpu", config.num_hidden_layers)).layers
    tokens = (num_pages, config.num_key_value_heads, PAGE_LEN)
    specs: list[TensorSpec] = []
    for layer, device in enumerate(devices):
        for role, bits in (("k", cache_type.k_bits), ("v", cache_type.v_bits)):
            specs += _tensor_specs(f"cache.{layer}.{role}", tokens, config.head_dim, bits, device)
    return specs


def _tensor_specs(
    prefix: str, tokens: tuple[int, ...], head_dim: int, bits: int, device: str
) -> Iterator[TensorSpec]:
    if bits in _FLOAT_DTYPES:
        shape = (*tokens, head_dim)
        yield TensorSpec(f"{prefix}_codes", "cache", _FLOAT_DTYPES[bits], shape, device)
        return
    shape = (*tokens, code_bytes(head_dim, bits))
    yield TensorSpec(f"{prefix}_codes", "cache", "uint8", shape, device)
    shape = (*tokens, num_groups(head_dim, bits))
    yield TensorSpec(f"{prefix}_scales", "cache", "float16", shape, device)


@dataclass
class CacheLayer:
    """One layer's cache at run time: views shaped as `cache_specs` says.

    `k_scales` and `v_scales` are None where keys or values are not quantised. `native` belongs
    to the compiled operations, which keep their own description of the layer there.
    """

    k_codes: torch.Tensor
    k_scales: torch.Tensor | None
    v_codes: torch.Tensor
    v_scales: torch.Tensor | None
    cache_type: CacheType
    native: Any = field(default=None, compare=False, repr=False)


@dataclass(eq=False)
class Sequence:
    """The pages and the progress of one text.

    Args:
        pages: page numbers in the order of the text.
        past_len: tokens that the cache holds; the forward pass advances it.
        rope_len: the length the text is meant to reach, which picks RoPE's frequencies.
    """

    pages: list[int] = field(default_factory=list)
    past_len: int = 0
    rope_len: int = 0

    @property
    def capacity(self) -> int:
        """Tokens that the sequence's pages can hold."""
        return len(self.pages) * PAGE_LEN


class PagedCache:
    """Lends pages of the cache to sequences. Not thread-safe: one engine thread calls it.

    A page counts how many sequences hold it and is free again at zero, so sequences with the
    same beginning can share the full pages of it. Nobody writes to a shared page, because a
    sequence only writes behind its past_len.

    Args:
        layers: the cache of each decoder layer.
        num_pages: pages that each of these layers has.
    """

    def __init__(self, layers: SequenceOf[CacheLayer], num_pages: int) -> None:
        self.layers = list(layers)
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        # Popped from the end: the lowest page first, as long as none has been given back.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def acquire(self, num_tokens: int, prefix_pages: SequenceOf[int] = ()) -> Sequence:
        """Start a sequence with room for `num_tokens` tokens in all, and that as rope_len.

        Args:
            num_tokens: tokens that the text may reach.
            prefix_pages: full pages of another, living sequence with the same beginning;
                past_len starts behind them.

        Raises:
            CacheFull: too few pages are free; nothing has been taken.
        """
        prefix_len = len(prefix_pages) * PAGE_LEN
        assert all(self._holders[page] > 0 for page in prefix_pages), "prefix of a dead sequence"
        assert prefix_len <= num_tokens, (prefix_len, num_tokens)
        fresh = self._take(pages_for(num_tokens - prefix_len), num_tokens)
        for page in prefix_pages:
            self._holders[page] += 1
        return Sequence([*prefix_pages, *fresh], past_len=prefix_len, rope_len=num_tokens)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in all; what is there already stays.

        Raises:
            CacheFull: too few pages are free; the sequence is as it was.
        """
        missing = pages_for(num_tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._take(missing, num_tokens)

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's pages back. It is empty afterwards; twice does no harm."""
        for page in reversed(sequence.pages):
            assert self._holders[page] > 0, f"page {page} is given back twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
        sequence.pages = []
        sequence.past_len = 0

    def _take(self, count: int, num_tokens: int) -> list[int]:
        if count > len(self._free):
            raise CacheFull(
                f"the cache has no room for a text of {num_tokens} tokens",
                expected=f"{count} free pages of {PAGE_LEN} tokens",
                actual=f"{len(self._free)} of {self.num_pages}",
                remedy="Load the model with a larger ctx_size, or wait for other requests to end",
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken
