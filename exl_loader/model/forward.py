"""The forward pass: rows of one or several sequences in, logits out, inside the workspace.

What runs on a device is a `stages.Stage`; a model is its stages in order, and the CPU's side
of a step: what it writes for the operations and reads of them.
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
from ..backends.recorder import Recorder
from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedCache, PagedSequence
from ..checkpoint.rope import RopeConfig, inv_freq
from ..generation.forward_model import LandedFlight, LogitsMode, LogitsRow
from ..utils.errors import CacheFull, InvalidSettings
from ..utils.progress import NullProgress, Progress, task
from .adapters import Adapters, LoadedLora
from .assembly import ModelParts
from .key_feedback import MeanOverPositions
from .key_sample import KeySample, sample_ids
from .stages import Stage, StageStep
from .step import most_rows
from .top_logits_reader import TopLogitsReader

if TYPE_CHECKING:
    from ..backends.cpu_access import Array
    from ..checkpoint.adapter import Adapter

# A sequence, and the ids that follow its `past_len` tokens.
Entry = tuple[PagedSequence, list[int]]

# Recorded steps that are kept. Decoding needs one a batch size; the others are the odd last
# chunks of prompts, which come again rarely and cost little compared with their own work.
MAX_STEPS = 32


@dataclass(frozen=True)
class Step:
    """A recorded forward pass of one shape: each stage's operations, and the logits of the last."""

    stages: tuple[StageStep, ...]
    logits: torch.Tensor


class Model:
    """A loaded model. One thread at a time may call `forward`.

    Making it runs a short text, if keys are stored in fewer than 8 bits; see `key_sample`.

    Args:
        parts: the model's parts, loaded.
        workspaces: device -> views of its `workspace_specs`, by name.
        cache: the key/value cache, of which no sequence holds a page yet.
        ops: device -> its operations.
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

    most_in_flight = 1
    decoding_in_flight = 1

    def __init__(
        self,
        parts: ModelParts,
        workspaces: Mapping[str, Mapping[str, torch.Tensor]],
        cache: PagedCache,
        ops: Mapping[str, DeviceOps],
        *,
        rooms: Mapping[str, torch.Tensor] | None = None,
        alpha_value: float = 1.0,
        compress_pos_emb: float = 1.0,
        sample_text_ids: Sequence[int] = (),
        progress: Progress | None = None,
        sample_task: str = "sampling keys",
    ):
        self.config, devices = parts.config, parts.device_map.devices
        first, last = workspaces[devices[0]], workspaces[devices[-1]]
        self.chunk_size = first["ids"].shape[0]
        self.max_batch_size = first["past_len"].shape[0]
        self.logits_rows = last["logits"].shape[0]
        limits = (ops[device].decode_rows or self.chunk_size for device in devices)
        self.decode_rows = min(self.chunk_size, *limits)
        self.sampled_vocab_size = self.config.vocab_size
        self._parts, self._workspaces, self._ops = parts, workspaces, ops
        rows = most_rows(self.chunk_size, self.max_batch_size, self.logits_rows)
        self._adapters = Adapters(parts, rooms or {}, ops, rows)
        self._rope_options: dict[str, Any] = {
            "alpha_value": alpha_value, "compress_pos_emb": compress_pos_emb,
        }
        self._sample_text_ids = sample_text_ids
        ropes = parts.ropes()
        tables = [self._frequencies(config, 1) for config in self.config.ropes]
        rope_factors = [factor for _, factor in tables]
        self._stages: list[Stage] = []
        first_layer = 0
        for on_device in parts.stages():
            end, device = first_layer + len(on_device.layers), on_device.device
            self._stages.append(
                Stage(on_device, cache.layers[first_layer:end], ops[device], workspaces[device],
                      rope_factors)
            )
            first_layer = end
        self._inputs = [stage.inputs for stage in self._stages]
        # What depends on the length is written again for each sequence.
        self._by_length = [rope for rope in ropes if rope.config.depends_on_length]
        for inputs in self._inputs:
            for rope in ropes:
                if rope.frequencies_name in inputs.arrays:
                    inputs.arrays[rope.frequencies_name][:] = tables[rope.index][0]
        self._cpu, self._logits_on_device = self._stages[-1].cpu, last["logits"]
        self._logits = self._cpu.mirror(self._logits_on_device)
        self._top_logits = (
            TopLogitsReader(self._cpu, last["top_logits"]) if "top_logits" in last else None
        )
        self._max_pages = first["page_table"].shape[1]
        self._slot_rope_len = [1] * self.max_batch_size
        self._steps: dict[tuple[int, int, LogitsMode, bool], Step] = {}
        if any(layer.key_feedback is not None for layer in cache.layers):
            with task(
                progress or NullProgress(), sample_task, len(cache.layers), "layers"
            ) as advance:
                self._run_sample(cache, [frequencies for frequencies, _ in tables], advance)
        for placed in self._stages:
            # Another thread than the one that loads may run the steps.
            placed.cpu.finish()

    def _run_sample(
        self,
        cache: PagedCache,
        frequencies: Sequence[Sequence[float]],
        advance: Callable[[int], None],
    ) -> None:
        """Run the sample of `key_sample`, which finds how the cache's layers store keys.

        Args:
            cache: the model's, whose pages are all free. The sample runs in the first one without
                acquiring it.
            frequencies: of each of the model's RoPEs.
            advance: is told of each layer that is done.
        """
        assert cache.num_free_pages == cache.num_pages, "a sequence holds pages"
        ids = sample_ids(
            self._sample_text_ids, self.config.vocab_size,
            min(PAGE_LEN, self.config.learned_positions or PAGE_LEN),
        )
        sample = KeySample(len(ids), advance)
        turns = {
            rope: MeanOverPositions(
                self.config.head_dim, frequencies[rope.index], rope.interleaved
            )
            for rope in self._parts.ropes()
        }
        for part, layer in zip(self._parts.layers, cache.layers, strict=True):
            rope = part.attention.rope
            sample.add(layer, self._ops[part.device], rope, None if rope is None else turns[rope])
        has_open_pages = cache.layers[0].num_open_pages > 0
        sequence = PagedSequence([0], rope_len=1, open_page=0 if has_open_pages else None)
        steps: dict[int, Step] = {}
        for first in range(0, len(ids), self.chunk_size):
            entry = sequence, ids[first : first + self.chunk_size]
            num_rows = len(entry[1])
            if num_rows not in steps:
                steps[num_rows] = self._record(num_rows, 1, "none", False, sample.recorder)
            self._run_step([entry], steps[num_rows])
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

    def start_rows(self, entries: Sequence[Entry], logits: LogitsMode = "last") -> LandedFlight:
        """Do the same; see `ForwardModel.start_rows`. On one machine the pass ends at once."""
        return LandedFlight(self.forward_rows(entries, logits))

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
        self._run_missing_firsts(entries)
        step = self._step(num_rows, len(entries), logits, top_logits)
        self._run_step(entries, step)
        return step.logits

    def _run_step(self, entries: Sequence[Entry], step: Step) -> None:
        """Run a recorded step of the entries' shape."""
        self._send_inputs(entries, step)
        if self._by_length:
            self._angles_by_length(entries)
        for stage_step in step.stages:
            stage_step.run()

    def _run_missing_firsts(self, entries: Sequence[Entry]) -> None:
        """Compute the first tokens that open pages lack, because a cache held the texts' beginning.

        A first token depends on nothing else, so it is a text of its own here.
        """
        firsts: list[Entry] = [
            (replace(sequence, past_len=0, missing_first=None), [sequence.missing_first])
            for sequence, _ in entries if sequence.missing_first is not None
        ]
        if firsts:
            self._run(firsts, "none", False)
            for sequence, _ in entries:
                sequence.missing_first = None

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
        """Load an adapter, which changes all later steps; see `Adapters.load`."""
        self._adapters.load(adapter, scaling)
        self._forget_steps()

    def unload_loras(self) -> None:
        """Unload all adapters."""
        self._adapters.clear()
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Record steps anew, because they have the calls of the adapters of their time."""
        for stage in self._stages:
            stage.cpu.finish()
        self._steps.clear()

    def with_cache(self, cache: PagedCache, ops: Mapping[str, DeviceOps] | None = None) -> Model:
        """Return the same model over another cache, to compare caches. It loads no adapters.

        The sample of the cache runs as in a model that is loaded with it.

        Both share weights and workspace: a call of one ends what the other's logits are
        valid for, and only one may run at a time.

        Args:
            cache: in place of the model's own; no sequence holds a page of it.
            ops: device -> operations in place of the model's own.
        """
        model = Model(
            self._parts, self._workspaces, cache, ops or self._ops,
            sample_text_ids=self._sample_text_ids, **self._rope_options,
        )
        # One record for both, because the frequencies of a slot are in the shared workspace;
        # the new model has just written them again.
        self._slot_rope_len[:] = model._slot_rope_len
        model._slot_rope_len = self._slot_rope_len
        return model

    def rope_class(self, rope_len: int) -> int:
        """Return a number that is the same for lengths with the same RoPE frequencies."""
        # A second RoPE does not depend on the length.
        return self.config.ropes[0].length_class(rope_len) if self.config.ropes else 0

    def _frequencies(self, rope: RopeConfig, rope_len: int) -> tuple[list[float], float]:
        """Return what `inv_freq` does, with the RoPE options.

        The options stretch the first RoPE only. Layers of a second one have a sliding window,
        whose distances do not grow with the text.
        """
        options = self._rope_options if rope is self.config.ropes[0] else {}
        return inv_freq(rope, rope_len, **options)

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
            pages, end = min(len(sequence.pages), self._max_pages), sequence.past_len + len(ids)
            if 0 < self.config.learned_positions < end:
                raise CacheFull(
                    "the model's table of positions",
                    expected=f"at most {self.config.learned_positions} tokens", actual=end,
                    remedy="Give a shorter prompt, or ask for fewer tokens",
                )
            if sequence.past_len + len(ids) > pages * PAGE_LEN:
                raise CacheFull(
                    "the key/value cache", expected=f"pages for {sequence.past_len + len(ids)} "
                    "tokens", actual=f"{pages * PAGE_LEN}", remedy="Load with a larger ctx_size",
                )

    def _send_inputs(self, entries: Sequence[Entry], step: Step) -> None:
        """Tell every device what it needs to know of the step."""
        for inputs in self._inputs:
            inputs.begin()
            self._write(inputs.arrays, entries)
        if self._by_length:
            self._write_frequencies(entries)
        longest = max(sequence.past_len + len(ids) for sequence, ids in entries)
        for stage_step, inputs in zip(step.stages, self._inputs, strict=True):
            stage_step.batch.max_total_len = longest
            inputs.send()

    def _write(self, arrays: Mapping[str, Array], entries: Sequence[Entry]) -> None:
        first = 0
        arrays["q_start"][0] = 0
        for slot, (sequence, ids) in enumerate(entries):
            past_len, end = sequence.past_len, first + len(ids)
            arrays["ids"][first:end] = ids
            arrays["positions"][first:end] = range(past_len, past_len + len(ids))
            arrays["q_start"][slot + 1] = end
            if "head_rows" in arrays:
                arrays["head_rows"][slot] = end - 1
            arrays["past_len"][slot] = past_len
            arrays["open_pages"][slot] = sequence.open_page or 0
            pages = sequence.pages[: self._max_pages]
            arrays["page_table"][slot, : len(pages)] = pages
            first = end

    def _write_frequencies(self, entries: Sequence[Entry]) -> None:
        for slot, (sequence, _) in enumerate(entries):
            if sequence.rope_len != self._slot_rope_len[slot]:
                for rope in self._by_length:
                    frequencies, _ = self._frequencies(rope.config, sequence.rope_len)
                    for inputs in self._inputs:
                        if rope.frequencies_name in inputs.arrays:
                            inputs.arrays[rope.frequencies_name][slot] = frequencies
                self._slot_rope_len[slot] = sequence.rope_len

    def _angles_by_length(self, entries: Sequence[Entry]) -> None:
        """Compute the angles of rows whose frequencies are those of their own sequence."""
        first = 0
        for slot, (_, ids) in enumerate(entries):
            end = first + len(ids)
            for stage in self._stages:
                stage.angles(first, end, slot)
            first = end

    def _step(
        self, num_rows: int, num_sequences: int, logits: LogitsMode, top_logits: bool
    ) -> Step:
        key = (num_rows, num_sequences, logits, top_logits)
        step = self._steps.pop(key, None)
        if step is None:
            if len(self._steps) >= MAX_STEPS:
                # The first one is the least recently used.
                self._steps.pop(next(iter(self._steps)))
            step = self._record(*key)
        self._steps[key] = step
        return step

    def _record(
        self, num_rows: int, num_sequences: int, logits: LogitsMode, top_logits: bool,
        new_recorder: Callable[[], Recorder] = Recorder,
    ) -> Step:
        rows = {"last": num_sequences, "all": num_rows, "none": 0}[logits]
        out = self._logits_on_device[:rows]
        stages: list[StageStep] = []
        for stage in self._stages:
            head = out if rows and stage is self._stages[-1] else None
            before = stages[-1] if stages else None
            sampled = self.sampled_vocab_size if top_logits and head is not None else 0
            stages.append(
                stage.record(num_rows, num_sequences, head, before, sampled, new_recorder())
            )
        return Step(tuple(stages), out)


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
