"""What a cache type costs in quality: perplexity, and divergence from the fp16 cache.

One model is loaded with the fp16 cache, and beside it a cache of each other type; weights
and workspace are shared. A text goes through all of them in step, a few rows at a time, so
that no more logits exist than the workspace holds.

The divergence of a token is the Kullback-Leibler divergence, in nats, of what the model
predicts with a cache type from what it predicts with fp16: sum over the vocabulary of
p_fp16 * (log p_fp16 - log p). It compares whole distributions, so it ranks types where
perplexity, which looks at one token of each and may improve by luck, does not.
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

# Logits that are compared at a time, in float64: some 40 MiB with everything in between.
_COMPARED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Divergence:
    """The divergence of a cache type from fp16, over the tokens of a text.

    Args:
        mean, median, percentile_99_9, largest: nats a token.
        standard_error: of the mean, as if tokens were independent.
        top1_agreement: share of tokens whose likeliest follower is the same.
    """

    mean: float
    standard_error: float
    median: float
    percentile_99_9: float
    largest: float
    top1_agreement: float

    @classmethod
    def of(cls, nats: np.ndarray, agreeing: int) -> Divergence:
        """Summarise nats, float [tokens], and how many tokens agree."""
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
    """What one cache type gave.

    Args:
        cache_type: its name.
        cache_bytes: bytes of its cache.
        perplexity: exp of the mean negative log likelihood of the text's tokens.
        divergence: None for the reference itself.
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

    The text is cut into windows of the whole context, each on its own, with the tokenizer's
    BOS token before each where it adds one.

    Args:
        loaded: the model, loaded as `planned.reservation` says.
        planned: which types to compare.
        ids: the text's ids, without BOS.
        progress: told the tokens.

    Returns:
        the reference's result, then the others' in the plan's order.

    Raises:
        InvalidSettings: fewer than two ids to predict one from another.
        InsufficientMemory: memory for the other caches has vanished since the plan.
    """
    bos = bos_ids(loaded)
    windows = list(windows_of(ids, bos, loaded.ctx_size))
    if not windows:
        raise InvalidSettings("the text", expected="two tokens or more", actual=f"{len(ids)}")
    total = sum(len(window) - 1 for window in windows)
    results: list[Result] = []

    def compare(lanes: list[Lane]) -> Iterator[int]:
        for window in windows:
            yield from run_window(lanes, window, loaded.ctx_size)
        results.extend(lane.result() for lane in lanes)

    with task(progress or NullProgress(), "evaluating", total, "tokens") as advance:
        for rows in run_lanes(loaded, planned, compare):
            advance(rows)
    return results


def bos_ids(loaded: LoadedModel) -> list[int]:
    tokenizer = loaded.tokenizer
    if not tokenizer.add_bos_token or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id]


def windows_of(ids: Sequence[int], bos: list[int], ctx_size: int) -> Iterator[list[int]]:
    """Cut ids so that each is predicted once; a window's last id is a target alone.

    Without BOS nothing predicts the first.
    """
    for first in range(0, len(ids), ctx_size):
        window = bos + list(ids[first : first + ctx_size + 1 - len(bos)])
        if len(window) > 1:
            yield window


def run_lanes(
    loaded: LoadedModel, planned: EvaluationPlan, use: Callable[[list[Lane]], Iterator[T]]
) -> Iterator[T]:
    """Take the other caches, and work with a lane for each cache type.

    Args:
        loaded: its generations wait until the work has ended.
        planned: which types there are.
        use: called with the lanes, the reference first; it runs in the model's thread and
            the lanes end with it.

    Yields:
        What `use` yields.

    Raises:
        InsufficientMemory: memory for the other caches has vanished since the plan.
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

    # Taken before the model's thread is asked, which it would keep waiting.
    buffers = allocate([planned.caches] if planned.caches is not None else [])
    try:
        yield from loaded.run_alone(steps)
    finally:
        buffers.release()


class Lane:
    """One cache type on its way through a text.

    Args:
        name: the type's name. model: runs over `cache`.
    """

    def __init__(self, name: str, model: Model, cache: PagedCache) -> None:
        self.name, self.model, self.cache = name, model, cache
        self._nats: list[np.ndarray] = []
        self._agreeing = 0
        self._loss, self._count = 0.0, 0

    def add(self, loss: torch.Tensor) -> None:
        """Count tokens by their negative log likelihoods, [tokens]."""
        self._loss += loss.sum().item()
        self._count += len(loss)

    def add_divergence(self, nats: torch.Tensor, agreeing: torch.Tensor) -> None:
        """Count tokens by their divergence, [tokens], and agreement, bool [tokens]."""
        self._nats.append(nats.float().numpy())
        self._agreeing += int(agreeing.sum())

    def result(self) -> Result:
        """Summarise what was counted."""
        nbytes = sum(
            tensor.nbytes
            for layer in self.cache.layers
            for tensor in (layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales)
            if tensor is not None
        )
        divergence = None
        if self._nats:
            divergence = Divergence.of(np.concatenate(self._nats).astype(float), self._agreeing)
        perplexity = float(np.exp(self._loss / self._count))
        return Result(self.name, nbytes, perplexity, divergence)


def run_window(lanes: list[Lane], window: list[int], ctx_size: int) -> Iterator[int]:
    """Run a window through all lanes in step; yields how many tokens were done."""
    inputs, targets = window[:-1], torch.tensor(window[1:])
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
                    # The rows are the workspace's, which the next lane writes to.
                    reference = rows.clone()
            yield len(chunk)
    finally:
        for lane, sequence in zip(lanes, sequences, strict=True):
            lane.cache.release(sequence)


def _count(
    lane: Lane, rows: torch.Tensor, wanted: torch.Tensor, reference: torch.Tensor | None
) -> None:
    """Count rows of logits [tokens, vocab_size], compared with the reference's if given."""
    step = max(1, _COMPARED_ELEMENTS // rows.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        logs = rows[part].double().log_softmax(dim=-1)
        lane.add(-logs.gather(1, wanted[part, None]).squeeze(1))
        if reference is not None:
            theirs = reference[part].double().log_softmax(dim=-1)
            # Rounding may leave a divergence of nothing a little below zero.
            nats = (theirs.exp() * (theirs - logs)).sum(dim=-1).clamp(min=0)
            lane.add_divergence(nats, logs.argmax(dim=-1) == theirs.argmax(dim=-1))
