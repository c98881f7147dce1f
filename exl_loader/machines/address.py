"""Where machines meet: `tcp://HOST:PORT`, or what torchrun sets in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..utils.errors import InvalidSettings, shown

# A larger ring would only wait: every token visits every machine.
MOST_MACHINES = 64

_EXAMPLE = "tcp://192.168.1.10:29500"
_ADDRESS = re.compile(
    r"tcp://(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:/?#\[\]@]+)):(?P<port>[0-9]{1,5})/?"
    r"(?:\?(?P<query>.*))?",
    re.ASCII,
)
_TORCHRUN_KEYS = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")


@dataclass(frozen=True)
class Address:
    """The address of the first machine.

    Attributes:
        host: its name or IP address. port: the TCP port.
        world_size: how many machines take part, the first included; None where the others say it.
        agent: True where torchrun's agent already listens there.
    """

    host: str
    port: int
    world_size: int | None = None
    agent: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_address(text: str, setting: str = "machines") -> Address:
    """Read `tcp://HOST:PORT`, optionally with `?world_size=N` as PyTorch writes it.

    Raises:
        InvalidSettings: the text is no such address.
    """
    found = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise InvalidSettings(
            setting, expected=f"an address of the first machine such as {_EXAMPLE}",
            actual=shown(text),
        )
    world_size = None
    if found["query"] is not None:
        key, _, value = found["query"].partition("=")
        if key != "world_size" or not re.fullmatch("[0-9]{1,4}", value, re.ASCII):
            raise InvalidSettings(
                setting, expected=f"nothing but ?world_size=N after {_EXAMPLE}",
                actual=shown(text),
            )
        world_size = checked_world_size(int(value), setting)
    return Address(found["v6"] or found["host"], int(found["port"]), world_size)


def checked_world_size(world_size: int, setting: str) -> int:
    """Return a number of machines that a ring can have.

    Raises:
        InvalidSettings: it is below 2 or above `MOST_MACHINES`.
    """
    if not 2 <= world_size <= MOST_MACHINES:
        raise InvalidSettings(
            setting, expected=f"2 to {MOST_MACHINES} machines, the first included",
            actual=str(world_size),
        )
    return world_size


@dataclass(frozen=True)
class Seat:
    """What another machine needs to know to join: where, as which rank, and of how many."""

    address: Address
    rank: int
    world_size: int


def checked_seat(address: Address, rank: int, world_size: int) -> Seat:
    """Check the rank of a machine that is not the first.

    Raises:
        InvalidSettings: the rank is 0, which is the first machine, or not below the world size.
    """
    checked_world_size(world_size, "world size")
    if not 1 <= rank < world_size:
        raise InvalidSettings(
            "rank", expected=f"1 to {world_size - 1} of {world_size} machines", actual=str(rank),
            remedy="Rank 0 is the first machine, which loads the model and serves no layers"
            if rank == 0 else None,
        )
    return Seat(address, rank, world_size)


def is_under_torchrun(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether torchrun started this process."""
    variables = os.environ if environment is None else environment
    return "TORCHELASTIC_RUN_ID" in variables and "GROUP_RANK" in variables


def torchrun_seat(environment: Mapping[str, str] | None = None) -> Seat:
    """Read what torchrun sets. Rank 0 is allowed: it is the first machine.

    The rank of the machine is `GROUP_RANK`, not `RANK`: torchrun counts processes in the latter,
    and an agent that the first machine answered itself has no other number of machines.

    Raises:
        InvalidSettings: torchrun started several processes a machine, or a variable is wrong.
    """
    variables = os.environ if environment is None else environment
    processes = variables.get("LOCAL_WORLD_SIZE", "1")
    if processes != "1":
        raise InvalidSettings(
            "torchrun", expected="--nproc-per-node 1, one process for all cards of a machine",
            actual=f"{shown(processes)} processes",
        )
    values = [variables.get(key, "") for key in _TORCHRUN_KEYS]
    host, port, rank, world_size = values
    if not host or not all(re.fullmatch("[0-9]{1,5}", value, re.ASCII) for value in values[1:]):
        raise InvalidSettings(
            "torchrun", expected=f"{', '.join(_TORCHRUN_KEYS)} in the environment",
            actual=", ".join(
                f"{key}={shown(value)}" for key, value in zip(_TORCHRUN_KEYS, values, strict=True)
            ),
        )
    address = Address(
        host, int(port), agent=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )
    if not 1 <= address.port <= 65535:
        raise InvalidSettings("MASTER_PORT", expected="1 to 65535", actual=port)
    count = checked_world_size(int(world_size), "torchrun's number of machines")
    if int(rank) == 0:
        return Seat(replace(address, world_size=count), 0, count)
    return checked_seat(address, int(rank), count)
