"""The stages of a model: consecutive layers that run on one device.

The hidden state goes from stage to stage. The embedding is part of the first stage and the head
of the last one of a machine; a model on one device is one stage. A stage records its operations
once for each shape of a step and replays them. Devices that can capture the operations of a short
step, such as decoding, as one graph, which is then a single launch. Everything that changes from
step to step is in the stage's inputs, so a graph serves sequences of any length.

A stage starts when it has the hidden state (`CpuAccess.receive`). Devices wait for nothing else
of each other, so the first device runs the next chunk of a prompt while the second runs this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial

import torch

from ..backends.base import Batch, DeviceOps
from ..backends.cpu_access import CpuAccess
from ..backends.recorder import Recorder
from ..cache.layout import CacheLayer
from .assembly import StageParts
from .parts.experts import Experts
from .parts.part import LayerState, StepViews
from .step import INPUTS

# Steps of more rows keep a device busy for longer than it takes to issue them one by one.
GRAPH_ROWS = 32

Run = Callable[[], None]


@dataclass
class StageStep:
    """A stage's recorded operations for steps of one shape.

    Args:
        calls: the operations in order.
        batch: what they see of the sequences.
        x: float32 [T, hidden_size], the hidden state that they leave.
        cpu: access to the stage's device.
        receive: brings the hidden state from the stage before; None in the first.
        capturable: whether a graph may take the place of `calls`, once they have run.
    """

    calls: list[Run]
    batch: Batch
    x: torch.Tensor
    cpu: CpuAccess
    receive: Run | None
    capturable: bool
    graph: Run | None = None
    has_run: bool = False

    def run(self) -> None:
        """Run the operations, from the second time on as a graph where that can be.

        The first time they run one by one, so that whatever loads late is loaded then. What
        comes from another device is no part of a graph, which belongs to one.
        """
        if self.receive is not None:
            self.receive()
        if self.graph is None and self.capturable and self.has_run:
            self.graph = self.cpu.capture(partial(_issue, self.calls))
            # A capture that failed is tried again at the next step.
            self.capturable = self.graph is not None or self.cpu.captures
        if self.graph is not None:
            self.graph()
        else:
            _issue(self.calls)
        self.has_run = True


def _issue(calls: SequenceOf[Run]) -> None:
    for call in calls:
        call()


class Stage:
    """What of a model runs on one device.

    Args:
        parts: the device's parts, loaded.
        cache_layers: those of the parts' layers.
        ops: the device's operations.
        workspace: views of the device's `workspace_specs`, by name.
        rope_factors: of each of `ModelConfig.ropes`; see `rope.inv_freq`.

    Attributes:
        inputs: what the CPU writes for a step.
    """

    def __init__(
        self,
        parts: StageParts,
        cache_layers: SequenceOf[CacheLayer],
        ops: DeviceOps,
        workspace: Mapping[str, torch.Tensor],
        rope_factors: SequenceOf[float],
    ) -> None:
        self.ops, self.workspace, self.cpu = ops, workspace, ops.cpu_access
        self.inputs = self.cpu.inputs(
            {name: workspace[name] for name in INPUTS if name in workspace}
        )
        self._parts, self._rope_factors, self._ropes = parts, rope_factors, parts.ropes()
        self._take_key_biases()
        tables = workspace.get("expert_tables", [None] * len(parts.layers))
        self._layers = []
        for layer, cache, table in zip(parts.layers, cache_layers, tables, strict=True):
            cache.key_bias = layer.attention.key_bias
            if not (layer.attention.may_add_bias and ops.adds_key_bias):
                cache.key_mean = None
            experts = None
            if table is not None and isinstance(layer.mlp, Experts):
                experts = layer.mlp.tables(ops, table)
            self._layers.append((layer, LayerState(cache, experts)))

    def _take_key_biases(self) -> None:
        """Take each layer's large key bias out of its projection, for attention to add."""
        layers = self._parts.layers
        rooms = self.workspace.get("key_biases", [None] * len(layers))
        for layer, room in zip(layers, rooms, strict=True):
            if room is not None:
                layer.attention.take_key_bias(
                    self.ops, layer.attn_input_norm, self.workspace, room
                )

    def angles(self, first: int, end: int, slot: int) -> None:
        """Compute the angles of a step's rows first..end with a sequence's own frequencies.

        Which rows these are depends on the sequences' lengths, so it is no part of a recording.
        """
        w = self.workspace
        for rope in self._ropes:
            if rope.config.depends_on_length:
                self.ops.rope_table(
                    w["positions"][first:end], w[rope.frequencies_name][slot],
                    self._rope_factors[rope.index], w[rope.table_name][first:end],
                )

    def record(
        self, num_rows: int, num_sequences: int, logits: torch.Tensor | None,
        before: StageStep | None, sampled_vocab_size: int, recorder: Recorder,
    ) -> StageStep:
        """Record the stage's operations for steps of one shape.

        Args:
            num_rows: T, rows of all sequences. num_sequences: how many these are.
            logits: float32 [rows, vocab_size] of the workspace, for the head: a row for every
                row of the step, or else for each of `head_rows`; None to run no head.
            before: the same step on the device before; None in the first stage. Without it and
                without an embedding, the hidden state comes from another machine, and the caller
                brings it to `StageStep.x`.
            sampled_vocab_size: find the largest of so many logits of each row; 0 for no.
            recorder: collects the operations, and may add some of its own.
        """
        w = self.workspace
        views = self._views(num_rows, num_sequences)
        for rope in self._ropes:
            if not rope.config.depends_on_length:
                factor = self._rope_factors[rope.index]
                rope.run(recorder, views, w[rope.frequencies_name][0], factor)
        receive = None
        if before is not None:
            receive = partial(self.cpu.receive, before.x, views.x)
        elif self._parts.embedding is not None:
            self._parts.embedding.run(recorder, w["ids"][:num_rows], views.x, views.scratch)
            if self._parts.positions is not None:
                self._parts.positions.run(recorder, views)
        for layer, state in self._layers:
            layer.run(recorder, views, state)
        if logits is not None:
            self._record_head(recorder, views, logits, sampled_vocab_size)
        return self._prepared(views, receive, recorder)

    def record_head(
        self, num_rows: int, logits: torch.Tensor, sampled_vocab_size: int, recorder: Recorder
    ) -> StageStep:
        """Record the head alone, for `num_rows` rows that the caller brings to `StageStep.x`.

        Args:
            logits, sampled_vocab_size, recorder: as those of `record`.
        """
        views = self._views(num_rows, 0)
        self._record_head(recorder, views, logits, sampled_vocab_size)
        return self._prepared(views, None, recorder)

    def _views(self, num_rows: int, num_sequences: int) -> StepViews:
        """Return the workspace, cut to a step."""
        w = self.workspace
        batch = Batch(
            positions=w["positions"][:num_rows],
            q_start=w["q_start"][: num_sequences + 1],
            past_len=w["past_len"][:num_sequences],
            page_table=w["page_table"][:num_sequences],
            max_total_len=0,
            # The first RoPE's, with which attention adds key biases.
            inv_freq=w["inv_freq"][:num_sequences] if "inv_freq" in w else None,
            rope_factor=self._rope_factors[0] if self._rope_factors else 1.0,
            open_pages=w["open_pages"][:num_sequences],
        )
        return StepViews(w, batch, self._parts.config.hidden_size)

    def _prepared(
        self, views: StepViews, receive: Run | None, recorder: Recorder
    ) -> StageStep:
        """Return what was recorded as a step."""
        capturable = (
            self.cpu.captures and views.rows <= GRAPH_ROWS and not recorder.reads_values
        )
        calls = self.ops.prepare(recorder.calls)
        return StageStep(calls, views.batch, views.x, self.cpu, receive, capturable)

    def _record_head(
        self, recorder: Recorder, views: StepViews, logits: torch.Tensor, sampled_vocab_size: int
    ) -> None:
        assert self._parts.head is not None
        w, rows = self.workspace, logits.shape[0]
        chosen = None if rows == views.rows else w["head_rows"][:rows]
        self._parts.head.run(recorder, views, chosen, logits)
        if sampled_vocab_size:
            recorder.top_logits(logits, sampled_vocab_size, w["top_logits"][:rows], w["scratch"])
