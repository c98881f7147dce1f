"""The sample: a short text from which a model learns, when it is loaded, how to store its keys.

A checkpoint does not say how its queries and keys are distributed, and a cache of 6, 4 or 3 bits
stores keys better with that: rounded with feedback (`key_feedback`), and without their mean
(`key_mean`). So a short text runs through the model as soon as it is loaded. The keys of each layer
are read as they reach RoPE, and its queries as they reach attention. A model without a tokenizer
runs random ids instead, which do a little less well: what counts is which channels are large.

Nothing of the text stays: no sequence holds its page, no page is known by its content, and its
steps are not kept. What is computed from it takes no memory of the device but what the plan has for
the results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..backends.recorder import Recorder
from ..utils.system.processors import torch_on_one_thread
from .key_feedback import MeanOverPositions, layer_feedback
from .key_mean import KeySums, store_mean

if TYPE_CHECKING:
    from ..backends.base import AttentionShape, Batch, DeviceOps
    from ..cache.layout import CacheLayer
    from .parts.rope import Rope

# Prose, speech, code and a list, some 80 tokens. On SmolLM2 twice as many are no better.
SAMPLE_TEXT = '''\
The old harbour was quiet that morning, except for two gulls and a man who mended a net. \
"How long will it take?" she asked.

def area(width, height):
    """Return the area of a rectangle."""
    return width * height

1. Boil 250 ml of water.
2. Add the rice; wait 12 minutes.'''
# Tokenizers differ: the text is cut after so many ids, and not used if it has fewer than so many.
MOST_TEXT_IDS, FEWEST_TEXT_IDS = 128, 32

# Random ids of a sample without a text.
SAMPLE_LEN = 64
# The first ids of most vocabularies are for padding, unknown words, and begin and end of a text.
FIRST_ID = 3
SEED = 15


def sample_ids(text_ids: Sequence[int], vocab_size: int, most: int) -> list[int]:
    """Return the ids of the sample, the same in every call.

    Args:
        text_ids: of `SAMPLE_TEXT`; random ids are taken where these are few, because the tokenizer
            knows hardly any of it, or there is none.
        vocab_size: ids are below it.
        most: tokens that the model and its cache have room for.
    """
    known = [token_id for token_id in text_ids if token_id < vocab_size][:MOST_TEXT_IDS]
    if len(known) >= FEWEST_TEXT_IDS:
        return known[:most]
    first = FIRST_ID if vocab_size >= SAMPLE_LEN else 0
    # `random` gives the same numbers in all versions of Python; `randrange` need not.
    numbers = random.Random(SEED)
    return [
        first + int(numbers.random() * (vocab_size - first))
        for _ in range(min(SAMPLE_LEN, most))
    ]


@dataclass(eq=False)
class _SampledLayer:
    """What a sample has shown of a layer.

    Args:
        layer: its cache.
        ops: its device's operations.
        rope: of its queries and keys; None where it has none.
        turns: of its RoPE; None without RoPE.
        queries: those seen so far, float32 [rows, heads, head_dim] each.
        keys: sums over the keys seen so far; None where the layer stores its keys whole.
    """

    layer: CacheLayer
    ops: DeviceOps
    rope: Rope | None
    turns: MeanOverPositions | None
    queries: list[torch.Tensor] = field(default_factory=list)
    keys: KeySums | None = None

    def clear(self) -> None:
        """Set matrices and mean to zero: keys are stored without feedback, and whole."""
        for tensor in (self.layer.key_feedback, self.layer.key_mean):
            if tensor is not None:
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                self.ops.cpu_access.write(tensor, zeros.numpy())

    def store_feedback(self) -> None:
        """Write the matrices of the queries."""
        assert self.layer.key_feedback is not None
        matrices = torch.empty(self.layer.key_feedback.shape, dtype=torch.float16)
        with torch_on_one_thread():
            layer_feedback(torch.cat(self.queries), matrices, self.turns)
        self.queries.clear()
        self.ops.cpu_access.write(self.layer.key_feedback, matrices.numpy())

    def store_mean(self) -> None:
        """Write the mean of the keys; the layer's later keys are stored without it."""
        if self.keys is not None and self.rope is not None:
            store_mean(self.layer, self.keys, self.rope.pairs, self.ops.cpu_access)


class KeySample:
    """Collects keys and queries of the sample, and writes what follows from them.

    While the sample runs, its own keys are stored without feedback and with their mean, so that a
    second sample finds the same.

    Args:
        num_ids: length of the sample, which may run in several steps.
        advance: is told 1 for each layer whose matrices have been written.
    """

    def __init__(self, num_ids: int, advance: Callable[[int], None]) -> None:
        self._num_ids, self._advance = num_ids, advance
        self._layers: dict[int, _SampledLayer] = {}
        self._layers_by_mean: dict[int, CacheLayer] = {}

    def add(self, layer: CacheLayer, ops: DeviceOps, rope: Rope | None,
            turns: MeanOverPositions | None) -> None:
        """Add a layer, which has a `key_feedback`.

        Args:
            layer: its cache.
            ops: its device's operations.
            rope: its RoPE, and `turns` the mean over its turns; None without RoPE.
        """
        keys = None if layer.key_mean is None else KeySums(*layer.key_mean.shape)
        sampled = self._layers[id(layer)] = _SampledLayer(layer, ops, rope, turns, keys=keys)
        sampled.clear()
        if layer.key_mean is not None:
            self._layers_by_mean[id(layer.key_mean)] = layer

    def recorder(self) -> Recorder:
        """Return a recorder for steps of the sample."""
        return _SampleRecorder(self)

    def finish(self) -> None:
        """Write what all steps together have shown."""
        for sampled in self._layers.values():
            sampled.store_mean()

    def layer_of(self, mean: torch.Tensor) -> CacheLayer:
        """Return the layer that has `mean` as its `key_mean`."""
        return self._layers_by_mean[id(mean)]

    def see_keys(self, layer: CacheLayer, k: torch.Tensor, ops: DeviceOps) -> None:
        """Take a step's keys before RoPE, float32 [rows, kv_heads, head_dim] of the device."""
        keys = self._layers[id(layer)].keys
        assert keys is not None
        keys.add(torch.from_numpy(ops.cpu_access.read(k)))

    def see_queries(self, layer: CacheLayer, q: torch.Tensor, ops: DeviceOps) -> None:
        """Take a step's queries after RoPE, float32 [rows, heads, head_dim] of the device."""
        sampled = self._layers[id(layer)]
        sampled.queries.append(torch.from_numpy(ops.cpu_access.read(q)).clone())
        if sum(map(len, sampled.queries)) == self._num_ids:
            sampled.store_feedback()
            self._advance(1)


class _SampleRecorder(Recorder):
    """A recorder of steps in which a sample sees the keys and queries of each layer."""

    def __init__(self, sample: KeySample) -> None:
        super().__init__()
        self._sample = sample

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        if mean is not None:
            self.call(partial(self._sample.see_keys, self._sample.layer_of(mean), x))
        super().rope(x, table, interleaved, mean)

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
                  out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        self.call(partial(self._sample.see_queries, layer, q))
        super().attention(q, layer, batch, shape, out, scratch, sinks)
