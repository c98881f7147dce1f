"""Two network namespaces with a link of a given latency and bandwidth between them.

`tc netem` is not in every kernel, so the link is made of two tun devices and a process that
carries packets from one to the other: each leaves when the packets before it have passed at the
bandwidth, and arrives after the latency. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
# Few large packets, because a process handles each of them.
_MTU = 60000
_NAMES = ("exl-a", "exl-b")
HOSTS = ("10.98.0.1", "10.98.0.2")


class SlowLink:
    """The namespaces, for as long as the context lasts.

    Args:
        latency_s: seconds of one way.
        bits_per_s: of each direction; 0 for as many as the process carries.

    Attributes:
        prefixes: the command that runs a program in each namespace.
        process: the id of the process that carries packets.

    Raises:
        subprocess.CalledProcessError, OSError: this process may not make namespaces.
    """

    def __init__(self, latency_s: float, bits_per_s: float) -> None:
        self.prefixes = [["ip", "netns", "exec", name] for name in _NAMES]
        self._latency_s, self._bits_per_s = latency_s, bits_per_s
        self._carrier: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> SlowLink:
        self._remove()
        try:
            ends = [self._make(name, host) for name, host in zip(_NAMES, HOSTS, strict=True)]
        except BaseException:
            self._remove()
            raise
        self._carrier = multiprocessing.get_context("fork").Process(
            target=_carry, args=(ends, self._latency_s, self._bits_per_s), daemon=True
        )
        self._carrier.start()
        self.process = self._carrier.pid
        for end in ends:
            os.close(end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._carrier is not None:
            self._carrier.kill()
            self._carrier.join()
        self._remove()

    def _make(self, name: str, host: str) -> int:
        """Make a namespace with a tun device; return the device's file descriptor."""
        _run("ip", "netns", "add", name)
        # A device is made in the namespace of the thread that asks for it.
        end = _in_namespace(name, _open_tun)
        inside = ("ip", "netns", "exec", name)
        _run(*inside, "ip", "link", "set", "lo", "up")
        _run(*inside, "ip", "link", "set", "tun0", "mtu", str(_MTU), "up")
        _run(*inside, "ip", "addr", "add", f"{host}/24", "dev", "tun0")
        return end

    def _remove(self) -> None:
        for name in _NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _open_tun() -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", b"tun0", _IFF_TUN | _IFF_NO_PI))
    return end


def _in_namespace(name: str, call: Callable[[], int]) -> int:
    """Call a function in a network namespace."""
    with open("/proc/self/ns/net", "rb") as own, open(f"/run/netns/{name}", "rb") as other:
        _enter(other.fileno())
        try:
            return call()
        finally:
            _enter(own.fileno())


def _enter(namespace: int) -> None:
    """Move this thread to a namespace. Python has `os.setns` from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _carry(ends: list[int], latency_s: float, bits_per_s: float) -> None:
    """Carry packets between the two ends for ever."""
    under_way: list[tuple[float, int, int, bytes]] = []
    free_at = [0.0, 0.0]
    count = 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        # `select` sleeps for longer than asked; the last part is spent looking at the clock.
        ready, _, _ = select.select(ends, [], [], None if wait is None else max(0, wait - 2e-4))
        for end in ready:
            side = ends.index(end)
            packet = os.read(end, 1 << 16)
            leaves = max(time.monotonic(), free_at[side])
            if bits_per_s:
                leaves += 8 * len(packet) / bits_per_s
            free_at[side] = leaves
            count += 1
            heapq.heappush(under_way, (leaves + latency_s, count, 1 - side, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, side, packet = heapq.heappop(under_way)
            try:
                os.write(ends[side], packet)
            except BlockingIOError:
                pass  # a full device drops packets, and TCP sends them again
