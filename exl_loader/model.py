"""The forward pass: rows of one or several sequences in, logits out, inside the workspace.

A step's operations are recorded once a shape and replayed. On a device that can, those of a
short step, such as decoding, are captured as one graph, which is then a single launch: what
changes from step to step stands in the inputs, so a graph serves any length of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .blueprint import Blueprint
from .cache import PAGE_LEN, KeyBias
from .errors import CacheFull, InvalidSettings
from .kernels.host import Host, host_of
from .kernels.interface import Batch, Ops
from .key_bias import take_key_bias
from .layers import Call, Recorder, attention_shape, build_layer, decoder_layer
from .paging import PagedCache, Sequence
from .rope import inv_freq
from .weights import Weights
from .workspace import INPUTS, RowViews

LogitsMode = Literal["last", "all", "none"]

# Recorded steps that are kept. Decoding needs one a batch size; the others are the odd last
# chunks of prompts, which come again rarely and cost little beside their own work.
MAX_STEPS = 32

# Steps of more rows keep a device busy for longer than it takes to issue them one by one.
GRAPH_ROWS = 32


@dataclass
class Step:
    """A recorded forward pass of one shape: run it, then read `logits`.

    Args:
        calls: the operations in order.
        batch: what they see of the sequences.
        logits: where they leave the logits.
        capturable: whether a graph may take their place, once they have run.
    """

    calls: list[Call]
    batch: Batch
    logits: torch.Tensor
    capturable: bool
    graph: Call | None = None
    has_run: bool = False

    def issue(self) -> None:
        """Issue every operation."""
        for call in self.calls:
            call()

    def run(self, host: Host) -> None:
        """Run the operations, from the second time on as a graph where that can be.

        The first time they run one by one, so that whatever loads late is loaded then.
        """
        if self.graph is None and self.capturable and self.has_run:
            self.graph = host.capture(self.issue)
            self.capturable = self.graph is not None
        if self.graph is not None:
            self.graph()
        else:
            self.issue()
        self.has_run = True


class Model:
    """A loaded model. One thread at a time may call `forward`.

    Args:
        blueprint: what the model is; all of it on one device.
        weights: its weights.
        workspace: views of `workspace_specs`, by name.
        cache: the key/value cache.
        ops: the operations.
        alpha_value, compress_pos_emb: see `rope.inv_freq`.

    Raises:
        InvalidSettings: alpha_value or compress_pos_emb out of range.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        weights: Weights,
        workspace: Mapping[str, torch.Tensor],
        cache: PagedCache,
        ops: Ops,
        *,
        alpha_value: float = 1.0,
        compress_pos_emb: float = 1.0,
    ):
        assert len(blueprint.device_map.devices) == 1, "one device a model"
        self.config = blueprint.config
        self.chunk_size = workspace["ids"].shape[0]
        self.max_batch_size = workspace["past_len"].shape[0]
        self.logits_rows = workspace["logits"].shape[0]
        self._blueprint, self._weights = blueprint, weights
        self._ops = ops
        self._workspace = workspace
        if weights.key_biases is None:
            weights.key_biases = self._take_key_biases()
        for layer, key_bias in zip(cache.layers, weights.key_biases, strict=True):
            layer.key_bias = key_bias
        tables = workspace.get("expert_tables", [None] * len(cache.layers))
        self._layers = [
            build_layer(blueprint, i, weights, layer, ops, tables[i])
            for i, layer in enumerate(cache.layers)
        ]
        self._norm = weights.norms[blueprint.norm.spec.name]
        self._head = weights.linears[blueprint.head.name]
        self._embedding = weights.embedding
        # In float32, as transformers computes it for float32 weights; a model that runs in
        # bfloat16 there has this factor rounded to bfloat16.
        scaled = blueprint.architecture.embed_scale
        self._embed_factor = self.config.hidden_size**0.5 if scaled else 1.0
        self._host = host_of(ops)
        self._inputs = self._host.inputs({name: workspace[name] for name in INPUTS})
        self._logits = self._host.mirror(workspace["logits"])
        self._rope_options = {"alpha_value": alpha_value, "compress_pos_emb": compress_pos_emb}
        frequencies, self._rope_factor = inv_freq(self.config.rope, 1, **self._rope_options)
        self._inputs.arrays["inv_freq"][:] = frequencies
        self._slot_rope_len = [1] * self.max_batch_size
        self._steps: dict[tuple[int, int, LogitsMode], Step] = {}

    def forward(
        self,
        entries: SequenceOf[tuple[Sequence, list[int]]],
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
        lengths = [len(ids) for _, ids in entries]
        num_rows = sum(lengths)
        assert 0 < len(entries) <= self.max_batch_size and num_rows <= self.chunk_size
        assert logits != "all" or num_rows <= self.logits_rows
        self._check(entries)
        step = self._step(num_rows, len(entries), logits)
        self._inputs.begin()
        self._write_inputs(entries, step)
        self._inputs.send()
        if self.config.rope.depends_on_length:
            self._angles_by_length(entries)
        step.run(self._host)
        out = self._logits[: len(step.logits)]
        if len(out):
            self._host.collect(step.logits, out)
        for (sequence, _), length in zip(entries, lengths, strict=True):
            sequence.past_len += length
        return out

    def _take_key_biases(self) -> list[KeyBias | None]:
        """Take large key biases out of the projections, for attention to add."""
        linears, norms = self._weights.linears, self._weights.norms
        half, scratch = self.config.rope.rotary_dim // 2, self._workspace["scratch"]
        return [
            # A norm behind the bias makes more of it than a constant.
            None if plan.k_norm is not None else take_key_bias(
                self._ops, linears[plan.k.name], norms[plan.attn_input_norm.spec.name],
                self.config.rms_norm_eps, attention_shape(self.config, i), half, scratch,
            )
            for i, plan in enumerate(self._blueprint.layers)
        ]  # fmt: skip

    def with_cache(self, cache: PagedCache, ops: Ops | None = None) -> Model:
        """Return the same model over another cache, to compare caches.

        Both share weights and workspace: a call of one ends what the other's logits are
        valid for, and only one may run at a time.

        Args:
            cache: in place of the model's own.
            ops: operations in place of the model's own, on the same device.
        """
        return Model(
            self._blueprint, self._weights, self._workspace, cache, ops or self._ops,
            **self._rope_options,
        )

    def rope_class(self, rope_len: int) -> int:
        """Return a number that is the same for lengths with the same RoPE frequencies."""
        return self.config.rope.length_class(rope_len)

    def _check(self, entries: SequenceOf[tuple[Sequence, list[int]]]) -> None:
        """Refuse what would make an operation read or write outside its tensors."""
        vocab_size = self.config.vocab_size
        max_pages = self._inputs.arrays["page_table"].shape[1]
        for sequence, ids in entries:
            if not ids or min(ids) < 0 or max(ids) >= vocab_size:
                raise InvalidSettings(
                    "token ids", expected=f"one or more from 0 to {vocab_size - 1}",
                    actual=f"{min(ids)} to {max(ids)}" if ids else "none",
                    remedy="The prompt may come from another model's tokenizer",
                )
            pages = min(len(sequence.pages), max_pages)
            if sequence.past_len + len(ids) > pages * PAGE_LEN:
                raise CacheFull(
                    "the key/value cache", expected=f"pages for {sequence.past_len + len(ids)} "
                    "tokens", actual=f"{pages * PAGE_LEN}", remedy="Load with a larger ctx_size",
                )

    def _write_inputs(self, entries: SequenceOf[tuple[Sequence, list[int]]], step: Step) -> None:
        host, first, longest = self._inputs.arrays, 0, 0
        max_pages = host["page_table"].shape[1]
        host["q_start"][0] = 0
        for slot, (sequence, ids) in enumerate(entries):
            past_len, end = sequence.past_len, first + len(ids)
            host["ids"][first:end] = ids
            host["positions"][first:end] = range(past_len, past_len + len(ids))
            host["q_start"][slot + 1] = end
            host["head_rows"][slot] = end - 1
            host["past_len"][slot] = past_len
            pages = sequence.pages[:max_pages]
            host["page_table"][slot, : len(pages)] = pages
            longest = max(longest, past_len + len(ids))
            first = end
        step.batch.max_total_len = longest
        if self.config.rope.depends_on_length:
            self._write_frequencies(entries)

    def _write_frequencies(self, entries: SequenceOf[tuple[Sequence, list[int]]]) -> None:
        for slot, (sequence, _) in enumerate(entries):
            if sequence.rope_len != self._slot_rope_len[slot]:
                frequencies, _ = inv_freq(
                    self.config.rope, sequence.rope_len, **self._rope_options
                )
                self._inputs.arrays["inv_freq"][slot] = frequencies
                self._slot_rope_len[slot] = sequence.rope_len

    def _angles_by_length(self, entries: SequenceOf[tuple[Sequence, list[int]]]) -> None:
        """Compute the angles of rows whose frequencies are those of their own sequence.

        Which rows these are depends on the sequences' lengths, so it is no part of a recording.
        """
        w, first = self._workspace, 0
        for slot, (_, ids) in enumerate(entries):
            end = first + len(ids)
            self._ops.rope_table(w["positions"][first:end], w["inv_freq"][slot],
                                 self._rope_factor, w["rope_table"][first:end])
            first = end

    def _step(self, num_rows: int, num_sequences: int, logits: LogitsMode) -> Step:
        key = (num_rows, num_sequences, logits)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_STEPS:
                self._steps.pop(next(iter(self._steps)))
            step = self._steps[key] = self._record(num_rows, num_sequences, logits)
        return step

    def _record(self, num_rows: int, num_sequences: int, logits: LogitsMode) -> Step:
        w, ops = self._workspace, Recorder(self._ops)
        views = RowViews.cut(w, num_rows, self.config.head_dim)
        batch = Batch(
            positions=w["positions"][:num_rows],
            q_start=w["q_start"][: num_sequences + 1],
            past_len=w["past_len"][:num_sequences],
            page_table=w["page_table"][:num_sequences],
            max_total_len=0,
            inv_freq=w["inv_freq"][:num_sequences],
            rope_factor=self._rope_factor,
        )
        # Through __getattr__, hence Any: the recorder has every operation of its Ops.
        recorder: Any = ops
        if not self.config.rope.depends_on_length:
            recorder.rope_table(w["positions"][:num_rows], w["inv_freq"][0], self._rope_factor,
                                views.rope_table)
        recorder.embed(w["ids"][:num_rows], self._embedding, self._embed_factor, views.x)
        for layer in self._layers:
            decoder_layer(recorder, layer, views, batch)
        rows = {"last": num_sequences, "all": num_rows, "none": 0}[logits]
        out = w["logits"][:rows]
        if rows:
            self._record_head(recorder, views, rows, out)
        capturable = self._host.captures and num_rows <= GRAPH_ROWS and not ops.reads_values
        return Step(ops.calls, batch, out, capturable)

    def _record_head(self, ops: Any, views: RowViews, rows: int, out: torch.Tensor) -> None:
        w, x = self._workspace, views.x
        head_x = w["head_x"][:rows]
        if rows != x.shape[0]:
            ops.gather_rows(x, w["head_rows"][:rows], head_x)
            x = head_x
        ops.rms_norm(x, self._norm, self.config.rms_norm_eps, head_x)
        ops.linear(head_x, self._head, out, w["scratch"])
        if self.config.final_logit_softcapping:
            ops.softcap(out, self.config.final_logit_softcapping)
