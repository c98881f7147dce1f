"""Cache types, and the bytes of the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.cache.layout import PAGE_LEN, CacheType, cache_specs, group_sizes, num_groups
from exl_loader.memory.segments import lay_out
from exl_loader.utils.errors import InvalidSettings
from exl_loader.utils.table import DeviceMap

NAMES = ("fp32", "fp16", "q8", "q6", "q4", "q3")
QUANTIZED = {"q8": 8, "q6": 6, "q4": 4, "q3": 3}


def config(layers=2, kv_heads=4, head_dim=64):
    return SimpleNamespace(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, head_dim=head_dim
    )


def cache_bytes(num_pages, cache_type, **geometry):
    specs = cache_specs(config(**geometry), num_pages, CacheType.parse(cache_type))
    return sum(spec.nbytes for spec in specs)


geometries = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 6),
        "kv_heads": st.integers(1, 64),
        "head_dim": st.integers(1, 16).map(lambda n: 32 * n),
    }
)


@pytest.mark.parametrize("name", NAMES)
def test_names_round_trip(name):
    assert str(CacheType.parse(name)) == name
    for values in NAMES:
        mixed = f"{name}_{values}"
        assert str(CacheType.parse(mixed)) == (mixed if name != values else name)


def test_names_in_other_spellings():
    assert CacheType.parse("Q8_q4") == CacheType(8, 4)
    assert CacheType.parse(" FP16 ") == CacheType(16, 16)
    assert CacheType.parse("fp8") == CacheType.parse("q8")
    assert CacheType.parse(CacheType(6, 4)) == CacheType(6, 4)


@pytest.mark.parametrize("name", ["", "q5", "q4_", "q4_q4_q4", "4", "nope", None, 4])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InvalidSettings) as caught:
        CacheType.parse(name)
    assert all(known in str(caught.value) for known in NAMES)
    assert repr(name) in str(caught.value)


@given(geometries, st.integers(1, 500))
def test_bytes_are_bits_and_one_scale_per_32(geometry, num_pages):
    elements = (
        num_pages * PAGE_LEN * geometry["layers"] * geometry["kv_heads"] * geometry["head_dim"]
    )
    for keys, k_bits in QUANTIZED.items():
        for values, v_bits in QUANTIZED.items():
            total = cache_bytes(num_pages, f"{keys}_{values}", **geometry)
            assert total * 8 * 2 == elements * (2 * k_bits + 2 * v_bits + 2)
    fp16 = cache_bytes(num_pages, "fp16", **geometry)
    assert fp16 == elements * 4
    assert cache_bytes(num_pages, "q4", **geometry) * 160 == fp16 * 45
    assert cache_bytes(num_pages, "q8", **geometry) * 45 == 85 * cache_bytes(
        num_pages, "q4", **geometry
    )


@given(geometries, st.integers(1, 50), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_alignment_adds_no_bytes(geometry, num_pages, keys, values):
    kind = CacheType.parse(f"{keys}_{values}")
    for device in ("cpu", "cuda:0"):
        devices = DeviceMap.single(device, geometry["layers"])
        specs = cache_specs(config(**geometry), num_pages, kind, devices)
        (segment,) = lay_out(specs).values()
        assert segment.nbytes == sum(spec.nbytes for spec in specs)
        per_token = kind.bytes_per_token(geometry["kv_heads"], geometry["head_dim"])
        assert segment.nbytes == num_pages * PAGE_LEN * geometry["layers"] * per_token


@given(st.integers(1, 600), st.sampled_from(sorted(QUANTIZED)))
def test_other_head_sizes_have_one_short_group(head_dim, name):
    bits = QUANTIZED[name]
    sizes = group_sizes(head_dim)
    assert sum(sizes) == head_dim and len(sizes) == num_groups(head_dim, bits)
    assert all(size == 32 for size in sizes[:-1]) and 1 <= sizes[-1] <= 32
    per_head = CacheType.parse(name).bytes_per_token(1, head_dim) // 2
    ideal = head_dim * (2 * bits + 1) / 16
    # At most seven padded codes, and one scale for a single element.
    assert ideal <= per_head <= ideal + 7 * bits / 8 + 2


def test_head_dim_80_is_46_bytes_in_q4_and_36_in_q3():
    assert group_sizes(80) == [32, 32, 16]
    assert CacheType.parse("q4").bytes_per_token(1, 80) == 2 * (40 + 6)
    assert CacheType.parse("q3").bytes_per_token(1, 80) == 2 * (30 + 6)


def test_specs_name_every_tensor_and_its_device():
    devices = DeviceMap("cuda:0", ("cuda:0", "cuda:1"), "cuda:1")
    specs = cache_specs(config(), 3, CacheType.parse("q8_fp16"), devices)
    assert [(spec.name, spec.dtype, spec.shape, spec.device) for spec in specs] == [
        (f"cache.{layer}.{name}", dtype, (3, 4, PAGE_LEN, width), f"cuda:{layer}")
        for layer in (0, 1)
        for name, dtype, width in (
            ("k_codes", "uint8", 64),
            ("k_scales", "float16", 2),
            ("v_codes", "int16", 64),
        )
    ]
