"""The other machines while the first one loads a model, runs it and unloads it."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .memory.reservation.questions import to_json
from .utils.errors import MachineLost, MachineRefused
from .utils.progress import Progress

if TYPE_CHECKING:
    from .machines.connection import Machines
    from .memory.reservation import LoadOptions, PlannedModel
    from .model.remote_layers import RemoteLayers

# The questions of a load: load, unload, and which model is loaded.
LOAD, UNLOAD, LOADED = "load", "unload", "loaded"

# The thread of a model that was dropped a moment ago unloads it in so many seconds.
DROP_S = 2.0

_load_numbers = itertools.count(1)


class OtherMachines:
    """The parts of one model on other machines, which load while this machine loads its own.

    As a context it unloads them at the end.

    Args:
        machines: the connection.
        plan: what each of them loads.
        options: of the load.
        progress: gets the tasks of each machine, from another thread.

    Raises:
        MachineLost: a machine or the connection is lost.
        MachineRefused: the machines have layers of another model.
    """

    def __init__(
        self, machines: Machines, plan: PlannedModel, options: LoadOptions, progress: Progress
    ) -> None:
        from .model.pass_frames import reserved_frames

        self._machines, self._plan, self._options = machines, plan, options
        self._progress = progress
        self._load_number = next(_load_numbers)
        self._hidden_size = plan.model.parts.config.hidden_size
        self._num_machines = 1 + len(machines.others)
        self._replies: dict[int, dict[str, Any]] = {}
        self._error: BaseException | None = None
        _wait_for_unload(machines)
        machines.reserve(
            *reserved_frames(self._hidden_size, plan.reservation.chunk_size, self._num_machines)
        )
        machines.in_use = True
        # A model that is dropped and not unloaded ends without a call of `unload`.
        self._dropped = weakref.finalize(
            self, _unload_behind, machines, self._load_number, tuple(plan.others)
        )
        self._dropped.atexit = False
        # A daemon: after an interrupt of the load, the process need not wait for replies.
        self._thread = threading.Thread(target=self._load, name="other machines", daemon=True)
        self._thread.start()

    def __enter__(self) -> OtherMachines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def layers(self) -> RemoteLayers:
        """Wait until every machine has loaded its part; return the layers.

        Raises:
            ExlLoaderError: a machine could not load its part.
            MachineLost: a machine or the connection is lost.
        """
        from .model.remote_layers import RemoteLayers

        self._thread.join()
        if self._error is not None:
            raise self._error
        planned, found = self._planned_bytes(), self.allocated_bytes()
        assert found == planned, (found, planned)
        decode_rows = min(int(reply["decode_rows"]) for reply in self._replies.values())
        return RemoteLayers(
            self._machines, self._load_number, self._hidden_size, decode_rows,
            1 + len(self._plan.others),
        )

    def allocated_bytes(self) -> dict[tuple[int, str], int]:
        """Return the bytes of the buffers that each machine has allocated on each device."""
        return {
            (place, device): int(nbytes)
            for place, reply in self._replies.items()
            for device, nbytes in reply["bytes"].items()
        }

    def unload(self) -> None:
        """Let every machine free its part. A machine that is lost has done so by itself."""
        self._replies.clear()
        if self._thread.is_alive():
            # After an interrupt or an error here. Machines end a load when the connection does.
            self._machines.close()
            self._thread.join()
        if self._dropped.detach() is not None:
            _unload(self._machines, self._load_number, tuple(self._plan.others))

    def _load(self) -> None:
        """Ask each machine to load its part; run by a thread of its own."""
        last = max(self._plan.others)
        questions = {
            place: {
                LOAD: self._load_number,
                "asked": to_json(asked),
                "is_last": place == last,
                "num_machines": self._num_machines,
                "alpha_value": float(self._options.alpha_value),
                "compress_pos_emb": float(self._options.compress_pos_emb),
            }
            for place, asked in self._plan.others.items()
        }
        try:
            self._replies = self._machines.ask_each(questions, LOAD, progress=self._progress)
        except BaseException as error:
            self._error = error

    def _planned_bytes(self) -> dict[tuple[int, str], int]:
        return {
            (record.machine, record.device): record.total_bytes
            for record in self._plan.reservation.devices
            if record.machine and record.total_bytes
        }


def _unload(machines: Machines, load_number: int, places: tuple[int, ...]) -> None:
    with suppress(MachineLost):
        machines.ask_each({place: {LOAD: load_number} for place in places}, UNLOAD)
    machines.in_use = False


def _unload_behind(machines: Machines, load_number: int, places: tuple[int, ...]) -> None:
    """Unload without waiting: the garbage collector calls, in whatever thread it runs."""
    arguments = (machines, load_number, places)
    threading.Thread(target=_unload, args=arguments, name="unload", daemon=True).start()


def _wait_for_unload(machines: Machines) -> None:
    """Wait until no machine has layers of a model.

    Raises:
        MachineRefused: one goes on to have them.
    """
    end = time.monotonic() + DROP_S
    while any(reply[LOAD] for reply in machines.ask_all(LOADED)):
        if time.monotonic() > end:
            raise MachineRefused(
                "another model over the same machines", expected="none",
                actual="one that is loaded", remedy="Unload it first",
            )
        time.sleep(0.05)
