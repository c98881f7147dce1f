"""Reading files: regular files of bounded size, and a typed error for anything else."""

from __future__ import annotations

import os
import random

import pytest

from exl_loader.utils import untrusted_files
from exl_loader.utils.errors import (
    ExlLoaderError,
    InvalidConfig,
    InvalidTokenizer,
    ModelNotFound,
    printable,
    shown,
)
from exl_loader.utils.json_keys import MAX_DEPTH, InvalidJson, parse_json
from exl_loader.utils.untrusted_files import is_there, read_bytes, read_text
from support.special_files import SPECIAL_FILES, sparse_file

LIMIT = 1000

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_special_files_are_refused_with_their_name(tmp_path, kind):
    path = tmp_path / "config.json"
    SPECIAL_FILES[kind](path)
    assert is_there(path)
    with pytest.raises(ExlLoaderError, match="config.json: expected a") as caught:
        read_bytes(path, LIMIT, error=InvalidTokenizer, missing=ModelNotFound)
    nowhere = kind == "dangling_link"
    assert type(caught.value) is (ModelNotFound if nowhere else InvalidTokenizer)


def test_a_missing_file(tmp_path):
    assert not is_there(tmp_path / "none") and not is_there(tmp_path / "a\0b")
    (tmp_path / "file").write_bytes(b"")
    assert not is_there(tmp_path / "file" / "below")
    for path in (tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises(ModelNotFound, match="expected a file, found none"):
            read_bytes(path, LIMIT)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 5000])
def test_an_impossible_file_name(tmp_path, name):
    with pytest.raises(ExlLoaderError) as caught:
        read_bytes(f"{tmp_path}/{name}", LIMIT)
    str(caught.value).encode()


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "blob").write_bytes(b"text")
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "link_of_link").symlink_to("link")
    assert read_bytes(tmp_path / "link_of_link", LIMIT) == b"text"


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT, LIMIT + 1, 5 * LIMIT])
def test_the_limit_is_the_most_bytes_that_a_file_may_have(tmp_path, size):
    content = random.randbytes(size)
    (tmp_path / "file").write_bytes(content)
    if size <= LIMIT:
        assert read_bytes(tmp_path / "file", LIMIT) == content
    else:
        with pytest.raises(InvalidConfig, match=f"at most {LIMIT} bytes"):
            read_bytes(tmp_path / "file", LIMIT)


def test_no_byte_of_a_file_that_is_too_large_is_read(tmp_path, monkeypatch):
    sparse_file(tmp_path / "file")
    read = []
    opened = untrusted_files.open_regular

    def counting(*arguments, **options):
        file = opened(*arguments, **options)
        read.append(file)
        return file

    monkeypatch.setattr(untrusted_files, "open_regular", counting)
    with pytest.raises(InvalidConfig, match="at most 16 MiB, found one of 42949672960 bytes"):
        read_bytes(tmp_path / "file", untrusted_files.JSON_BYTES)
    assert len(read) == 1 and read[0].closed


class _Meddling:
    """A file that is written to after its first bytes were read."""

    def __init__(self, file, change):
        self._file, self._change = file, change

    def read(self, count):
        data = self._file.read(min(count, 100))
        self._change()
        return data

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


@pytest.mark.parametrize("change", ["shrinks", "grows", "grows without end", "is replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, change):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 500)

    def alter():
        if change == "shrinks":
            os.truncate(path, 300)
        elif change == "is replaced":
            with open(path, "r+b") as file:
                file.write(b"y" * 500)
            os.utime(path, ns=(1, 1))
        elif path.stat().st_size < 700 or change == "grows without end":
            with open(path, "ab") as file:
                file.write(b"z" * 100)

    opened = untrusted_files.open_regular
    monkeypatch.setattr(
        untrusted_files, "open_regular",
        lambda *arguments, **options: _Meddling(opened(*arguments, **options), alter),
    )
    with pytest.raises(InvalidConfig, match=r"written to while it was read|at most 1000 bytes"):
        read_bytes(path, LIMIT)


def test_a_file_that_is_replaced_between_check_and_opening(tmp_path, monkeypatch):
    if os.name != "posix":
        pytest.skip("named pipes of POSIX")
    (tmp_path / "regular").write_bytes(b"{}")
    regular = os.stat(tmp_path / "regular")
    os.mkfifo(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: regular)
    with pytest.raises(InvalidConfig, match="a named pipe"):
        read_bytes(tmp_path / "file", LIMIT)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"\xef\xbb\xbfa", "a"),
        ("ä\u2028".encode(), "ä\u2028"),
        (b"", ""),
    ],
)
def test_text(tmp_path, data, text):
    (tmp_path / "file").write_bytes(data)
    assert read_text(tmp_path / "file", LIMIT) == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ab\xff", "byte 0xff at offset 2 is not UTF-8"),
        ("ab".encode("utf-16"), "UTF-16"),
        (b"\xed\xa0\x80", "0xed at offset 0"),
        (b"abc\xe2\x82", "0xe2 at offset 3"),
    ],
)
def test_bytes_that_are_not_text(tmp_path, data, words):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InvalidConfig, match=words):
        read_text(tmp_path / "file", LIMIT)


# JSON


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 column 1"),
        ('{"a": 1', "column 8"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is larger than any float"),
        ("[-1e309]", "-1e309 is larger"),
        ("[" + "9" * 5000 + "]", r"99999999999999999999\.\.\., an integer of 5000 digits"),
        ("[-" + "9" * 310 + "]", "310 digits"),
        ("[" * 100_000, "nested too deeply|Expecting value"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 100 deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"\\ud800": 1, "\\ud800": 2}', r"\\ud800"),
        ('{"a\0": 1}', "control character"),
        ("{'a': 1}", "double quotes"),
        ("[1] x", "Extra data"),
    ],
)
def test_text_that_is_not_json(text, words):
    for data in (text, text.encode()):
        with pytest.raises(InvalidJson, match=words) as caught:
            parse_json(data)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1e308, -1.5, 0, 1E-999]", [1e308, -1.5, 0, 0.0]),
        ("[" + "9" * 309 + "]", [int("9" * 309)]),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
        ('{"a": 1, "b": {}, "a": 1}', {"a": 1, "b": {}}),
        ('{"\\ud800": "\\udfff"}', {"\ud800": "\udfff"}),
        ('\ufeff{"a": "\\u0000"}', {"a": "\0"}),
        ("[" + ",".join(["[]"] * 500) + "]", [[]] * 500),
    ],
)
def test_json(text, value):
    if value is not None:
        assert parse_json(text) == value
    assert parse_json(text.encode("utf-8")) == parse_json(text)


# Error messages


class _Silent:
    def __repr__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), [10**5000], {10**5000: 1}, ("a", 10**5000), "x" * 10**6, [[]] * 10**6,
     "\ud800", b"\xff" * 1000, _Silent(), float("nan"), None, {1: _Silent()}, "\x1b[31m\u202e"],
    ids=lambda value: type(value).__name__,
)
def test_an_error_about_any_value_is_one_short_line_that_can_be_printed(value):
    assert len(shown(value)) <= 80
    for error in (
        ExlLoaderError("thing", expected="else", actual=shown(value)),
        ExlLoaderError("thing", expected="else", actual=value if isinstance(value, int) else 0),
    ):
        line = str(error)
        line.encode("utf-8", "strict")
        assert line.isprintable() and "\n" not in line and len(line) < 200


def test_control_characters_and_lone_surrogates_are_escaped_in_every_part():
    parts = {name: f"{name} \x1b[2J\x9b \ud800 \u202e ä 漢 é" for name in (
        "expected", "actual", "remedy", "details")}
    error = ExlLoaderError("thing \x07\udcff", **parts)
    for part in (error.thing, error.details, error.expected, error.actual, str(error)):
        part.encode("utf-8", "strict")
        assert part.isprintable()
    assert "ä 漢 é" in str(error) and "\\udcff" in str(error) and "\\x1b[2J" in str(error)
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\0\0\x01" + "\0" * 5000 + "x") == "\\x00\\x00\\x01\\x00 (5000 times)x"
