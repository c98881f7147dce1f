"""Which other machines a load or a plan is about: by its option, or by torchrun's environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings
from ..utils.progress import Progress
from .address import Address, is_under_torchrun, parse_address, torchrun_seat

if TYPE_CHECKING:
    from .connection import Machines


def address_of(machines: str | None) -> Address | None:
    """Return the address at which other machines find this one; None for this machine alone.

    Args:
        machines: the option; empty for what torchrun has set, if it started this process.

    Raises:
        InvalidSettings: the option is no address, or torchrun started this process as another
            machine than the first.
    """
    if machines:
        return parse_address(machines)
    if not is_under_torchrun():
        return None
    seat = torchrun_seat()
    if seat.rank:
        raise InvalidSettings(
            "torchrun's rank of this machine", expected="0 for the machine that loads a model",
            actual=seat.rank,
            remedy="Start it with --node-rank 0, or run serve-stage on this machine",
        )
    return seat.address


def connection_of(machines: str | None, progress: Progress | None = None) -> Machines | None:
    """Return the connection to the other machines; None for this machine alone.

    Raises:
        InvalidSettings: as `address_of`.
        MachineRefused, MachineLost: as `connection.connect`.
    """
    address = address_of(machines)
    if address is None:
        return None
    from .connection import connect

    return connect(address, progress)
