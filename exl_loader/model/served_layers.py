"""The layers that a machine runs for the first one: the other side of `remote_layers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..cache.layout import PAGE_LEN, CacheLayer
from ..machines.frames import Frame, InvalidFrame
from ..machines.ring import error_fields
from .local_layers import Entry, LayerSample, LocalLayers, Step
from .pass_frames import COPY_OPEN_PAGE, COPY_TOKENS, LOAD_NUMBER, PASS, SAMPLE, unpack_entries

Array = npt.NDArray[Any]


class ServedLayers:
    """Layers that do what comes from the machine before, frame by frame.

    Args:
        layers: loaded.
        cache_layers: theirs.
        place: of this machine in the ring.
        is_last: whether these are the model's last layers. Only those rows of the hidden state
            go on then that the first machine asks for.
        advance: is told of each layer that the sample has run through.
    """

    def __init__(
        self, layers: LocalLayers, cache_layers: Sequence[CacheLayer], place: int, is_last: bool,
        advance: Callable[[int], None],
    ) -> None:
        self._layers, self._cache_layers = layers, cache_layers
        self._place, self._is_last, self._advance = place, is_last, advance
        self._sample: LayerSample | None = None
        self._num_pages: int = cache_layers[0].keys.codes.shape[0]
        self._num_open_pages = cache_layers[0].num_open_pages

    def run(self, frame: Frame) -> Frame | None:
        """Do what a frame says.

        Returns:
            The frame for the next machine, whose arrays are valid until the next call. That of a
            pass that failed, here or before, has an error in place of arrays. None after copies
            on the last machine.

        Raises:
            InvalidFrame: the frame is none that `RemoteLayers` sends.
        """
        if frame.kind in (COPY_TOKENS, COPY_OPEN_PAGE):
            self._copy(frame)
            return None if self._is_last else Frame(frame.kind, frame.fields)
        if frame.kind not in (PASS, SAMPLE):
            raise InvalidFrame(f"a frame of kind {frame.kind}")
        if "error" in frame.fields:
            return Frame(frame.kind, frame.fields)
        try:
            return Frame(frame.kind, frame.fields, self._run_pass(frame))
        except Exception as error:
            fields = {"error": error_fields(error), "place": self._place}
            return Frame(frame.kind, {LOAD_NUMBER: frame.fields.get(LOAD_NUMBER), **fields})

    def _run_pass(self, frame: Frame) -> Sequence[Array]:
        """Run a pass or a step of the sample; return the arrays for the next machine."""
        numbers, rows = _arrays(frame)
        entries = unpack_entries(numbers)
        self._check(entries, rows)
        hidden = torch.from_numpy(rows)
        logits = frame.fields.get("logits", "none")
        if frame.kind == SAMPLE:
            step = self._run_sample(entries[0], hidden, frame)
        else:
            step = self._layers.run(entries, "none", hidden=hidden)
        out = self._layers.hidden(step)
        return (_wanted(out, entries, logits),) if self._is_last else (numbers, out)

    def _run_sample(self, entry: Entry, hidden: torch.Tensor, frame: Frame) -> Step:
        num_ids = _integer(frame, "num_ids", PAGE_LEN + 1)
        if self._sample is None:
            self._sample = self._layers.begin_sample(num_ids, self._advance)
        step = self._sample.run(entry, hidden)
        if entry[0].past_len + len(entry[1]) == num_ids:
            self._sample.finish()
            self._sample = None
        return step

    def _check(self, entries: Sequence[Entry], rows: Array) -> None:
        """Refuse what would make an operation read or write outside its tensors."""
        layers, num_rows = self._layers, sum(len(ids) for _, ids in entries)
        fits = (
            0 < len(entries) <= layers.max_batch_size
            and 0 < num_rows <= layers.chunk_size
            and rows.shape == (num_rows, layers.hidden_size)
        )
        needs_open_page = self._num_open_pages > 0
        for sequence, _ in entries:
            fits = (
                fits
                and all(0 <= page < self._num_pages for page in sequence.pages)
                and len(sequence.pages) <= layers.max_pages
                and (sequence.open_page is not None) == needs_open_page
                and (sequence.open_page or 0) < max(1, self._num_open_pages)
            )
        if not fits:
            raise InvalidFrame("a pass beyond the tensors of these layers")

    def _copy(self, frame: Frame) -> None:
        is_open = frame.kind == COPY_OPEN_PAGE
        most = self._num_open_pages if is_open else self._num_pages
        source, target = _integer(frame, "source", most), _integer(frame, "target", most)
        count = _integer(frame, "count", PAGE_LEN + 1)
        for layer in self._cache_layers:
            copy = layer.copy_open_page if is_open else layer.copy_tokens
            copy(source, target, count)


def _arrays(frame: Frame) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return a pass's entries as numbers, and its hidden states."""
    types = [(array.dtype, array.ndim) for array in frame.arrays]
    if types != [(np.dtype("int32"), 1), (np.dtype("float32"), 2)]:
        raise InvalidFrame(f"a pass of {types}")
    numbers, rows = frame.arrays
    return numbers, rows


def _wanted(out: Array, entries: Sequence[Entry], logits: object) -> Array:
    """Return the rows of a pass that get logits."""
    if logits == "all":
        return out
    if logits == "last":
        ends = np.cumsum([len(ids) for _, ids in entries])
        return out if len(ends) == len(out) else out[ends - 1]
    if logits == "none":
        return out[:0]
    raise InvalidFrame(f"a pass with logits {logits}")


def _integer(frame: Frame, name: str, end: int) -> int:
    """Return a field that is an integer from 0 up to `end`, not included."""
    value = frame.fields.get(name)
    if type(value) is not int or not 0 <= value < end:
        raise InvalidFrame(f"{name} {value} in a frame of kind {frame.kind}")
    return value
