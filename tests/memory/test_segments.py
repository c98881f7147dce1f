"""Where tensors start in their buffers: alignment, order and sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.backends import backend_of
from exl_loader.memory.segments import align, lay_out
from exl_loader.utils.table import DTYPE_BYTES, SEGMENTS, TensorSpec

DEVICES = ("cpu", "cpu:1", "cuda:0", "cuda:1")

specs_strategy = st.lists(
    st.tuples(
        st.sampled_from(SEGMENTS),
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 300), max_size=4).map(tuple),
        st.sampled_from(DEVICES),
    ),
    max_size=40,
).map(lambda rows: [TensorSpec(f"t{i}", *row) for i, row in enumerate(rows)])


def test_align_rounds_up_to_the_device():
    assert [align(n, "cpu") for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
    assert [align(n, "cuda:3") for n in (0, 1, 256, 257)] == [0, 256, 256, 512]


@given(specs_strategy)
def test_lay_out_covers_every_spec_once_in_order_without_overlap(specs):
    segments = lay_out(specs)
    laid_out = [p.spec for segment in segments.values() for p in segment.offsets]
    assert sorted(laid_out, key=lambda s: s.name) == sorted(specs, key=lambda s: s.name)
    for (device, name), segment in segments.items():
        assert (segment.device, segment.name) == (device, name)
        end = 0
        for p in segment.offsets:
            step = backend_of(device).alignment_bytes
            assert p.offset % step == 0
            assert 0 <= p.offset - end < step
            end = p.offset + p.spec.nbytes
        assert 0 <= segment.nbytes - end < step
        assert segment.nbytes == sum(align(p.spec.nbytes, device) for p in segment.offsets)


def test_phases_of_a_region_share_memory():
    def spec(name, nbytes, *phase):
        return TensorSpec(name, "workspace", "uint8", (nbytes,), phase=phase or None)

    (segment,) = lay_out([
        spec("a", 100), spec("q", 60, "r", "one"), spec("k", 100, "r", "one"),
        spec("gate", 300, "r", "two"), spec("b", 64), spec("other", 10, "s", "one"),
    ]).values()
    offsets = {placed.spec.name: placed.offset for placed in segment.offsets}
    assert offsets == {"a": 0, "b": 128, "q": 192, "k": 256, "gate": 192, "other": 512}
    assert segment.nbytes == 576


def test_a_name_may_not_be_in_a_segment_twice():
    spec = TensorSpec("t", "weights", "uint8", (1,))
    with pytest.raises(AssertionError, match="twice"):
        lay_out([spec, spec])
