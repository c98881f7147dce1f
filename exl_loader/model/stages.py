"""A model in stages, one a device: neighbouring layers that run where they lie.

The hidden state goes from stage to stage, the embedding stands before the first and the head
behind the last. A model on one device is one stage. A stage's operations are recorded once a
shape and replayed; on a device that can, those of a short step, such as decoding, are captured
as one graph, which is then a single launch: what changes from step to step stands in the
stage's inputs, so a graph serves any length of the texts.

A stage starts when the hidden state has come (`Host.receive`), and nothing else joins devices:
while one of them runs a chunk of a prompt, the one before it runs the next chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..backends.base import Batch, Ops
from ..backends.host import Host, host_of
from ..cache.layout import CacheLayer, KeyBias
from .blueprint import Blueprint
from .key_bias import take_key_bias
from .layers import Call, Recorder, attention_shape, build_layer, decoder_layer
from .weights import Weights
from .workspace import INPUTS, RowViews

# Steps of more rows keep a device busy for longer than it takes to issue them one by one.
GRAPH_ROWS = 32


@dataclass
class StageStep:
    """A stage's recorded operations for steps of one shape.

    Args:
        calls: the operations in order.
        batch: what they see of the sequences.
        x: float32 [T, hidden_size], the hidden state that they leave.
        host: of the stage's device.
        receive: brings the hidden state from the stage before; None in the first.
        capturable: whether a graph may take the place of `calls`, once they have run.
    """

    calls: list[Call]
    batch: Batch
    x: torch.Tensor
    host: Host
    receive: Call | None
    capturable: bool
    graph: Call | None = None
    has_run: bool = False

    def run(self) -> None:
        """Run the operations, from the second time on as a graph where that can be.

        The first time they run one by one, so that whatever loads late is loaded then. What
        comes from another device is no part of a graph, which belongs to one.
        """
        if self.receive is not None:
            self.receive()
        if self.graph is None and self.capturable and self.has_run:
            self.graph = self.host.capture(partial(_issue, self.calls))
            # A capture that failed is tried again at the next step.
            self.capturable = self.graph is not None or self.host.captures
        if self.graph is not None:
            self.graph()
        else:
            _issue(self.calls)
        self.has_run = True


def _issue(calls: SequenceOf[Call]) -> None:
    for call in calls:
        call()


class Stage:
    """What of a model runs on one device.

    Args:
        blueprint, weights, cache_layers: the whole model's.
        device: the stage's, a key of the device map.
        ops: the device's operations.
        workspace: views of the device's `workspace_specs`, by name.
        rope_factor: see `rope.inv_freq`.

    Attributes:
        inputs: what the host writes for a step.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        device: str,
        weights: Weights,
        cache_layers: SequenceOf[CacheLayer],
        ops: Ops,
        workspace: Mapping[str, torch.Tensor],
        rope_factor: float,
    ) -> None:
        config, where = blueprint.config, blueprint.device_map
        self.ops, self.workspace, self.host = ops, workspace, host_of(ops)
        self.inputs = self.host.inputs(
            {name: workspace[name] for name in INPUTS if name in workspace}
        )
        self._config, self._rope_factor = config, rope_factor
        indices = [i for i, on in enumerate(where.layers) if on == device]
        tables = workspace.get("expert_tables", [None] * len(indices))
        self._layers = [
            build_layer(blueprint, index, weights, cache_layers[index], ops, table)
            for index, table in zip(indices, tables, strict=True)
        ]
        self._embedding = weights.embedding if device == where.embed else None
        self._norm = weights.norms[blueprint.norm.spec.name]
        self._head = weights.linears[blueprint.head.name]
        # In float32, as transformers computes it for float32 weights; a model that runs in
        # bfloat16 there has this factor rounded to bfloat16.
        self._embed_factor = config.hidden_size**0.5 if blueprint.architecture.embed_scale else 1.0

    def angles(self, first: int, end: int, slot: int) -> None:
        """Compute the angles of a step's rows first..end with a sequence's own frequencies.

        Which rows these are depends on the sequences' lengths, so it is no part of a recording.
        """
        w = self.workspace
        self.ops.rope_table(w["positions"][first:end], w["inv_freq"][slot], self._rope_factor,
                            w["rope_table"][first:end])

    def record(
        self, num_rows: int, num_sequences: int, logits: torch.Tensor | None,
        before: StageStep | None, sampled_vocab_size: int = 0,
    ) -> StageStep:
        """Record the stage's operations for steps of one shape.

        Args:
            num_rows: T, rows of all sequences. num_sequences: how many these are.
            logits: float32 [rows, vocab_size] of the workspace, for the head: a row for every
                row of the step, or else for each of `head_rows`; None to run no head.
            before: the same step's part on the device before; None where there is none.
            sampled_vocab_size: find the largest of so many logits of each row; 0 for no.
        """
        w, views = self.workspace, RowViews.cut(self.workspace, num_rows, self._config.head_dim)
        batch = Batch(
            positions=w["positions"][:num_rows],
            q_start=w["q_start"][: num_sequences + 1],
            past_len=w["past_len"][:num_sequences],
            page_table=w["page_table"][:num_sequences],
            max_total_len=0,
            inv_freq=w["inv_freq"][:num_sequences],
            rope_factor=self._rope_factor,
        )
        # Any: it has every operation of its Ops, through __getattr__.
        recorder: Any = Recorder(self.ops)
        if not self._config.rope.depends_on_length:
            recorder.rope_table(w["positions"][:num_rows], w["inv_freq"][0], self._rope_factor,
                                views.rope_table)
        receive = None
        if before is None:
            recorder.embed(w["ids"][:num_rows], self._embedding, self._embed_factor, views.x)
        else:
            receive = partial(self.host.receive, before.x, views.x)
        for layer in self._layers:
            decoder_layer(recorder, layer, views, batch)
        if logits is not None:
            self._record_head(recorder, views.x, logits, sampled_vocab_size)
        capturable = (
            self.host.captures and num_rows <= GRAPH_ROWS and not recorder.reads_values
        )
        return StageStep(recorder.calls, batch, views.x, self.host, receive, capturable)

    def _record_head(
        self, ops: Any, x: torch.Tensor, logits: torch.Tensor, sampled_vocab_size: int
    ) -> None:
        w, rows = self.workspace, logits.shape[0]
        head_x = w["head_x"][:rows]
        if rows != x.shape[0]:
            ops.gather_rows(x, w["head_rows"][:rows], head_x)
            x = head_x
        ops.rms_norm(x, self._norm, self._config.rms_norm_eps, head_x)
        ops.linear(head_x, self._head, logits, w["scratch"])
        if self._config.final_logit_softcapping:
            ops.softcap(logits, self._config.final_logit_softcapping)
        if sampled_vocab_size:
            ops.top_logits(logits, sampled_vocab_size, w["top_logits"][:rows], w["scratch"])


def take_key_biases(
    blueprint: Blueprint, weights: Weights, ops: Mapping[str, Ops],
    workspaces: Mapping[str, Mapping[str, torch.Tensor]],
) -> list[KeyBias | None]:
    """Take each layer's large key biases out of its projection, for attention to add.

    Args:
        ops, workspaces: by device.
    """
    config, half = blueprint.config, blueprint.config.rope.rotary_dim // 2
    rooms = {device: iter(views.get("key_biases", ())) for device, views in workspaces.items()}
    taken: list[KeyBias | None] = []
    for index, plan in enumerate(blueprint.layers):
        room = next(rooms[plan.device], None)
        # A norm behind the bias makes more of it than a constant.
        taken.append(None if room is None or plan.k_norm is not None else take_key_bias(
            ops[plan.device], weights.linears[plan.k.name],
            weights.norms[plan.attn_input_norm.spec.name], config.rms_norm_eps,
            attention_shape(config, index), half, workspaces[plan.device], room,
        ))  # fmt: skip
    return taken
