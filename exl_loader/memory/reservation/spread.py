"""Spread a model's layers over this machine and those after it.

Each machine in turn takes as many layers as fit, as devices do, and the last one takes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .assignment import Assigner, DeviceShare
from .options import RunOptions
from .questions import Asked, Assigned
from .remote import RemotePlanner

Key = TypeVar("Key")


@dataclass(frozen=True)
class OtherPart:
    """The layers that another machine holds.

    Args:
        planner: the machine.
        asked: what it was asked for; the same question makes it load these layers.
        assigned: what it answered.
    """

    planner: RemotePlanner
    asked: Asked
    assigned: Assigned


@dataclass(frozen=True)
class Spread:
    """A model's layers on all machines.

    Args:
        shares: of this machine.
        others: the other machines that hold layers, in order.
    """

    shares: Sequence[DeviceShare]
    others: Sequence[OtherPart]

    @property
    def headroom_bytes(self) -> int:
        """What stays free on all devices together; the least of one where not all fit."""
        found = [share.headroom_bytes for share in self.shares]
        for other in self.others:
            found += other.assigned.headroom_bytes
        # The sum where all fit, because one device's headroom jumps when a layer moves.
        return min(found) if min(found) < 0 else sum(found)

    @property
    def total_bytes(self) -> int:
        """All buffers."""
        own = sum(share.total_bytes for share in self.shares)
        return own + sum(other.assigned.total_bytes for other in self.others)


class Spreader:
    """Spreads layers for several runs at once, so that each machine is asked once.

    Args:
        assigner: assigns this machine's layers.
        num_layers: of the model.
        others: the machines after this one, in order.
    """

    def __init__(
        self, assigner: Assigner, num_layers: int, others: Sequence[RemotePlanner] = ()
    ) -> None:
        self._assigner, self._num_layers, self._others = assigner, num_layers, others

    @property
    def has_others(self) -> bool:
        """Return True if other machines may hold layers."""
        return bool(self._others)

    def own_headroom_bytes(self, ctx_size: int, run: RunOptions) -> int:
        """Return the headroom of this machine's devices with the layers that it has to hold.

        These are all layers where no machine comes after it, and else as many as fit, at least
        one. No other machine is asked.
        """
        shares = self._assigner.assign(ctx_size, run, takes_all=not self._others)
        return Spread(shares, ()).headroom_bytes

    def spread(self, runs: Mapping[Key, tuple[int, RunOptions]]) -> dict[Key, Spread]:
        """Spread the layers for each run.

        Args:
            runs: tokens of context and the other options, by any key.
        """
        takes_all = not self._others
        shares = {
            key: self._assigner.assign(ctx_size, run, takes_all=takes_all)
            for key, (ctx_size, run) in runs.items()
        }
        ends = {key: max(share.layers.stop for share in own) for key, own in shares.items()}
        parts: dict[Key, list[OtherPart]] = {key: [] for key in runs}
        for other in self._others:
            is_last = other is self._others[-1]
            asked = {
                key: Asked.of(other.plan, end, is_last, *runs[key])
                for key, end in ends.items() if end < self._num_layers
            }
            answers = other.assign(list(asked.values()))
            for (key, question), assigned in zip(asked.items(), answers, strict=True):
                if assigned.end_layer > question.first_layer:
                    parts[key].append(OtherPart(other, question, assigned))
                    ends[key] = assigned.end_layer
        return {key: Spread(shares[key], parts[key]) for key in runs}
