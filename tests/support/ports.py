"""Ports for servers that tests start."""

from __future__ import annotations

import errno
import random
import socket

# Below these are ports of known services, and from 32768 on those that Linux gives to connections,
# which another test could take before the server listens.
_PORTS = range(20_000, 32_768)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a random port that nothing listens at."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
