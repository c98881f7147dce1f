"""Machines in network namespaces of this machine, joined by a bridge; loopback where forbidden.

    this process ── bridge 10.213.N.1 ─┬─ veth ─ namespace 1: 10.213.N.2
                                       └─ veth ─ namespace 2: 10.213.N.3

A cut takes effect as in a real network: packets vanish, and nobody gets an error.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import warnings

from .stations import Stations


def _ip(*arguments: str) -> str:
    """Run `ip`; return its error, empty where it succeeded."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    return done.stderr.strip() or ("" if done.returncode == 0 else "ip failed")


@functools.cache
def refusal() -> str:
    """Return why namespaces cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    name = f"exl{os.getpid()}"
    error = _ip("netns", "add", name)
    if not error:
        error = _ip("link", "add", name, "type", "bridge")
        _ip("link", "del", name)
    _ip("netns", "del", name)
    return error


class Network:
    """A network of other machines. Use it as a context.

    Args:
        count: how many there are besides this process.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._bridge = f"exl{os.getpid()}"
        self.is_real = not refusal()
        number = os.getpid() % 250
        self._subnet = f"10.213.{number}"
        self.host = f"{self._subnet}.1" if self.is_real else "127.0.0.1"
        if not self.is_real:
            warnings.warn(f"machines are tested on loopback: {refusal()}", stacklevel=2)

    def __enter__(self) -> Network:
        if self.is_real:
            self._make()
        self.stations = Stations(self._count, self.host)
        self.stations.prefixes = {
            rank: ("ip", "netns", "exec", self._name(rank)) if self.is_real else ()
            for rank in range(1, self._count + 1)
        }
        return self

    def __exit__(self, *error: object) -> None:
        self.stations.stop()
        if self.is_real:
            for rank in range(1, self._count + 1):
                _ip("netns", "del", self._name(rank))
            _ip("link", "del", self._bridge)

    def address(self, rank: int) -> str:
        """Return the IP address of a machine."""
        return f"{self._subnet}.{rank + 1}" if self.is_real else self.host

    def _name(self, rank: int) -> str:
        return f"{self._bridge}m{rank}"

    def _make(self) -> None:
        commands = [
            ["link", "add", self._bridge, "type", "bridge"],
            ["addr", "add", f"{self.host}/24", "dev", self._bridge],
            ["link", "set", self._bridge, "up"],
        ]
        for rank in range(1, self._count + 1):
            name = self._name(rank)
            inside = ["netns", "exec", name, "ip"]
            commands += [
                ["netns", "add", name],
                ["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name],
                ["link", "set", name, "master", self._bridge],
                ["link", "set", name, "up"],
                [*inside, "addr", "add", f"{self.address(rank)}/24", "dev", "eth0"],
                [*inside, "link", "set", "eth0", "up"],
                [*inside, "link", "set", "lo", "up"],
            ]
        for command in commands:
            error = _ip(*command)
            assert not error, f"ip {' '.join(command)}: {error}"

    def cut(self, rank: int) -> None:
        """Take a machine off the network."""
        assert not _ip("link", "set", self._name(rank), "nomaster")

    def mend(self, rank: int) -> None:
        """Put it back."""
        assert not _ip("link", "set", self._name(rank), "master", self._bridge)

    def cut_between(self, rank: int, other: int) -> None:
        """Let what a machine sends to another one vanish."""
        assert not _ip(
            "netns", "exec", self._name(rank), "ip", "neigh", "replace", self.address(other),
            "lladdr", "02:00:00:00:00:01", "nud", "permanent", "dev", "eth0",
        )

    def mend_between(self, rank: int, other: int) -> None:
        """Undo `cut_between`."""
        assert not _ip(
            "netns", "exec", self._name(rank), "ip", "neigh", "del", self.address(other),
            "dev", "eth0",
        )

    def shape(self, rank: int, *discipline: str) -> str:
        """Let `tc` change what a machine sends: `netem delay 5ms`, `tbf rate 10mbit ...`.

        Returns:
            Why it is not possible; empty where it is done.
        """
        done = subprocess.run(
            ["ip", "netns", "exec", self._name(rank), "tc", "qdisc", "replace", "dev", "eth0",
             "root", *discipline], capture_output=True, text=True,
        )
        return done.stderr.strip() if done.returncode else ""

    def listening(self, rank: int) -> set[str]:
        """Return the addresses at which a machine's processes listen, as `address:port`."""
        done = subprocess.run(
            ["ip", "netns", "exec", self._name(rank), "ss", "-Hltn"], capture_output=True,
            text=True, check=True,
        )
        return {line.split()[3] for line in done.stdout.splitlines()}
