"""A model over several machines in one process, without a network: frames go from hand to hand."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np

from exl_loader.cache.paging import PagedCache
from exl_loader.machines.frames import Envelope, Frame, FrameClass, PackedFrame, read_frame
from exl_loader.machines.ring import Machine
from exl_loader.model.forward import Model
from exl_loader.model.local_layers import LocalLayers
from exl_loader.model.remote_layers import RemoteLayers
from exl_loader.model.served_layers import ServedLayers
from exl_loader.utils.table import DeviceMap
from support.model_builder import MachinePart


def over_wire(frame: Frame) -> Frame:
    """Return what another machine reads of a frame."""
    packed = PackedFrame(frame, Envelope(FrameClass.ORDERED))
    buffer = np.empty(packed.nbytes, np.uint8)
    packed.write(buffer)
    return read_frame(buffer)


class RingInProcess:
    """Hands each frame to the other machines in order, when it is sent or when it is needed.

    Args:
        machines: the layers of each other machine.
        lag: frames that wait before a further one makes the oldest run.

    Attributes:
        sent: the kinds of all frames.
        most_waiting: the most frames that have waited.
    """

    def __init__(self, machines: list[ServedLayers], lag: int = 0) -> None:
        self.others = [Machine(i, i, f"host{i}") for i in range(1, len(machines) + 1)]
        self.machines, self.lag = machines, lag
        self.sent: list[str] = []
        self._waiting: deque[Frame] = deque()
        self._back: deque[Frame] = deque()

    def send(self, frame: Frame) -> None:
        self.sent.append(frame.kind)
        self._waiting.append(over_wire(frame))
        while len(self._waiting) > self.lag:
            self._run()

    def receive(self) -> Frame:
        while not self._back:
            self._run()
        return self._back.popleft()

    def _run(self) -> None:
        frame: Frame | None = self._waiting.popleft()
        for machine in self.machines:
            if frame is not None:
                frame = machine.run(frame)
                frame = None if frame is None else over_wire(frame)
        if frame is not None:
            self._back.append(frame)


def machine_maps(num_layers: int, *firsts: int, device: str = "cpu") -> list[DeviceMap]:
    """Put layers on machines, each of which begins with the layer of that number."""
    ends = [*firsts[1:], num_layers]
    return [
        DeviceMap(
            device if first == 0 else None, (device,) * (end - first),
            device if first == 0 else None, first,
        )
        for first, end in zip(firsts, ends, strict=True)
    ]


def build_over_machines(
    folder: Path, ops, maps: list[DeviceMap], *, lag: int = 0, sample_text_ids=(),
    rope_options: dict[str, float] | None = None, **options,
) -> tuple[Model, PagedCache, RingInProcess]:
    """Build a model of which each machine has the layers of a map.

    Args:
        options: as those of `build_model`.
    """
    rope_options = rope_options or {}
    first, *others = (MachinePart(folder, ops, device=where, **options) for where in maps)
    served = []
    for place, part in enumerate(others, 1):
        layers = part.cache().layers
        local = LocalLayers(part.parts, part.workspaces, layers, part.ops, **rope_options)
        served.append(
            ServedLayers(local, layers, place, place == len(others), lambda count: None)
        )
    ring = RingInProcess(served, lag)
    remote = RemoteLayers(ring, 1, first.parts.config.hidden_size, 128, len(maps))
    cache = first.cache(remote)
    model = Model(
        first.parts, first.workspaces, cache, first.ops, remote=remote,
        sample_text_ids=sample_text_ids, **rope_options,
    )
    return model, cache, ring
