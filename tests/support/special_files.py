"""Paths that are no regular file: pipes, sockets, endless devices, holes, broken links."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

SPARSE_BYTES = 40 << 30


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_named_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(path.name + ".pipe"))
    path.symlink_to(path.name + ".pipe")


def unix_socket(path: Path) -> None:
    # The path of a socket may have about a hundred bytes, and a test's folder has more.
    parent = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(f"/proc/self/fd/{parent}/{path.name}")
        finally:
            os.close(parent)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_dev_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_dev_null(path: Path) -> None:
    path.symlink_to("/dev/null")


def sparse_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(SPARSE_BYTES)


def dangling_link(path: Path) -> None:
    path.symlink_to("../blobs/nothing")


def link_loop(path: Path) -> None:
    path.symlink_to(path.name + ".other")
    path.with_name(path.name + ".other").symlink_to(path.name)


def unreadable_file(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        named_pipe, link_to_named_pipe, unix_socket, folder, link_to_dev_zero, link_to_dev_null,
        sparse_file, dangling_link, link_loop,
    )
}
if os.name != "posix":
    SPECIAL_FILES = {"folder": folder, "sparse_file": sparse_file}
elif os.getuid():
    # The superuser may read everything.
    SPECIAL_FILES["unreadable_file"] = unreadable_file
