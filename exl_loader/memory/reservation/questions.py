"""What machines say to each other while a plan is made: JSON types, checked where they arrive.

The first machine asks, see `remote`; the others answer, see `answers`. Every class here is one
message or a part of one. Its attributes are the keys of a JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from ...cache.layout import CacheType
from ...utils.errors import MachineRefused, shown
from .options import LoadOptions, RunOptions
from .records import DeviceReservation

Message = TypeVar("Message", "PlanRequest", "PlanReply", "Asked", "Assigned", DeviceReservation)

# The questions, in the order in which a plan asks them.
PLAN, ASSIGN, RECORDS = "plan", "assign", "records"

# The types of each message's attributes, by its class.
_hints: dict[type, dict[str, Any]] = {}

# No memory has more bytes, and no option is larger.
_MOST = 1 << 60
# Attributes that may be negative.
_SIGNED = ("headroom_bytes",)
_REMEDY = "Install the same version of exl_loader on all machines"


@dataclass(frozen=True)
class PlanRequest:
    """Begins a plan of a model: the folder, and the options that hold for all of the plan.

    Args:
        plan: its number, by which later questions name it, because several may be made at once.
        name, digest: of the folder, see `checkpoint.copies`.
        as_architecture, replacing: as in `LoadOptions`.
        gpu_split: this machine's part of the option; empty for none.
        memory_limit: in bytes; None for none.
        connection_bytes: main memory that the connection takes on each machine.
    """

    plan: int
    name: str
    digest: str
    as_architecture: str | None
    replacing: bool
    gpu_split: str
    memory_limit: int | None
    connection_bytes: int


@dataclass(frozen=True)
class PlanReply:
    """The machine has the folder and is ready to assign layers.

    Args:
        free_bytes: the free memory of its devices together.
        kind: of its devices; empty where they are of several.
        speed: how fast layers run there beside other machines with devices of the same kind.
    """

    free_bytes: int
    kind: str
    speed: int


@dataclass(frozen=True)
class Asked:
    """Asks a machine to assign layers to its devices.

    Args:
        plan: its number, as in `PlanRequest`.
        first_layer: the first layer that the machines before do not hold.
        end_layer: the end of the layers, which are assigned whether they fit or not; None for as
            many as fit.
        ctx_size: tokens of context.
        cache_type: as `CacheType` writes it.
        chunk_size, max_batch_size, cache_window, cache_size: as in `RunOptions`.
    """

    plan: int
    first_layer: int
    end_layer: int | None
    ctx_size: int
    cache_type: str
    chunk_size: int
    max_batch_size: int | None
    cache_window: int
    cache_size: int

    @classmethod
    def of(
        cls, plan: int, first_layer: int, end_layer: int | None, ctx_size: int, run: RunOptions
    ) -> Asked:
        """Ask for a run."""
        return cls(plan, first_layer, end_layer, ctx_size, str(run.cache_type), run.chunk_size,
                   run.max_batch_size, run.cache_window, run.cache_size)

    def run(self) -> RunOptions:
        """Return the options of the run.

        Raises:
            InvalidSettings: they make no sense.
        """
        # The bounds of a user's options hold for those of the first machine too.
        LoadOptions(
            ctx_size=self.ctx_size, cache_type=self.cache_type, chunk_size=self.chunk_size,
            max_batch_size=self.max_batch_size, cache_window=self.cache_window,
            cache_size=self.cache_size,
        ).check()
        return RunOptions(
            CacheType.parse(self.cache_type), self.chunk_size, self.max_batch_size,
            self.cache_window, self.cache_size,
        )


@dataclass(frozen=True)
class Assigned:
    """Layers that a machine has assigned to its devices.

    Args:
        end_layer: the end of its layers; `first_layer` where it holds none.
        headroom_bytes: what stays free on each of the devices that it uses; negative where the
            layers do not fit.
        total_bytes: its buffers.
    """

    end_layer: int
    headroom_bytes: tuple[int, ...]
    total_bytes: int


def to_json(message: PlanRequest | PlanReply | Asked | Assigned | DeviceReservation,
            ) -> dict[str, Any]:
    """Return a message as JSON types."""
    values = asdict(message)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_json(kind: type[Message], values: Any, sender: str) -> Message:
    """Read a message.

    Args:
        kind: its class.
        values: what arrived, of which nothing is trusted.
        sender: the machine that it came from, for the error.

    Raises:
        MachineRefused: it is no such message: a key is missing or unknown, or a value has
            another type or is out of range.
    """
    # Evaluated once, because a plan reads some hundred messages.
    if kind not in _hints:
        _hints[kind] = get_type_hints(kind)
    hints = _hints[kind]
    names = [field.name for field in fields(kind)]
    if not isinstance(values, Mapping) or set(values) != set(names):
        found = sorted(map(str, values)) if isinstance(values, Mapping) else values
        raise _wrong(kind, sender, f"the keys {', '.join(names)}", found)
    read: dict[str, Any] = {}
    for name in names:
        if not _fits(hints[name], values[name], signed=name in _SIGNED):
            raise _wrong(kind, sender, f"{name} of type {_shown_type(hints[name])}", values[name])
        value = values[name]
        read[name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)


def items_from_json(
    kind: type[Message], values: Mapping[str, Any], key: str, count: int | None, sender: str
) -> list[Message]:
    """Read the list of messages under a key, which is all that the object has.

    Args:
        count: how many there have to be; None for any number.

    Raises:
        MachineRefused: as `from_json`.
    """
    items = values.get(key) if isinstance(values, Mapping) and set(values) == {key} else None
    if not isinstance(items, list) or count not in (None, len(items)):
        expected = f"a list of {count}" if count is not None else "a list"
        raise _wrong(kind, sender, f"{key}, {expected}, and nothing else", values)
    return [from_json(kind, item, sender) for item in items]


def _fits(hint: Any, value: Any, signed: bool) -> bool:
    """Return whether a value is of an attribute's type, and in range where it is a number."""
    if isinstance(hint, UnionType):
        return any(_fits(one, value, signed) for one in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is int:
        least = -_MOST if signed else 0
        return type(value) is int and least <= value <= _MOST
    if hint in (str, bool):
        return type(value) is hint
    assert hint == tuple[int, ...], hint
    return isinstance(value, list) and all(_fits(int, item, signed) for item in value)


def _shown_type(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _wrong(kind: type, sender: str, expected: str, found: Any) -> MachineRefused:
    return MachineRefused(
        f"{sender} sent what is no {kind.__name__}", expected=expected, actual=shown(found),
        remedy=_REMEDY,
    )
