"""Frames: what is packed is read back, and what is no frame is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.machines.frames import (
    DTYPES,
    MAX_ARRAYS,
    Envelope,
    Frame,
    FrameClass,
    InvalidFrame,
    PackedFrame,
    read_frame,
    read_header,
    room,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                 max_size=3),
    max_leaves=8,
)
ARRAYS = st.lists(st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
                  max_size=4)


def packed(frame: Frame, envelope: Envelope | None = None, more: int = 0) -> np.ndarray:
    made = PackedFrame(frame, envelope or Envelope(FrameClass.ORDERED))
    buffer = np.zeros(made.nbytes + more, np.uint8)
    made.write(buffer)
    return buffer


@given(st.text(max_size=8), st.dictionaries(st.text(max_size=5), JSON, max_size=4), ARRAYS,
       st.sampled_from(FrameClass), st.integers(0, 255), st.integers(0, 9))
def test_a_frame_is_read_as_it_was_packed(kind, fields, described, frame_class, place, more):
    random = np.random.default_rng()
    arrays = [
        np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), np.uint8)
        .view(dtype).reshape(shape)
        for dtype, shape in described
    ]
    envelope = Envelope(frame_class, place, 255 - place)
    buffer = packed(Frame(kind, fields, arrays), envelope, more)
    assert read_header(buffer, len(buffer)) == (envelope, len(buffer) - more)
    found = read_frame(buffer)
    assert (found.kind, found.fields, found.envelope) == (kind, fields, envelope)
    assert [(str(array.dtype), array.shape) for array in found.arrays] == [
        (dtype, tuple(shape)) for dtype, shape in described
    ]
    assert [array.tobytes() for array in found.arrays] == [array.tobytes() for array in arrays]
    assert all(np.shares_memory(array, buffer) for array in found.arrays if array.size)


def test_parts_of_arrays_are_sent_as_they_are_seen():
    whole = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = read_frame(packed(Frame("a", {}, [whole[::2, 1:3], whole.T])))
    np.testing.assert_array_equal(found.arrays[0], whole[::2, 1:3])
    np.testing.assert_array_equal(found.arrays[1], whole.T)


def test_room_holds_a_frame_with_an_array():
    array = np.zeros(1000, np.float32)
    assert len(packed(Frame("pass", {"rows": [1] * 1000}, [array]))) <= room(array.nbytes)


@pytest.mark.parametrize("frame, words", [
    (Frame("a", {}, [np.array(["text"], object)]), "arrays of object"),
    (Frame("a", {}, [np.zeros(1, np.complex64)]), "arrays of complex64"),
    (Frame("a", {}, [np.zeros(0)] * (MAX_ARRAYS + 1)), "at most 4096 arrays"),
    (Frame("a", {"a": float("nan")}), "JSON"),
    (Frame("a", {"a": "x" * (17 << 20)}), "at most 16777216 bytes"),
])
def test_what_a_frame_cannot_carry_is_refused_before_it_is_sent(frame, words):
    with pytest.raises(ValueError, match=words):
        PackedFrame(frame, Envelope(FrameClass.ORDERED))


def with_text(text: bytes, arrays_bytes: int = 0) -> np.ndarray:
    """A frame whose header fits its text, whatever that says."""
    buffer = packed(Frame("a"))[:24].tobytes()
    total = 24 + len(text) + arrays_bytes
    buffer = buffer[:8] + len(text).to_bytes(4, "little") + buffer[12:16]
    return np.frombuffer(
        buffer + total.to_bytes(8, "little") + text + bytes(arrays_bytes), np.uint8
    )


def test_the_header_of_the_next_test_is_right():
    assert read_frame(with_text(b'["a",{},[["uint8",[2]]]]', 42)).arrays[0].shape == (2,)


@pytest.mark.parametrize("text, words", [
    (b"", "no JSON"), (b"\xff", "no JSON"), (b"[" * 100_000, "no JSON"), (b"{}", "no kind"),
    (b'["a",{}]', "no kind"), (b'[1,{},[]]', "no kind"), (b'["a",[],[]]', "no kind"),
    (b'["a",{},[["uint8",[1000]]]]', "ends behind"),
    (b'["a",{},[["float32",[1048576,1048576,1048576]]]]', "ends behind"),
    (b'["a",{},[["uint8",[-1]]]]', "other than counts"),
    (b'["a",{},[["uint8",[true]]]]', "other than counts"),
    (b'["a",{},[["uint8",[1.0]]]]', "other than counts"),
    (b'["a",{},[["object",[1]]]]', "without type"), (b'["a",{},[[["uint8"],[1]]]]', "without type"),
    (b'["a",{},[["uint8",[1,1,1,1,1,1,1,1,1]]]]', "without type"), (b'["a",{},[7]]', "without"),
    (b'["a",{},[' + b"7," * 5000 + b"7]]", "5001 arrays"),
])
def test_a_text_that_is_none_is_refused(text, words):
    with pytest.raises(InvalidFrame, match=words):
        read_frame(with_text(text, 100))


def test_a_header_that_is_none_is_refused():
    buffer = packed(Frame("a", {}, [np.zeros(100)]))
    with pytest.raises(InvalidFrame, match="of which 99 are allowed"):
        read_header(buffer, 99)
    with pytest.raises(InvalidFrame, match="in a buffer of"):
        read_frame(buffer[:-1])
    for offset, value, words in ((0, 0, "begin"), (4, 9, "class 9"), (11, 255, "a text of")):
        broken = buffer.copy()
        broken[offset] = value
        with pytest.raises(InvalidFrame, match=words):
            read_header(broken, 1 << 40)


@given(st.binary(min_size=24, max_size=200), st.booleans())
def test_arbitrary_bytes_are_refused_or_read(data, begins_well):
    if begins_well:
        data = b"EXM1" + data[4:]
    try:
        frame = read_frame(np.frombuffer(data, np.uint8))
    except InvalidFrame:
        return
    assert data.startswith(b"EXM1") and isinstance(frame.kind, str)


def test_release_gives_the_buffer_back_once():
    given_back = []
    frame = read_frame(packed(Frame("a", {}, [np.zeros(3)])), lambda: given_back.append(1))
    frame.release()
    frame.release()
    assert given_back == [1] and frame.arrays == ()
