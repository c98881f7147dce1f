"""Measure the quality that a cache type loses: perplexity, and divergence from the fp16 cache.

One model is loaded with the fp16 cache and with a cache of each other type. All types share
the weights and the workspace. The text runs through all caches in step, a few rows at a time,
so that the logits fit into the workspace.

The divergence of a token is the Kullback-Leibler divergence, in nats, of the model's prediction
with a cache type from its prediction with fp16: the sum over the vocabulary of
p_fp16 * (log p_fp16 - log p). It compares whole distributions. It therefore ranks cache types
where perplexity does not, because perplexity looks at one token of each distribution and may
improve by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ..cache.paging import PagedCache
from ..memory.buffers import allocate
from ..model.forward import Model
from ..utils.errors import InvalidSettings
from ..utils.progress import NullProgress, Progress, task
from .evaluation_plan import REFERENCE_TYPE, EvaluationPlan

if TYPE_CHECKING:
    from ..engine import LoadedModel
    from ..generation.forward_model import ForwardModel

T = TypeVar("T")

# Logits that are compared at a time, in float64: about 40 MiB with all intermediate results.
_COMPARED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Divergence:
    """The divergence of a cache type from fp16 over the tokens of a text.

    Args:
        mean, median, percentile_99_9, largest: nats per token.
        standard_error: of the mean, as if the tokens were independent.
        top1_agreement: share of the tokens for which both predict the same next token.
    """

    mean: float
    standard_error: float
    median: float
    percentile_99_9: float
    largest: float
    top1_agreement: float

    @classmethod
    def from_nats(cls, nats: np.ndarray, agreeing: int) -> Divergence:
        """Summarise the divergence of each token.

        Args:
            nats: float [tokens].
            agreeing: tokens for which both predict the same next token.
        """
        error = nats.std(ddof=1) / len(nats) ** 0.5 if len(nats) > 1 else 0.0
        return cls(
            mean=float(nats.mean()),
            standard_error=float(error),
            median=float(np.median(nats)),
            percentile_99_9=float(np.percentile(nats, 99.9)),
            largest=float(nats.max()),
            top1_agreement=agreeing / len(nats),
        )


@dataclass(frozen=True)
class Result:
    """The result of one cache type.

    Args:
        cache_type: its name.
        cache_bytes: bytes of its cache.
        perplexity: exp of the mean negative log likelihood of the text's tokens.
        divergence: from fp16; None for fp16 itself.
    """

    cache_type: str
    cache_bytes: int
    perplexity: float
    divergence: Divergence | None


def evaluate(
    loaded: LoadedModel,
    planned: EvaluationPlan,
    ids: Sequence[int],
    progress: Progress | None = None,
) -> list[Result]:
    """Run a text through every cache type.

    The text is cut into pieces as long as the context. Each piece is evaluated on its own,
    after the BOS token where the tokenizer adds one.

    Args:
        loaded: the model, loaded with the options of `planned.reservation`.
        planned: the types to compare.
        ids: the text's ids, without BOS.
        progress: gets the tokens.

    Returns:
        The result of fp16, then those of the other types in the plan's order.

    Raises:
        InvalidSettings: there are fewer than two ids, so that none is predicted from another.
        InsufficientMemory: memory for the other caches was taken by others since the plan.
    """
    bos = bos_ids(loaded)
    pieces = list(cut_text(ids, bos, loaded.ctx_size))
    if not pieces:
        raise InvalidSettings("the text", expected="two tokens or more", actual=f"{len(ids)}")
    total = sum(len(piece) - 1 for piece in pieces)
    results: list[Result] = []

    def compare(lanes: list[Lane]) -> Iterator[int]:
        for piece in pieces:
            yield from run_piece(lanes, piece, loaded.ctx_size)
        results.extend(lane.result() for lane in lanes)

    with task(progress or NullProgress(), "evaluating", total, "tokens") as advance:
        for rows in run_lanes(loaded, planned, compare):
            advance(rows)
    return results


def bos_ids(loaded: LoadedModel) -> list[int]:
    """Return the BOS id that the tokenizer puts before a text, in a list; [] for none."""
    tokenizer = loaded.tokenizer
    if not tokenizer.add_bos_token or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id]


def cut_text(ids: Sequence[int], bos: list[int], ctx_size: int) -> Iterator[list[int]]:
    """Cut ids into pieces so that each id is predicted once.

    The last id of a piece is only predicted and never an input. Without BOS the first id of
    the text is not predicted.
    """
    for first in range(0, len(ids), ctx_size):
        piece = bos + list(ids[first : first + ctx_size + 1 - len(bos)])
        if len(piece) > 1:
            yield piece


def run_lanes(
    loaded: LoadedModel, planned: EvaluationPlan, use: Callable[[list[Lane]], Iterator[T]]
) -> Iterator[T]:
    """Allocate the other caches, and call `use` with a lane for each cache type.

    Args:
        loaded: the model. Its generations wait until `use` has ended.
        planned: the cache types.
        use: called with the lanes, that of fp16 first. It runs in the model's thread. The
            caches are released when it has ended.

    Yields:
        What `use` yields.

    Raises:
        InsufficientMemory: memory for the other caches was taken by others since the plan.
    """

    def steps(model: ForwardModel, cache: PagedCache) -> Iterator[T]:
        assert isinstance(model, Model)
        lanes = [Lane(REFERENCE_TYPE, model, cache)]
        for other in planned.others:
            own = PagedCache.from_views(
                buffers.views("cache"), f"{other}.cache", other,
                model.config.num_hidden_layers, loaded.ctx_size,
            )
            lanes.append(Lane(str(other), model.with_cache(own), own))
        yield from use(lanes)

    # Allocated here and not in the model's thread, where running generations would wait for it.
    buffers = allocate([planned.caches] if planned.caches is not None else [])
    try:
        yield from loaded.run_alone(steps)
    finally:
        buffers.release()


class Lane:
    """One cache type while a text runs through it, and its sums.

    Args:
        name: the type's name.
        model: the forward pass over `cache`.
        cache: a key/value cache of this type.
    """

    def __init__(self, name: str, model: Model, cache: PagedCache) -> None:
        self.name, self.model, self.cache = name, model, cache
        self._nats: list[np.ndarray] = []
        self._agreeing = 0
        self._loss, self._count = 0.0, 0

    def add(self, loss: torch.Tensor) -> None:
        """Add the negative log likelihoods of tokens, [tokens]."""
        self._loss += loss.sum().item()
        self._count += len(loss)

    def add_divergence(self, nats: torch.Tensor, agreeing: torch.Tensor) -> None:
        """Add the divergences of tokens, [tokens], and their agreement, bool [tokens]."""
        self._nats.append(nats.float().numpy())
        self._agreeing += int(agreeing.sum())

    def result(self) -> Result:
        """Summarise the sums."""
        nbytes = sum(
            tensor.nbytes
            for layer in self.cache.layers
            for tensor in (layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales)
            if tensor is not None
        )
        divergence = None
        if self._nats:
            nats = np.concatenate(self._nats).astype(float)
            divergence = Divergence.from_nats(nats, self._agreeing)
        perplexity = float(np.exp(self._loss / self._count))
        return Result(self.name, nbytes, perplexity, divergence)


def run_piece(lanes: list[Lane], piece: list[int], ctx_size: int) -> Iterator[int]:
    """Run a piece of a text through all lanes in step; yields numbers of finished tokens."""
    inputs, targets = piece[:-1], torch.tensor(piece[1:])
    rope_class = lanes[0].model.rope_class(ctx_size)
    sequences = [lane.cache.acquire(ctx_size, (), rope_class) for lane in lanes]
    step = min(lanes[0].model.logits_rows, lanes[0].model.chunk_size)
    try:
        for first in range(0, len(inputs), step):
            chunk = inputs[first : first + step]
            wanted = targets[first : first + step]
            reference: torch.Tensor | None = None
            for lane, sequence in zip(lanes, sequences, strict=True):
                rows = lane.model.forward([(sequence, chunk)], "all")
                _count(lane, rows, wanted, reference)
                if reference is None and len(lanes) > 1:
                    # The next lane overwrites the workspace, which holds these rows.
                    reference = rows.clone()
            yield len(chunk)
    finally:
        for lane, sequence in zip(lanes, sequences, strict=True):
            lane.cache.release(sequence)


def _count(
    lane: Lane, rows: torch.Tensor, wanted: torch.Tensor, reference: torch.Tensor | None
) -> None:
    """Add rows of logits, [tokens, vocab_size], compared with `reference` if given."""
    step = max(1, _COMPARED_ELEMENTS // rows.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        logs = rows[part].double().log_softmax(dim=-1)
        lane.add(-logs.gather(1, wanted[part, None]).squeeze(1))
        if reference is not None:
            theirs = reference[part].double().log_softmax(dim=-1)
            # Rounding may make a divergence of zero slightly negative.
            nats = (theirs.exp() * (theirs - logs)).sum(dim=-1).clamp(min=0)
            lane.add_divergence(nats, logs.argmax(dim=-1) == theirs.argmax(dim=-1))
