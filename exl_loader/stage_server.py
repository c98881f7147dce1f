"""What a machine does for the first one: it plans, loads and runs a part of a model's layers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .loader import LoadedPart, load_part
from .machines.frames import Frame
from .machines.station import Station
from .memory.buffers import trim_heap
from .memory.reservation import LoadOptions
from .memory.reservation.answers import PlanAnswers
from .model.pass_frames import LOAD_NUMBER, reserved_frames
from .model.served_layers import ServedLayers
from .other_machines import LOAD, LOADED, UNLOAD
from .utils.byte_counts import amount
from .utils.errors import MachineRefused, drop_locals, shown
from .utils.progress import Progress


@dataclass
class _Running:
    """A model's layers on this machine."""

    load_number: int
    part: LoadedPart
    layers: ServedLayers


class StageServer:
    """Does what the first machine asks for; a `machines.station.Handler`.

    Args:
        station: this machine in the ring.
        answers: plans with this machine's devices and folders.
        say: shows a line to the user.
    """

    def __init__(self, station: Station, answers: PlanAnswers, say: Callable[[str], None]) -> None:
        self._station, self._answers, self._say = station, answers, say
        self._running: _Running | None = None

    def answer(
        self, question: str, fields: dict[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Answer a question about a plan, load a part of a model, or unload it.

        Raises:
            ExlLoaderError: as `PlanAnswers.answer` and `loader.load_part`.
            MachineRefused: the question is none, or a model is loaded already.
        """
        if question == LOAD:
            return self._load(fields, progress)
        if question == UNLOAD:
            if self._load_number == _integer(fields, LOAD):
                self._unload()
            return {}
        if question == LOADED:
            return {LOAD: self._load_number}
        found = self._answers.answer(question, fields)
        if found is None:
            raise MachineRefused("a question", expected="one that this version knows",
                                 actual=shown(question))
        return found

    def execute(self, frame: Frame) -> Iterable[Frame]:
        """Do what a frame of the loaded model says; others go on as they are or are dropped.

        Raises:
            InvalidFrame: see `ServedLayers.run`.
        """
        if self._running is None:
            # The layers behind this machine's place are none, or the model was unloaded.
            return [Frame(frame.kind, frame.fields, frame.arrays)]
        if frame.fields.get(LOAD_NUMBER) != self._load_number:
            return []
        following = self._running.layers.run(frame)
        return [] if following is None else [following]

    def lost(self) -> None:
        """Free everything, because the session is over."""
        self._unload()
        self._answers.close()

    @property
    def _load_number(self) -> int:
        """The number of the loaded model; 0 for none."""
        return 0 if self._running is None else self._running.load_number

    def _load(self, fields: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self._running is not None:
            raise MachineRefused("a load", expected="no loaded model", actual="one is loaded")
        try:
            self._running = self._loaded(fields, progress)
        except BaseException as error:
            drop_locals(error)
            self._unload()
            raise
        finally:
            trim_heap()
        part = self._running.part
        devices = part.layers.devices
        allocated = {device: part.buffers.allocated_bytes(device) for device in devices}
        numbers = part.layers.layer_numbers
        self._say(
            f"layers {numbers.start} to {numbers.stop - 1} are loaded, "
            f"{amount(sum(allocated.values()))}"
        )
        return {"bytes": allocated, "decode_rows": part.layers.decode_rows}

    def _loaded(self, fields: dict[str, Any], progress: Progress) -> _Running:
        load_number, num_machines = _integer(fields, LOAD), _integer(fields, "num_machines")
        options = LoadOptions(
            alpha_value=_number(fields, "alpha_value"),
            compress_pos_emb=_number(fields, "compress_pos_emb"),
        )
        options.check()
        plan = self._answers.part(fields.get("asked") or {})
        config = plan.model.parts.config
        self._station.reserve(
            *reserved_frames(config.hidden_size, plan.run.chunk_size, num_machines)
        )
        part = load_part(plan, options, progress)
        served = ServedLayers(
            part.layers, part.cache.layers, self._station.place, fields.get("is_last") is True,
            lambda layers: None,
        )
        return _Running(load_number, part, served)

    def _unload(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.part.buffers.release()
            del running
            self._say("the layers are unloaded")
        gc.collect()
        trim_heap()


def _integer(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value < 1 << 31:
        raise MachineRefused(f"the question {LOAD}", expected=f"a positive {name}",
                             actual=shown(value))
    return value


def _number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    if type(value) is not float:
        raise MachineRefused(f"the question {LOAD}", expected=f"{name} as a number",
                             actual=shown(value))
    return value
