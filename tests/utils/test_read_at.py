"""Reading a file at offsets, from several threads, with and without a system call for it."""

from __future__ import annotations

import os
import secrets
from functools import partial

import pytest

from exl_loader.utils.parallel import run_tasks
from exl_loader.utils.system.files import read_at


@pytest.fixture(params=["a system call", "a position"])
def reader(request, monkeypatch):
    if request.param == "a position":
        monkeypatch.delattr(os, "preadv", raising=False)
    return read_at


def test_threads_read_their_own_bytes(tmp_path, reader):
    content = secrets.token_bytes(1 << 16)
    (tmp_path / "file").write_bytes(content)
    wrong = []

    def work(first, advance):
        for offset in range(first, len(content), 997):
            target = bytearray(313)
            count = reader(file, offset, memoryview(target))
            if target[:count] != content[offset : offset + 313]:
                wrong.append(offset)

    with open(tmp_path / "file", "rb", buffering=0) as file:
        run_tasks([partial(work, first) for first in range(32)], 8)
    assert not wrong


@pytest.mark.parametrize("offset, count", [(0, 5), (3, 5), (7, 1), (8, 0), (100, 0)])
def test_only_the_end_of_the_file_cuts_a_read_short(tmp_path, reader, offset, count):
    (tmp_path / "file").write_bytes(b"01234567")
    target = bytearray(b"-" * 5)
    with open(tmp_path / "file", "rb", buffering=0) as file:
        assert reader(file, offset, memoryview(target)) == min(count, 8 - min(offset, 8), 5)
    assert bytes(target[:count]) == b"01234567"[offset : offset + 5]
