"""The layers of a model that are on other machines, as the first machine sees them.

A pass starts on the first machine, which has the embedding and the first layers. Its hidden state
goes from machine to machine, and what the last layer leaves comes back to the first machine,
which has the head. Every machine runs passes and copies of pages in the order in which the first
one sent them. So a pass may read what one before it writes, although that has not ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..generation.forward_model import LogitsMode
from ..machines.frames import Frame
from ..machines.ring import Machine, error_from
from ..utils.errors import ExlLoaderError
from .local_layers import Entry
from .pass_frames import COPY_OPEN_PAGE, COPY_TOKENS, LOAD_NUMBER, PASS, SAMPLE, pack_entries


class Ring(Protocol):
    """What `RemoteLayers` needs of the connection; see `machines.connection.Machines`."""

    @property
    def others(self) -> Sequence[Machine]:
        """The other machines, in the order of the ring."""

    def send(self, frame: Frame) -> None:
        """Send a frame to the next machine. Its arrays may be overwritten afterwards."""

    def receive(self) -> Frame:
        """Wait for the next frame that has been around.

        Raises:
            MachineLost: a machine or the connection is lost.
        """


class RemoteLayers:
    """The layers on the other machines of a ring. Only the model's thread uses them.

    Args:
        ring: the connection, over which every machine has loaded its layers.
        load_number: tells the frames of this model from those of one that was unloaded.
        hidden_size: width of the hidden state.
        decode_rows: least of the machines; see `LocalLayers.decode_rows`.
        num_machines: those that have layers, the first one included.
    """

    def __init__(
        self, ring: Ring, load_number: int, hidden_size: int, decode_rows: int, num_machines: int
    ) -> None:
        self.num_machines, self.decode_rows = num_machines, decode_rows
        self._load_number = load_number
        self._ring, self._hidden_size = ring, hidden_size
        self._sent = self._received = 0

    def start(
        self, entries: Sequence[Entry], logits: LogitsMode, hidden: npt.NDArray[np.float32]
    ) -> int:
        """Send a pass on its way.

        Args:
            entries: the pass, not advanced.
            logits: the rows of the hidden state that are to come back.
            hidden: float32 [ids, hidden_size], what the first machine has computed.

        Returns:
            The number of the pass, for `finish`.
        """
        return self._send(PASS, {"logits": logits}, entries, hidden)

    def finish(self, number: int) -> npt.NDArray[np.float32]:
        """Wait for a pass and for those before it.

        Returns:
            float32 [rows, hidden_size], the rows of the pass that were asked for, in memory of
            their own.

        Raises:
            MachineLost: a machine or the connection is lost.
            ExlLoaderError: the pass failed on a machine, or one before it that nobody has waited
                for, which then was a part of it.
        """
        failure: Exception | None = None
        while True:
            with self._ring.receive() as frame:
                if frame.fields.get(LOAD_NUMBER) != self._load_number:
                    continue
                self._received += 1
                if "error" in frame.fields:
                    failure = failure or self._error(frame)
                elif self._received == number and failure is None:
                    (rows,) = frame.arrays
                    return np.array(rows, np.float32).reshape(-1, self._hidden_size)
            if self._received == number:
                assert failure is not None
                raise failure

    def sample(self, entry: Entry, hidden: npt.NDArray[np.float32], num_ids: int) -> None:
        """Run a step of the sample of `key_sample`, and wait for its last.

        Args:
            num_ids: length of the whole sample.
        """
        number = self._send(SAMPLE, {"num_ids": num_ids}, [entry], hidden)
        self.finish(number)

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Do what `CacheLayer.copy_tokens` does, in all layers."""
        self._copy(COPY_TOKENS, source, target, count)

    def copy_open_page(self, source: int, target: int, count: int) -> None:
        """Do what `CacheLayer.copy_open_page` does, in all layers."""
        self._copy(COPY_OPEN_PAGE, source, target, count)

    def _error(self, frame: Frame) -> ExlLoaderError:
        places = {machine.place: machine for machine in self._ring.others}
        return error_from(frame.fields["error"], places.get(frame.fields.get("place", 0)))

    def _copy(self, kind: str, source: int, target: int, count: int) -> None:
        fields = {
            LOAD_NUMBER: self._load_number, "source": source, "target": target, "count": count,
        }
        self._ring.send(Frame(kind, fields))

    def _send(
        self, kind: str, fields: dict[str, object], entries: Sequence[Entry],
        hidden: npt.NDArray[np.float32],
    ) -> int:
        arrays = (pack_entries(entries), hidden)
        self._ring.send(Frame(kind, {LOAD_NUMBER: self._load_number, **fields}, arrays))
        self._sent += 1
        return self._sent
