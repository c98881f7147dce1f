"""Wrong headers are refused by errors that name the file, the expected and the actual."""

from __future__ import annotations

import json
import os

import pytest

from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidCheckpoint
from support.makers import header_entry, write_raw

X = header_entry()
BAD_HEADERS = {
    "empty": (b"", b""),
    "no-json": (b"{nonsense", b""),
    "no-utf8": (b'{"\xff": 1}', b""),
    "a-list": ([1], b""),
    "deeply-nested": (b"[" * 100_000, b""),
    "huge-number": (b'{"x": ' + b"9" * 10_000 + b"}", b""),
    "metadata-no-object": ({"__metadata__": 3, "x": X}, b"1234"),
    "entry-no-object": ({"x": 3}, b""),
    "no-dtype": ({"x": {"shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    "unknown-dtype": ({"x": header_entry("F17")}, b"1234"),
    "dtype-no-string": ({"x": header_entry(["F16"])}, b"1234"),
    "shape-no-list": ({"x": X | {"shape": 2}}, b"1234"),
    "shape-negative": ({"x": header_entry(shape=[-1, -2])}, b"1234"),
    "shape-float": ({"x": header_entry(shape=[2.0])}, b"1234"),
    "shape-bool": ({"x": header_entry(shape=[True, 2])}, b"1234"),
    "shape-too-large": ({"x": header_entry(shape=[1 << 41, 0], offsets=[0, 0])}, b""),
    "shape-too-long": ({"x": header_entry(shape=[1] * 9 + [2])}, b"1234"),
    "shape-overflows": ({"x": header_entry(shape=[1 << 40] * 8)}, b"1234"),
    "offsets-three": ({"x": header_entry(offsets=[0, 2, 4])}, b"1234"),
    "offsets-negative": ({"x": header_entry(offsets=[-4, 0])}, b"1234"),
    "offsets-falling": ({"x": header_entry(offsets=[4, 0])}, b"1234"),
    "offsets-text": ({"x": header_entry(offsets=["0", "4"])}, b"1234"),
    "offsets-no-list": ({"x": X | {"data_offsets": {"0": 4}}}, b"1234"),
    "too-few-bytes": ({"x": header_entry(offsets=[0, 2])}, b"12"),
    "half-a-byte": ({"x": header_entry("F4", [3], [0, 1])}, b"1"),
    "gap-at-start": ({"x": header_entry(offsets=[2, 6])}, b"123456"),
    "gap": ({"x": X, "y": header_entry(offsets=[6, 10])}, b"1234567890"),
    "overlap": ({"x": X, "y": header_entry(offsets=[2, 6])}, b"123456"),
    "same-bytes": ({"x": X, "y": X}, b"1234"),
    "truncated": ({"x": X}, b"123"),
    "data-of-no-tensor": ({"x": X}, b"12345"),
    "twice": (b'{"x": %s, "x": %s}' % ((json.dumps(X).encode(),) * 2), b"1234"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_wrong_header_is_refused(tmp_path, case):
    header, data = BAD_HEADERS[case]
    folder = write_raw(tmp_path / "m/model.safetensors", header, data)
    with pytest.raises(
        InvalidCheckpoint, match=r"^model\.safetensors: .*expected .*found"
    ) as caught:
        Checkpoint.open(folder)
    assert caught.value.remedy and len(str(caught.value)) < 700


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    folder = write_raw(tmp_path / "m/model.safetensors", {"x": X}, b"1234", length)
    with pytest.raises(InvalidCheckpoint, match="header length"):
        Checkpoint.open(folder)


def test_the_error_names_a_git_lfs_pointer(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(InvalidCheckpoint, match="git lfs pull"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_without_room_for_a_length(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match="file length"):
        Checkpoint.open(tmp_path)


def test_metadata_and_trailing_spaces_are_accepted(tmp_path):
    text = json.dumps({"__metadata__": {"format": "pt"}, "x": X}).encode() + b"   "
    folder = write_raw(tmp_path / "m/model.safetensors", text, b"1234")
    assert list(Checkpoint.open(folder).headers) == ["x"]


@pytest.mark.parametrize("kind", ["folder", "broken-link", "pipe"])
def test_special_files_are_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "broken-link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(path)
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)
