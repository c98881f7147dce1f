"""The layers that run on this machine: stages, what the CPU writes for a step, and its recordings.

A model on one machine has all of its layers here, with embedding and head. Where the layers are
on several machines, the first one has the embedding, its own layers and the head, and each of the
others has layers alone: what they work on is the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..backends.base import DeviceOps
from ..backends.recorder import Recorder
from ..cache.layout import CacheLayer
from ..cache.paging import PagedSequence
from ..checkpoint.rope import RopeConfig, inv_freq
from ..generation.forward_model import LogitsMode
from .assembly import ModelParts
from .key_feedback import MeanOverPositions
from .key_sample import KeySample
from .stages import Stage, StageStep

if TYPE_CHECKING:
    from ..backends.cpu_access import Array

# A sequence, and the ids that follow its `past_len` tokens.
Entry = tuple[PagedSequence, list[int]]

# Recorded steps that are kept. Decoding needs one a batch size; the others are the odd last
# chunks of prompts, which come again rarely and cost little compared with their own work.
MAX_STEPS = 32


class StepShape(NamedTuple):
    """What decides the operations of a step.

    Args:
        num_rows: rows of all sequences.
        num_sequences: how many these are.
        logits: the rows for which the head runs.
        top_vocab_size: the largest of so many logits of each row are found; 0 for none.
    """

    num_rows: int
    num_sequences: int
    logits: LogitsMode
    top_vocab_size: int


@dataclass(frozen=True)
class Step:
    """A recorded forward pass of one shape.

    Args:
        stages: each stage's operations.
        logits: float32 [rows, vocab_size] on the device of the head; no rows without one.
    """

    stages: tuple[StageStep, ...]
    logits: torch.Tensor


class LocalLayers:
    """The layers of a model on this machine. One thread at a time may run steps.

    Args:
        parts: of this machine, loaded.
        workspaces: device -> views of its `workspace_specs`, by name.
        cache_layers: those of the layers.
        ops: device -> its operations.
        alpha_value, compress_pos_emb: see `rope.inv_freq`.

    Attributes:
        chunk_size: most rows of a step.
        max_batch_size: most sequences of a step.
        max_pages: most pages of a sequence.
        hidden_size: width of the hidden state.
        stages: in the order of the layers.
        steps: those recorded, the least recently used first.

    Raises:
        InvalidSettings: alpha_value or compress_pos_emb out of range.
    """

    def __init__(
        self,
        parts: ModelParts,
        workspaces: Mapping[str, Mapping[str, torch.Tensor]],
        cache_layers: Sequence[CacheLayer],
        ops: Mapping[str, DeviceOps],
        *,
        alpha_value: float = 1.0,
        compress_pos_emb: float = 1.0,
    ) -> None:
        devices = parts.device_map.devices
        first, last = workspaces[devices[0]], workspaces[devices[-1]]
        self.chunk_size: int = first["ids"].shape[0]
        self.max_batch_size: int = first["past_len"].shape[0]
        self.max_pages: int = first["page_table"].shape[1]
        self.hidden_size = parts.config.hidden_size
        self.stages: list[Stage] = []
        self.steps: dict[StepShape, Step] = {}
        self._head_steps: dict[tuple[int, int], StageStep] = {}
        self._config, self._parts, self._ops = parts.config, parts, ops
        self._cache_layers = cache_layers
        self._alpha_value, self._compress_pos_emb = alpha_value, compress_pos_emb
        self._logits = last.get("logits", torch.empty(0, self._config.vocab_size))
        ropes = parts.ropes()
        tables = [self._frequencies(config, 1) for config in self._config.ropes]
        self._mean_frequencies = [frequencies for frequencies, _ in tables]
        rope_factors = [factor for _, factor in tables]
        first_layer = 0
        for on_device in parts.stages():
            end, device = first_layer + len(on_device.layers), on_device.device
            self.stages.append(
                Stage(on_device, cache_layers[first_layer:end], ops[device], workspaces[device],
                      rope_factors)
            )
            first_layer = end
        self._inputs = [stage.inputs for stage in self.stages]
        # What depends on the length is written again for each sequence.
        self._by_length = [rope for rope in ropes if rope.config.depends_on_length]
        for inputs in self._inputs:
            for rope in ropes:
                if rope.frequencies_name in inputs.arrays:
                    inputs.arrays[rope.frequencies_name][:] = tables[rope.index][0]
        self._slot_rope_len = [1] * self.max_batch_size

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, in the order of the layers."""
        return self._parts.device_map.devices

    @property
    def layer_numbers(self) -> range:
        """The model's numbers of the layers."""
        return self._parts.device_map.numbers

    @property
    def decode_rows(self) -> int:
        """Most ids of a sequence in one step that have the same bits as in steps of one id."""
        limits = (self._ops[device].decode_rows or self.chunk_size for device in self.devices)
        return min(self.chunk_size, *limits)

    def run(
        self,
        entries: Sequence[Entry],
        logits: LogitsMode,
        top_vocab_size: int = 0,
        hidden: torch.Tensor | None = None,
    ) -> Step:
        """Run a step of the entries, which have been checked. Does not advance them.

        Args:
            entries: at most `max_batch_size`, with at most `chunk_size` ids in all.
            logits: the rows for which the head runs; `none` where it is on another machine.
            top_vocab_size: as that of `StepShape`.
            hidden: float32 [ids, hidden_size] on the CPU, what the machine before has computed;
                None on the first one.

        Returns:
            The step, whose results are valid until the next one.
        """
        num_rows = sum(len(ids) for _, ids in entries)
        step = self._step(StepShape(num_rows, len(entries), logits, top_vocab_size))
        self._run(entries, step, hidden)
        return step

    def run_head(self, hidden: torch.Tensor, top_vocab_size: int = 0) -> torch.Tensor:
        """Run the head alone, on what the last machine has computed.

        Args:
            hidden: float32 [rows, hidden_size] on the CPU.
            top_vocab_size: as that of `StepShape`.

        Returns:
            float32 [rows, vocab_size] on the head's device, valid until the next step.
        """
        rows = len(hidden)
        logits = self._logits[:rows]
        step = self._head_steps.get((rows, top_vocab_size))
        if step is None:
            step = self.stages[-1].record_head(rows, logits, top_vocab_size, Recorder())
            self._head_steps[rows, top_vocab_size] = step
        step.cpu.receive(hidden, step.x)
        step.run()
        return logits

    def hidden(self, step: Step) -> npt.NDArray[np.float32]:
        """Wait for a step that was run, and return what its layers have computed.

        Returns:
            float32 [rows, hidden_size] on the CPU, valid until the next step.
        """
        last = step.stages[-1]
        return np.asarray(last.cpu.read(last.x), np.float32)

    def begin_sample(self, num_ids: int, advance: Callable[[int], None]) -> LayerSample:
        """Prepare the layers for the sample of `key_sample`, which finds how they store keys.

        Args:
            num_ids: length of the sample, which may run in several steps.
            advance: is told of each layer that is done.
        """
        sample = KeySample(num_ids, advance)
        turns = {
            rope: MeanOverPositions(
                self._config.head_dim, self._mean_frequencies[rope.index], rope.interleaved
            )
            for rope in self._parts.ropes()
        }
        for part, layer in zip(self._parts.layers, self._cache_layers, strict=True):
            rope = part.attention.rope
            sample.add(layer, self._ops[part.device], rope, None if rope is None else turns[rope])
        return LayerSample(self, sample)

    def forget_steps(self) -> None:
        """Record steps anew, because they have the calls of the adapters of their time."""
        self.finish()
        self.steps.clear()
        self._head_steps.clear()

    def finish(self) -> None:
        """Wait for all devices. Another thread may run the next steps."""
        for stage in self.stages:
            stage.cpu.finish()

    def share_inputs(self, other: LocalLayers) -> None:
        """Use one record of what the workspace has, which `other` shares and has just written."""
        self._slot_rope_len[:] = other._slot_rope_len
        other._slot_rope_len = self._slot_rope_len

    def _run(
        self, entries: Sequence[Entry], step: Step, hidden: torch.Tensor | None = None
    ) -> None:
        """Run a recorded step of the entries' shape."""
        self._send_inputs(entries, step)
        if self._by_length:
            self._angles_by_length(entries)
        if hidden is not None:
            first = step.stages[0]
            first.cpu.receive(hidden, first.x)
        for stage_step in step.stages:
            stage_step.run()

    def _frequencies(self, rope: RopeConfig, rope_len: int) -> tuple[list[float], float]:
        """Return what `inv_freq` does, with the RoPE options.

        The options stretch the first RoPE only. Layers of a second one have a sliding window,
        whose distances do not grow with the text.
        """
        if rope is not self._config.ropes[0]:
            return inv_freq(rope, rope_len)
        return inv_freq(
            rope, rope_len, alpha_value=self._alpha_value,
            compress_pos_emb=self._compress_pos_emb,
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
            pages = sequence.pages[: self.max_pages]
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
            for stage in self.stages:
                stage.angles(first, end, slot)
            first = end

    def _step(self, shape: StepShape) -> Step:
        step = self.steps.pop(shape, None)
        if step is None:
            if len(self.steps) >= MAX_STEPS:
                # The first one is the least recently used.
                self.steps.pop(next(iter(self.steps)))
            step = self._record(shape, Recorder)
        self.steps[shape] = step
        return step

    def _record(self, shape: StepShape, new_recorder: Callable[[], Recorder]) -> Step:
        rows = {"last": shape.num_sequences, "all": shape.num_rows, "none": 0}[shape.logits]
        out = self._logits[:rows]
        stages: list[StageStep] = []
        for stage in self.stages:
            head = out if rows and stage is self.stages[-1] else None
            before = stages[-1] if stages else None
            top_vocab_size = shape.top_vocab_size if head is not None else 0
            stages.append(
                stage.record(shape.num_rows, shape.num_sequences, head, before, top_vocab_size,
                             new_recorder())
            )
        return Step(tuple(stages), out)


class LayerSample:
    """The sample on its way through layers. Made by `LocalLayers.begin_sample`."""

    def __init__(self, layers: LocalLayers, sample: KeySample) -> None:
        self._layers, self._sample = layers, sample
        self._steps: dict[int, Step] = {}

    def run(self, entry: Entry, hidden: torch.Tensor | None = None) -> Step:
        """Run the next ids of the sample; arguments and result as those of `LocalLayers.run`."""
        num_rows = len(entry[1])
        if num_rows not in self._steps:
            shape = StepShape(num_rows, 1, "none", 0)
            self._steps[num_rows] = self._layers._record(shape, self._sample.recorder)
        self._layers._run([entry], self._steps[num_rows], hidden)
        return self._steps[num_rows]

    def finish(self) -> None:
        """Write what all ids together have shown."""
        self._sample.finish()
