"""Another machine, as a plan on the first machine asks it for a part of a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ...backends import is_device
from ...utils.errors import MachineRefused, shown
from .questions import (
    ASSIGN,
    PLAN,
    RECORDS,
    Asked,
    Assigned,
    PlanReply,
    PlanRequest,
    from_json,
    items_from_json,
    to_json,
)
from .records import DeviceReservation


class Machine(Protocol):
    """What a plan knows of a machine; `machines.Machine` is one."""

    @property
    def place(self) -> int:
        """Its place in the ring of machines; 0 is the first machine."""

    @property
    def rank(self) -> int:
        """The number that it was started with."""

    @property
    def host(self) -> str:
        """Its host's name."""

    @property
    def name(self) -> str:
        """What messages call it."""


class Connection(Protocol):
    """What a plan needs of the connection to other machines; `machines.Machines` is one."""

    @property
    def first(self) -> Machine:
        """This machine."""

    @property
    def others(self) -> Sequence[Machine]:
        """The other machines, in order of place."""

    def ask_each(
        self, fields: dict[int, dict[str, Any]], question: str
    ) -> dict[int, dict[str, Any]]:
        """Ask machines, by place, at the same time; return their replies by place."""


class RemotePlanner:
    """Asks one machine. Nothing is asked twice.

    Args:
        machine: whom to ask.
        connection: over which.
        plan: the number of the plan that the machine has begun.
        reply: what it answered then.
        num_layers: of the model.
    """

    def __init__(
        self, machine: Machine, connection: Connection, plan: int, reply: PlanReply,
        num_layers: int,
    ) -> None:
        self.machine, self.plan, self.reply = machine, plan, reply
        self._connection, self._num_layers = connection, num_layers
        self._assigned: dict[Asked, Assigned] = {}

    def assign(self, asked: Sequence[Asked]) -> list[Assigned]:
        """Have layers assigned for several runs, with one question at most.

        Raises:
            MachineRefused: the reply makes no sense.
            ExlLoaderError: the machine cannot be asked, or refuses.
        """
        new = [one for one in dict.fromkeys(asked) if one not in self._assigned]
        if new:
            reply = self._ask(ASSIGN, {"asked": [to_json(one) for one in new]})
            found = items_from_json(Assigned, reply, "assigned", len(new), self.machine.name)
            for one, assigned in zip(new, found, strict=True):
                self._check(one, assigned)
                self._assigned[one] = assigned
        return [self._assigned[one] for one in asked]

    def records(self, asked: Asked) -> tuple[DeviceReservation, ...]:
        """Return the records of the machine's devices for a run that has been assigned.

        Raises:
            As `assign`.
        """
        reply = self._ask(RECORDS, to_json(asked))
        name = self.machine.name
        found = items_from_json(DeviceReservation, reply, "records", None, name)
        layers = [n for record in found for n in range(record.first_layer, record.end_layer)]
        assigned = self._assigned[asked]
        if (
            layers != list(range(asked.first_layer, assigned.end_layer))
            or sum(record.total_bytes for record in found) != assigned.total_bytes
        ):
            raise MachineRefused(
                f"{name}: the records of its devices",
                expected=f"layers {asked.first_layer} to {assigned.end_layer - 1} in "
                f"{assigned.total_bytes} bytes, as it has assigned them",
                actual=f"{len(layers)} layers in {sum(record.total_bytes for record in found)}",
            )
        for record in found:
            if not is_device(record.device):
                raise MachineRefused(f"{name}: the records of its devices",
                                     expected="devices of a known kind",
                                     actual=shown(record.device))
        machine = self.machine
        return tuple(
            replace(record, machine=machine.place, rank=machine.rank, host=machine.host)
            for record in found
        )

    def _ask(self, question: str, fields: dict[str, Any]) -> Mapping[str, Any]:
        place = self.machine.place
        return self._connection.ask_each({place: fields}, question)[place]

    def _check(self, asked: Asked, assigned: Assigned) -> None:
        """Refuse an answer with which the plan could not go on."""
        least, most = asked.first_layer, self._num_layers
        if asked.end_layer is not None:
            least = most = asked.end_layer
        holds_none = assigned.end_layer == asked.first_layer
        if (
            not least <= assigned.end_layer <= most
            or holds_none != (not assigned.headroom_bytes)
        ):
            raise MachineRefused(
                f"{self.machine.name}: the layers from {asked.first_layer} on",
                expected=f"an end from {least} to {most}, and the headroom of the "
                "devices that hold them",
                actual=f"end {assigned.end_layer} on {len(assigned.headroom_bytes)} devices",
            )


def begin(
    connection: Connection, requests: Mapping[int, PlanRequest], num_layers: int
) -> list[RemotePlanner]:
    """Begin a plan on the other machines, all at the same time.

    Args:
        requests: by place.
        num_layers: of the model.

    Returns:
        The machines in order.

    Raises:
        ExlLoaderError: a machine cannot be asked, has no copy of the folder, or refuses an option.
    """
    fields = {place: to_json(request) for place, request in requests.items()}
    replies = connection.ask_each(fields, PLAN)
    planners = []
    for machine in connection.others:
        reply = from_json(PlanReply, replies[machine.place], machine.name)
        if reply.speed < 1:
            raise MachineRefused(machine.name, expected="a speed of at least 1",
                                 actual=reply.speed)
        plan = requests[machine.place].plan
        planners.append(RemotePlanner(machine, connection, plan, reply, num_layers))
    return planners
