"""The key/value cache: its types and its bytes. No PyTorch.

Who may use which page is decided in `paging.py`.

Layout
------
A layer's cache is four tensors, keys and values apart, cut into pages of `PAGE_LEN` tokens.
A page's head is contiguous, so that reading one head of one page is one sequential run:

    fp32         codes: float32 [pages, kv_heads, PAGE_LEN, head_dim], no scales
    fp16         codes: int16, the same shape, no scales
    q8, q6, q4   codes: uint8 [pages, kv_heads, PAGE_LEN, code_bytes]
                 scales: float16 [pages, kv_heads, PAGE_LEN, groups]

Quantised vectors are rotated first and cut into groups of 32 elements; where head_dim is no
multiple of 32 the last group is shorter and its codes are padded to a multiple of 8. What
the codes and scales mean is defined in `backends/reference/codec.py`.

fp16 is float16's size and not its format: rounding keys and values to float16 moves logits by
4e-4, and 16 bits that share a scale by 6e-5 (`backends/reference/fp16.py`). fp32 is for
verification, where no rounding may stand in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..utils.errors import InvalidSettings, shown
from ..utils.table import MAIN_MEMORY, DeviceMap, TensorSpec

if TYPE_CHECKING:
    import torch

    from ..checkpoint.config import ModelConfig

PAGE_LEN = 256
GROUP = 32
SCALE_BYTES = 2

# Bits of one element -> the name of a cache type that keeps keys and values so.
BITS_NAMES = {32: "fp32", 16: "fp16", 8: "q8", 6: "q6", 4: "q4"}
_NAMED_BITS = {name: bits for bits, name in BITS_NAMES.items()} | {"fp8": 8}
_UNPACKED_DTYPES = {32: "float32", 16: "int16"}

# Pairs of a key bias that attention can add, of each key/value head: csrc/cpu/key_bias.h and
# csrc/cuda/key_bias.cuh have room for so many.
MAX_BIAS_PAIRS = 32
# Query heads of one key/value head with such a bias: csrc/cpu/attention.h has room for so many.
MAX_BIAS_SHARING = 128

# Codes of a short last group are padded to this, so that 6 bits end on a whole byte.
CODE_STEP = 8


def group_sizes(head_dim: int) -> list[int]:
    """Return the elements of each scale's group of one head, e.g. 80 -> [32, 32, 16]."""
    return [min(GROUP, head_dim - start) for start in range(0, head_dim, GROUP)]


def code_bytes(head_dim: int, bits: int) -> int:
    """Return the bytes of one head's codes for one token, scales not counted."""
    if bits in _UNPACKED_DTYPES:
        return head_dim * bits // 8
    return -(-head_dim // CODE_STEP) * CODE_STEP * bits // 8


def num_groups(head_dim: int, bits: int) -> int:
    """Return the scales that one head of one token has; unquantised types have none."""
    return 0 if bits in _UNPACKED_DTYPES else -(-head_dim // GROUP)


@dataclass(frozen=True)
class CacheType:
    """How keys and values are kept.

    Args:
        k_bits: bits of a key's element: 32, 16, 8, 6 or 4.
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
                actual=shown(name),
            )
        return cls(_NAMED_BITS[parts[0]], _NAMED_BITS[parts[-1]])

    def __str__(self) -> str:
        keys, values = BITS_NAMES[self.k_bits], BITS_NAMES[self.v_bits]
        return keys if keys == values else f"{keys}_{values}"

    @property
    def k_rotated(self) -> bool:
        """Whether keys are stored rotated: with 8 bits or fewer."""
        return self.k_bits not in _UNPACKED_DTYPES

    @property
    def v_rotated(self) -> bool:
        """Whether values are stored rotated."""
        return self.v_bits not in _UNPACKED_DTYPES

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
        device_map: the device of each layer; main memory where it is None.
    """
    devices = (device_map or DeviceMap.single(MAIN_MEMORY, config.num_hidden_layers)).layers
    tokens = (num_pages, config.num_key_value_heads, PAGE_LEN)
    specs: list[TensorSpec] = []
    for layer, device in enumerate(devices):
        for role, bits in (("k", cache_type.k_bits), ("v", cache_type.v_bits)):
            specs += _tensor_specs(f"cache.{layer}.{role}", tokens, config.head_dim, bits, device)
    return specs


def _tensor_specs(
    prefix: str, tokens: tuple[int, ...], head_dim: int, bits: int, device: str
) -> Iterator[TensorSpec]:
    if bits in _UNPACKED_DTYPES:
        shape = (*tokens, head_dim)
        yield TensorSpec(f"{prefix}_codes", "cache", _UNPACKED_DTYPES[bits], shape, device)
        return
    shape = (*tokens, code_bytes(head_dim, bits))
    yield TensorSpec(f"{prefix}_codes", "cache", "uint8", shape, device)
    shape = (*tokens, num_groups(head_dim, bits))
    yield TensorSpec(f"{prefix}_scales", "cache", "float16", shape, device)


@dataclass(eq=False)
class KeyBias:
    """The bias that a layer's keys in the cache are without.

    Args:
        pairs: int32 [kv_heads, P], element i of each pair (i, half + i). Heads with fewer
            pairs are filled up with pairs of zeros.
        first, second: float32 [kv_heads, P], the bias of elements i and half + i.
        half: rotary_dim / 2.
    """

    pairs: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    half: int


@dataclass
class CacheLayer:
    """One layer's cache at run time: views shaped as `cache_specs` says.

    `k_scales` and `v_scales` are None where keys or values are not quantised. `key_bias` is
    what the stored keys are without and attention adds, if anything. `native` belongs to the
    compiled operations, which keep their own description of the layer there.
    """

    k_codes: torch.Tensor
    k_scales: torch.Tensor | None
    v_codes: torch.Tensor
    v_scales: torch.Tensor | None
    cache_type: CacheType
    key_bias: KeyBias | None = None
    native: Any = field(default=None, compare=False, repr=False)

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a page to another page, as they are stored."""
        for tensor in (self.k_codes, self.k_scales, self.v_codes, self.v_scales):
            if tensor is not None:
                tensor[target, :, :count].copy_(tensor[source, :, :count])
