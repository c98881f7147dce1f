"""Spread a model's layers over this machine and those after it.

The work is split evenly where machines can be compared. Otherwise each machine in turn takes as
many layers as fit, as devices do, and the last one takes the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .assignment import Assigner, DeviceShare
from .options import RunOptions
from .questions import Asked, Assigned
from .remote import RemotePlanner
from .split import even_split

Key = TypeVar("Key", bound=Hashable)


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
        others: the machines after this one, in order.
        has_limits: `gpu_split` says how much of some machine is used.
    """

    def __init__(
        self, assigner: Assigner, others: Sequence[RemotePlanner] = (), has_limits: bool = False
    ) -> None:
        self._assigner, self._num_layers, self._others = assigner, assigner.num_layers, others
        kinds = {assigner.kind, *(other.reply.kind for other in others)}
        self._splits_evenly = (
            bool(others) and not has_limits and len(kinds) == 1 and "" not in kinds
        )

    @property
    def free_bytes(self) -> int:
        """The free memory of all devices together."""
        return self._assigner.free_bytes + sum(other.reply.free_bytes for other in self._others)

    @property
    def has_others(self) -> bool:
        """Return True if other machines may hold layers."""
        return bool(self._others)

    def own_headroom_bytes(self, ctx_size: int, run: RunOptions) -> int:
        """Return the headroom of this machine's devices with the layers that it has to hold.

        These are all layers where no machine comes after it, and else as many as fit, at least
        one. No other machine is asked.
        """
        return Spread(self._own_shares(ctx_size, run), ()).headroom_bytes

    def spread(self, runs: Mapping[Key, tuple[int, RunOptions]]) -> dict[Key, Spread]:
        """Give each machine in turn as many layers as fit, and the last one the rest.

        What fits in any split fits in this one.

        Args:
            runs: tokens of context and the other options, by any key.
        """
        shares = {key: self._own_shares(*run) for key, run in runs.items()}
        ends = {key: max(share.layers.stop for share in own) for key, own in shares.items()}
        parts: dict[Key, list[OtherPart]] = {key: [] for key in runs}
        for other in self._others:
            end_layer = self._num_layers if other is self._others[-1] else None
            asked = {
                key: Asked.of(other.plan, end, end_layer, *runs[key])
                for key, end in ends.items() if end < self._num_layers
            }
            for key, part in _ask(other, asked).items():
                if part.assigned.end_layer > part.asked.first_layer:
                    parts[key].append(part)
                    ends[key] = part.assigned.end_layer
        return {key: Spread(shares[key], parts[key]) for key in runs}

    def spread_evenly(self, runs: Mapping[Key, tuple[int, RunOptions]]) -> dict[Key, Spread]:
        """Split the work evenly, as `even_split` does, as far as the layers fit.

        As `spread` where `gpu_split` has limits, where machines have devices of several kinds,
        whose speeds cannot be compared, and where no split fits.
        """
        found: dict[Key, Spread] = {}
        if self._splits_evenly:
            work = {key: self._assigner.work(*run) for key, run in runs.items()}
            speeds = [self._assigner.speed, *(other.reply.speed for other in self._others)]
            found = self._fitting({key: even_split(work[key], speeds) for key in runs}, runs)
            rest = {key: run for key, run in runs.items() if key not in found}
            found |= self._fitting({
                key: even_split(work[key], speeds, ends)
                for key, ends in self._ends(rest).items()
            }, runs)
        rest = {key: run for key, run in runs.items() if key not in found}
        found |= self.spread(rest)
        return {key: found[key] for key in runs}

    def _own_shares(self, ctx_size: int, run: RunOptions) -> list[DeviceShare]:
        """Return the shares of all layers, or of as many as fit if other machines follow."""
        end_layer = None if self._others else self._num_layers
        return self._assigner.assign(ctx_size, run, end_layer=end_layer)

    def _fitting(
        self, found: Mapping[Key, Sequence[range] | None],
        runs: Mapping[Key, tuple[int, RunOptions]],
    ) -> dict[Key, Spread]:
        """Return those of the splits that were found whose layers fit on every machine."""
        splits = {key: ranges for key, ranges in found.items() if ranges is not None}
        shares = {
            key: self._assigner.assign(*runs[key], end_layer=ranges[0].stop)
            for key, ranges in splits.items()
        }
        parts: dict[Key, list[OtherPart]] = {key: [] for key in splits}
        for place, other in enumerate(self._others, start=1):
            asked = {
                key: Asked.of(other.plan, ranges[place].start, ranges[place].stop, *runs[key])
                for key, ranges in splits.items() if ranges[place]
            }
            for key, part in _ask(other, asked).items():
                parts[key].append(part)
        spreads = {key: Spread(shares[key], parts[key]) for key in splits}
        return {key: spread for key, spread in spreads.items() if spread.headroom_bytes >= 0}

    def _ends(self, runs: Mapping[Key, tuple[int, RunOptions]]) -> dict[Key, list[list[int]]]:
        """Return for each run what `even_split` takes as `ends`."""
        found = {
            # Only the first layer of the first machine is 0.
            key: [[max(share.layers.stop for share in self._own_shares(*run))]]
            for key, run in runs.items()
        }
        for other in self._others:
            asked = {
                (key, first): Asked.of(other.plan, first, None, *run)
                for key, run in runs.items() for first in range(1, self._num_layers)
            }
            parts = _ask(other, asked)
            for key in runs:
                ends = [parts[key, i].assigned.end_layer for i in range(1, self._num_layers)]
                # Nothing begins at layer 0 there.
                found[key].append([0, *ends])
        return found


def _ask(other: RemotePlanner, asked: Mapping[Key, Asked]) -> dict[Key, OtherPart]:
    """Ask a machine for several runs at once."""
    answers = other.assign(list(asked.values()))
    return {
        key: OtherPart(other, question, assigned)
        for (key, question), assigned in zip(asked.items(), answers, strict=True)
    }
