"""Tensor specs and device maps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.utils.table import DTYPE_BYTES, DeviceMap, TensorSpec


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_dtype_names_are_torch_names(dtype):
    import torch

    assert getattr(torch, dtype).itemsize == DTYPE_BYTES[dtype]


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=4))
def test_nbytes_is_exact_beyond_64_bits(shape):
    spec = TensorSpec("t", "cache", "float32", tuple(shape))
    assert spec.nbytes == 4 * math.prod(shape)


def test_device_map_names_its_devices_in_the_order_of_a_token():
    assert DeviceMap.single("cpu", 3) == DeviceMap("cpu", ("cpu",) * 3, "cpu")
    assert DeviceMap("cuda:1", ("cuda:1", "cuda:0"), "cuda:0").devices == ("cuda:1", "cuda:0")
