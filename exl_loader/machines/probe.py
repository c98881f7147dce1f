"""What a connection can carry: machines answer these questions whatever handler they serve.

A ping is a frame that the next machine answers on the same link as soon as it is whole, so each
link is measured by itself, with everything that a frame costs. Its latency is half the time of a
ping with a short frame. Its bandwidth is that of a long frame, without the time of a short one.
"""

from __future__ import annotations

import platform
import socket
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..utils.system import system_name
from ..utils.system.processors import cpu_name
from .link import UNRESERVED_BYTES

if TYPE_CHECKING:
    from .connection import Machines
    from .ring import Machine, Ring

# Questions that begin like this are not for the handler.
PREFIX = "machines/"
_ABOUT = PREFIX + "about"
_PING = PREFIX + "ping"

SHORT_PING_BYTES = 1 << 10
LONG_PING_BYTES = 8 << 20
SHORT_PINGS = 21
LONG_PINGS = 3
MOST_PINGS = 1000


def about() -> dict[str, Any]:
    """Describe this machine, for a report."""
    import torch

    from .. import __version__

    return {
        "host": socket.gethostname(), "exl_loader": __version__, "torch": torch.__version__,
        "python": platform.python_version(), "system": system_name(), "processor": cpu_name(),
    }


def answer(ring: Ring, question: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Answer a question that begins with `PREFIX`.

    Raises:
        ValueError: there is no such question.
    """
    if question == _ABOUT:
        return about()
    if question == _PING:
        nbytes, count = fields.get("nbytes"), fields.get("count")
        if (isinstance(nbytes, int) and 0 <= nbytes <= UNRESERVED_BYTES // 2
                and isinstance(count, int) and 1 <= count <= MOST_PINGS):
            return {"seconds": ring.ping(nbytes, count)}
    raise ValueError(f"{question} with {fields}")


@dataclass(frozen=True)
class LinkMeasure:
    """A link between two neighbours, as measured.

    Attributes:
        latency_s: seconds from a machine to the next, for a short frame.
        bytes_per_s: of long frames.
    """

    sender: Machine
    receiver: Machine
    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: int) -> float:
        """Return how long a frame of that size takes from one machine to the next."""
        return self.latency_s + nbytes / self.bytes_per_s


def measure(machines: Machines) -> list[LinkMeasure]:
    """Measure each link, one after another, in the order of the ring.

    Raises:
        MachineLost: the session ended.
    """
    members = (machines.first, *machines.others)

    def ask(place: int) -> Callable[[int, int], list[float]]:
        return lambda nbytes, count: machines.ask(
            place, _PING, {"nbytes": nbytes, "count": count}
        )["seconds"]

    return [
        measure_link(member, members[(member.place + 1) % len(members)],
                     ask(member.place) if member.place else machines.ping)
        for member in members
    ]


def measure_link(
    sender: Machine, receiver: Machine, ping: Callable[[int, int], list[float]]
) -> LinkMeasure:
    """Measure one link.

    Args:
        ping: sends frames with that many bytes, that many times; returns the seconds of each.
    """
    # The first ones may wait for the thread that receives.
    short = ping(SHORT_PING_BYTES, SHORT_PINGS)[1:]
    long = ping(LONG_PING_BYTES, LONG_PINGS)
    there_and_back = statistics.median(short)
    # The answer to a long ping is short, too.
    seconds = max(min(long) - there_and_back, 1e-9)
    return LinkMeasure(
        sender, receiver, there_and_back / 2, (LONG_PING_BYTES - SHORT_PING_BYTES) / seconds
    )


def token_seconds(links: list[LinkMeasure], hidden_size: int) -> float:
    """Return what the network adds to each decoded token of one request.

    Args:
        hidden_size: of the model: a hidden state is one row of float32.
    """
    return sum(link.seconds(4 * hidden_size) for link in links)


def describe_machines(machines: Machines) -> list[dict[str, Any]]:
    """Return `about` of every machine, in the order of the ring, with its rank.

    Raises:
        MachineLost: the session ended.
    """
    replies = [about(), *machines.ask_all(_ABOUT)]
    members = (machines.first, *machines.others)
    return [
        {"rank": member.rank} | reply for member, reply in zip(members, replies, strict=True)
    ]
