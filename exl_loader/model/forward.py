"""The forward pass: rows of one or several sequences in, logits out, inside the workspace.

The layers run on this machine (`local_layers`), or the first of them here and the others on further
machines (`remote_layers`). Embedding and head are on this machine either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..backends.base import DeviceOps
from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedCache, PagedSequence
from ..generation.forward_model import LandedFlight, LogitsMode, LogitsRow, TopLogits
from ..utils.errors import CacheFull, InvalidCall, InvalidSettings
from ..utils.progress import NullProgress, Progress, task
from .adapters import Adapters, LoadedLora
from .assembly import ModelParts
from .key_sample import sample_ids
from .local_layers import Entry, LocalLayers
from .pass_frames import most_in_flight
from .step import most_rows
from .top_logits_reader import TopLogitsReader

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..generation.forward_model import Flight
    from .remote_layers import RemoteLayers


class Model:
    """A loaded model. One thread at a time may call `forward`.

    Making it runs a short text, if keys are stored in fewer than 8 bits; see `key_sample`.

    Args:
        parts: the model's parts on this machine, loaded.
        workspaces: device -> views of its `workspace_specs`, by name.
        cache: the key/value cache, of which no sequence holds a page yet.
        ops: device -> its operations.
        remote: the layers after those of `parts`, on other machines; None where there are none.
        rooms: device -> uint8 [n], the room for adapters; devices without a room are missing.
        alpha_value, compress_pos_emb: see `rope.inv_freq`.
        sample_text_ids: of `key_sample.SAMPLE_TEXT`; none without a tokenizer.
        progress: reports the layers that the sample has run through.
        sample_task: the name under which it does.

    Attributes:
        sampled_vocab_size: ids from here on are of no token and are never drawn.

    Raises:
        InvalidSettings: alpha_value or compress_pos_emb out of range.
    """

    def __init__(
        self,
        parts: ModelParts,
        workspaces: Mapping[str, Mapping[str, torch.Tensor]],
        cache: PagedCache,
        ops: Mapping[str, DeviceOps],
        *,
        remote: RemoteLayers | None = None,
        rooms: Mapping[str, torch.Tensor] | None = None,
        alpha_value: float = 1.0,
        compress_pos_emb: float = 1.0,
        sample_text_ids: Sequence[int] = (),
        progress: Progress | None = None,
        sample_task: str = "sampling keys",
    ):
        self.config = parts.config
        self._rope_options: dict[str, Any] = {
            "alpha_value": alpha_value, "compress_pos_emb": compress_pos_emb,
        }
        self._local = LocalLayers(parts, workspaces, cache.layers, ops, **self._rope_options)
        last = workspaces[parts.device_map.devices[-1]]
        self.chunk_size = self._local.chunk_size
        self.max_batch_size = self._local.max_batch_size
        self.logits_rows: int = last["logits"].shape[0]
        self.decode_rows = self._local.decode_rows
        self.most_in_flight = self.decoding_in_flight = 1
        self._remote = remote
        if remote is not None:
            self.decode_rows = min(self.decode_rows, remote.decode_rows)
            self.most_in_flight = most_in_flight(remote.num_machines)
            self.decoding_in_flight = remote.num_machines
        self.sampled_vocab_size = self.config.vocab_size
        self._parts, self._workspaces, self._ops = parts, workspaces, ops
        rows = most_rows(self.chunk_size, self.max_batch_size, self.logits_rows)
        self._adapters = Adapters(parts, rooms or {}, ops, rows)
        self._sample_text_ids = sample_text_ids
        self._cpu = self._local.stages[-1].cpu
        self._logits_on_device = last["logits"]
        self._logits = self._cpu.mirror(self._logits_on_device)
        self._landed = self._logits
        if remote is not None and self._logits is self._logits_on_device:
            # The next pass starts before the rows of this one have been read, and its layers
            # use the same memory of the workspace.
            self._landed = torch.empty_like(self._logits)
        self._top_logits = (
            TopLogitsReader(self._cpu, last["top_logits"]) if "top_logits" in last else None
        )
        if any(layer.key_feedback is not None for layer in cache.layers):
            with task(
                progress or NullProgress(), sample_task, len(cache.layers), "layers"
            ) as advance:
                self._run_sample(cache, advance)
        # Another thread than the one that loads may run the steps.
        self._local.finish()

    def _run_sample(self, cache: PagedCache, advance: Callable[[int], None]) -> None:
        """Run the sample of `key_sample`, which finds how the cache's layers store keys.

        Args:
            cache: the model's, whose pages are all free. The sample runs in the first one without
                acquiring it.
            advance: is told of each layer that is done.
        """
        assert cache.num_free_pages == cache.num_pages, "a sequence holds pages"
        ids = sample_ids(
            self._sample_text_ids, self.config.vocab_size,
            min(PAGE_LEN, self.config.learned_positions or PAGE_LEN),
        )
        sample = self._local.begin_sample(len(ids), advance)
        has_open_pages = cache.layers[0].num_open_pages > 0
        sequence = PagedSequence([0], rope_len=1, open_page=0 if has_open_pages else None)
        for first in range(0, len(ids), self.chunk_size):
            entry = sequence, ids[first : first + self.chunk_size]
            step = sample.run(entry)
            if self._remote is not None:
                self._remote.sample(entry, self._local.hidden(step), len(ids))
            _advance([entry])
        sample.finish()

    def forward(
        self,
        entries: Sequence[Entry],
        logits: LogitsMode = "last",
    ) -> torch.Tensor:
        """Run new tokens of one or several sequences and advance their `past_len`.

        Args:
            entries: sequences, each with the ids that follow its `past_len` tokens and with
                pages for them. At most `max_batch_size` sequences, `chunk_size` ids in all.
            logits: `last` for one row a sequence, `all` for a row an id (then at most
                `logits_rows` ids), `none` to fill the cache alone.

        Returns:
            float32 [rows, vocab_size] on the CPU, a view that is valid until the next call;
            no rows for `none`.

        Raises:
            InvalidSettings: an id outside the vocabulary, or no ids.
            CacheFull: a sequence has too few pages.
        """
        if _needs_passes(entries):
            return self._forward_passes(entries, logits)
        out = self._fetch(self._run(entries, logits, False))
        _advance(entries)
        return out

    def forward_rows(
        self,
        entries: Sequence[Entry],
        logits: LogitsMode = "last",
    ) -> list[LogitsRow]:
        """Do the same, and return one row at a time.

        Returns:
            The rows, valid until the next call. If the device computes top logits, a row is
            copied to the CPU only when its values are read.
        """
        if self._top_logits is None or logits == "none" or _needs_passes(entries):
            return [LogitsRow(row) for row in self.forward(entries, logits).numpy()]
        on_device = self._run(entries, logits, True)
        found = self._top_logits.read(len(on_device), self.sampled_vocab_size)
        _advance(entries)
        return [
            LogitsRow(partial(self._fetch_row, on_device, row), top_logits)
            for row, top_logits in enumerate(found)
        ]

    def start_rows(self, entries: Sequence[Entry], logits: LogitsMode = "last") -> Flight:
        """Start the same; see `ForwardModel.start_rows`. On one machine the pass ends at once."""
        if self._remote is None:
            return LandedFlight(self.forward_rows(entries, logits))
        assert not _needs_passes(entries), "rows of a sequence lie in several pages"
        self._check(entries)
        self._compute_missing_firsts(entries)
        number = self._send(self._remote, entries, logits)
        for sequence, _ in entries:
            sequence.missing_first = None
        _advance(entries)
        return RemoteFlight(partial(self._land, self._remote, number))

    def _land(self, remote: RemoteLayers, number: int) -> list[LogitsRow]:
        """Wait for a pass that was started, and run the head on the rows that it returns."""
        hidden = remote.finish(number)
        if not len(hidden):
            return []
        top_vocab_size = self.sampled_vocab_size if self._top_logits is not None else 0
        on_device = self._local.run_head(torch.from_numpy(hidden), top_vocab_size)
        rows, fetched = self._landed[: len(hidden)], self._fetch(on_device)
        if rows.data_ptr() != fetched.data_ptr():
            rows.copy_(fetched)
        found: list[TopLogits | None] = [None] * len(rows)
        if self._top_logits is not None:
            found = self._top_logits.read(len(rows), self.sampled_vocab_size)
        return [LogitsRow(*row) for row in zip(rows.numpy(), found, strict=True)]

    def _forward_passes(
        self, entries: Sequence[Entry], logits: LogitsMode
    ) -> torch.Tensor:
        """Do what `forward` does in several passes, each of which advances its sequences.

        Returns:
            As `forward`, but a tensor of its own, because a pass overwrites the logits of the one
            before.
        """
        self._check(entries)
        counts = [len(ids) if logits == "all" else 1 for _, ids in entries]
        first_rows = [sum(counts[:i]) for i in range(len(entries))]
        out = torch.empty(sum(counts) if logits != "none" else 0, self._logits.shape[1])
        for pieces in _passes(entries):
            ready = [piece.entry for piece in pieces]
            on_device = self._run(ready, logits, False)
            _advance(ready)
            rows = self._fetch(on_device).split(
                [len(ids) if logits == "all" else min(1, len(on_device)) for _, ids in ready]
            )
            for piece, found in zip(pieces, rows, strict=True):
                target = first_rows[piece.index] + (piece.start if logits == "all" else 0)
                out[target : target + len(found)] = found
        return out

    def _run(
        self, entries: Sequence[Entry], logits: LogitsMode, top_logits: bool
    ) -> torch.Tensor:
        """Run a step, which may also compute the top logits of its rows.

        Returns:
            The logits on their device.
        """
        num_rows = sum(len(ids) for _, ids in entries)
        assert 0 < len(entries) <= self.max_batch_size and num_rows <= self.chunk_size
        assert logits != "all" or num_rows <= self.logits_rows
        self._check(entries)
        self._compute_missing_firsts(entries)
        top_vocab_size = self.sampled_vocab_size if top_logits and logits != "none" else 0
        if self._remote is None:
            out = self._local.run(entries, logits, top_vocab_size).logits
        else:
            hidden = self._remote.finish(self._send(self._remote, entries, logits))
            out = self._logits_on_device[:0]
            if len(hidden):
                out = self._local.run_head(torch.from_numpy(hidden), top_vocab_size)
        for sequence, _ in entries:
            sequence.missing_first = None
        return out

    def _send(
        self, remote: RemoteLayers, entries: Sequence[Entry], logits: LogitsMode
    ) -> int:
        """Run a pass through this machine's layers and send it on; return its number."""
        step = self._local.run(entries, "none")
        return remote.start(entries, logits, self._local.hidden(step))

    def _compute_missing_firsts(self, entries: Sequence[Entry]) -> None:
        """Compute the first tokens that open pages lack, because a cache held the texts' beginning.

        A first token depends on nothing else, so it is a text of its own here.
        """
        firsts: list[Entry] = [
            (replace(sequence, past_len=0, missing_first=None), [sequence.missing_first])
            for sequence, _ in entries if sequence.missing_first is not None
        ]
        if not firsts:
            return
        if self._remote is None:
            self._local.run(firsts, "none")
        else:
            # The pass of the entries waits for it as well.
            self._send(self._remote, firsts, "none")

    def _fetch(self, on_device: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Copy rows of logits to the CPU, to the rows from `first` on."""
        out = self._logits[first : first + len(on_device)]
        if len(out):
            self._cpu.collect(on_device, out)
        return out

    def _fetch_row(self, on_device: torch.Tensor, row: int) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self._fetch(on_device[row : row + 1], row).numpy()[0]
        return values

    @property
    def ops(self) -> Mapping[str, DeviceOps]:
        """The operations of each device."""
        return self._ops

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """The adapters that are loaded, in the order of loading."""
        return self._adapters.loaded

    def load_lora(self, adapter: Adapter, scaling: float) -> None:
        """Load an adapter, which changes all later steps; see `Adapters.load`.

        Raises:
            InvalidCall: the model is on several machines.
        """
        self._check_alone(
            "a LoRA adapter", "Load it without machines, or merge the adapter into its weights"
        )
        self._adapters.load(adapter, scaling)
        self._local.forget_steps()

    def unload_loras(self) -> None:
        """Unload all adapters."""
        self._adapters.clear()
        self._local.forget_steps()

    def with_cache(self, cache: PagedCache, ops: Mapping[str, DeviceOps] | None = None) -> Model:
        """Return the same model over another cache, to compare caches. It loads no adapters.

        The sample of the cache runs as in a model that is loaded with it.

        Both share weights and workspace: a call of one ends what the other's logits are
        valid for, and only one may run at a time.

        Args:
            cache: in place of the model's own; no sequence holds a page of it.
            ops: device -> operations in place of the model's own.

        Raises:
            InvalidCall: the model is on several machines.
        """
        self._check_alone("a comparison of caches", "Load it without machines")
        model = Model(
            self._parts, self._workspaces, cache, ops or self._ops,
            sample_text_ids=self._sample_text_ids, **self._rope_options,
        )
        # The frequencies of a slot are in the shared workspace.
        self._local.share_inputs(model._local)
        return model

    def _check_alone(self, thing: str, remedy: str) -> None:
        if self._remote is not None:
            raise InvalidCall(
                thing, expected="a model on one machine",
                actual=f"one on {self._remote.num_machines} machines",
                remedy=remedy,
            )

    def rope_class(self, rope_len: int) -> int:
        """Return a number that is the same for lengths with the same RoPE frequencies."""
        # A second RoPE does not depend on the length.
        return self.config.ropes[0].length_class(rope_len) if self.config.ropes else 0

    def _check(self, entries: Sequence[Entry]) -> None:
        """Refuse what would make an operation read or write outside its tensors."""
        vocab_size = self.config.vocab_size
        for sequence, ids in entries:
            if not ids or min(ids) < 0 or max(ids) >= vocab_size:
                raise InvalidSettings(
                    "token ids", expected=f"one or more from 0 to {vocab_size - 1}",
                    actual=f"{min(ids)} to {max(ids)}" if ids else "none",
                    remedy="The prompt may come from another model's tokenizer",
                )
            pages = min(len(sequence.pages), self._local.max_pages)
            end = sequence.past_len + len(ids)
            if 0 < self.config.learned_positions < end:
                raise CacheFull(
                    "the model's table of positions",
                    expected=f"at most {self.config.learned_positions} tokens", actual=end,
                    remedy="Give a shorter prompt, or ask for fewer tokens",
                )
            if end > pages * PAGE_LEN:
                raise CacheFull(
                    "the key/value cache", expected=f"pages for {end} tokens",
                    actual=f"{pages * PAGE_LEN}", remedy="Load with a larger ctx_size",
                )


@dataclass(frozen=True)
class RemoteFlight:
    """A pass on its way through other machines.

    Args:
        land: waits for it and returns its rows.
    """

    land: Callable[[], list[LogitsRow]]

    def rows(self) -> list[LogitsRow]:
        """Do what `Flight.rows` says."""
        return self.land()


@dataclass(frozen=True)
class Piece:
    """A part of an entry of `Model.forward` whose rows lie in one page.

    Args:
        index: of the entry.
        start: of its ids, the first of the piece.
        entry: the sequence, and the ids of the piece.
    """

    index: int
    start: int
    entry: Entry


def _needs_passes(entries: Sequence[Entry]) -> bool:
    """Return whether the rows of a sequence with an open page lie in several pages."""
    return any(
        sequence.open_page is not None and sequence.past_len % PAGE_LEN + len(ids) > PAGE_LEN
        for sequence, ids in entries
    )


def _passes(entries: Sequence[Entry]) -> list[list[Piece]]:
    """Split entries into passes, in which the rows of a sequence with an open page lie in one page.

    The next page takes the place of the one before.
    """
    passes: list[list[Piece]] = [[]]
    for index, (sequence, ids) in enumerate(entries):
        if sequence.open_page is None:
            passes[0].append(Piece(index, 0, (sequence, ids)))
            continue
        start, place = 0, 0
        while start < len(ids):
            end = start + PAGE_LEN - (sequence.past_len + start) % PAGE_LEN
            if place == len(passes):
                passes.append([])
            passes[place].append(Piece(index, start, (sequence, ids[start:end])))
            start, place = end, place + 1
    return passes


def _advance(entries: Sequence[Entry]) -> None:
    for sequence, ids in entries:
        sequence.past_len += len(ids)
