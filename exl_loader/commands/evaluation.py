"""Measure the quality that a cache type loses: perplexity, and divergence from the fp16 cache.

One model is loaded with the fp16 cache and with a cache of each other type. All types share
the weights and the workspace. The text runs through all caches in step, a few rows at a time,
so that the logits fit into the workspace.

The divergence of a token is the Kullback-Leibler divergence, in nats, of the model's prediction
with a cache type from its prediction with fp16: the sum over the vocabulary of
p_fp16 * (log p_fp16 - log p). It compares whole distributions. It therefore ranks cache types
where perplexity does not, because perplexity looks at one token of each distribution and may
improve by luck.

The standard error of a mean is computed from the means of the windows (`mean_of_windows`). Tokens
of one window are not independent: a hard passage makes all its tokens diverge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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

# Logits that are compared at a time, in float64: 32 MiB in four tensors.
_COMPARED_ELEMENTS = 1 << 20


def mean_of_windows(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Return the mean of all tokens, and its standard error with windows as the sample.

    The mean is a ratio of two sums over windows, and its error that of a ratio estimator
    (Cochran, Sampling Techniques, 6.4), because the last window of a text is shorter.

    Args:
        sums: of each window's tokens.
        counts: tokens of each window.

    Returns:
        the mean; the standard error, None for one window, which says nothing about others.
    """
    number, total = len(sums), sum(counts)
    mean = sum(sums) / total
    if number < 2:
        return mean, None
    squares = sum((part - mean * count) ** 2 for part, count in zip(sums, counts, strict=True))
    return mean, (squares * number / (number - 1)) ** 0.5 / total


@dataclass(frozen=True)
class Divergence:
    """The divergence of a cache type from fp16 over the tokens of one or several texts.

    Args:
        mean, median, percentile_99_9, largest: nats per token.
        standard_error: of the mean over windows; None for one window.
        top1_agreement: share of the tokens for which both predict the same next token.
        top1_error: standard error of this share over windows; None for one window.
    """

    mean: float
    standard_error: float | None
    median: float
    percentile_99_9: float
    largest: float
    top1_agreement: float
    top1_error: float | None

    @classmethod
    def from_nats(cls, nats: Sequence[np.ndarray], agreeing: Sequence[int]) -> Divergence:
        """Summarise the divergence of each token.

        Args:
            nats: float [tokens] of each window.
            agreeing: tokens of each window for which both predict the same next token.
        """
        counts = [len(window) for window in nats]
        mean, error = mean_of_windows([float(window.sum()) for window in nats], counts)
        agreement, agreement_error = mean_of_windows(agreeing, counts)
        whole = np.concatenate(nats)
        return cls(
            mean=mean,
            standard_error=error,
            median=float(np.median(whole)),
            percentile_99_9=float(np.percentile(whole, 99.9)),
            largest=float(whole.max()),
            top1_agreement=agreement,
            top1_error=agreement_error,
        )


@dataclass(frozen=True)
class Result:
    """The result of one cache type.

    Args:
        cache_type: its name.
        cache_bytes: bytes of its cache.
        perplexity: exp of the mean negative log likelihood of the tokens.
        perplexity_error: its standard error over windows; None for one window.
        divergence: from fp16; None for fp16 itself.
    """

    cache_type: str
    cache_bytes: int
    perplexity: float
    perplexity_error: float | None
    divergence: Divergence | None


@dataclass(frozen=True)
class Evaluation:
    """Results of texts, each a list with fp16 first and the other types in the plan's order.

    Args:
        windows: number of windows of each text.
        texts: the results of each text.
        together: the results of the windows of all texts.
    """

    windows: list[int]
    texts: list[list[Result]]
    together: list[Result]


def evaluate(
    loaded: LoadedModel,
    planned: EvaluationPlan,
    texts: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> Evaluation:
    """Run texts through every cache type.

    A text is cut into windows as long as the context. Each window is evaluated on its own, after
    the BOS token where the tokenizer adds one.

    Args:
        loaded: the model, loaded with the options of `planned.reservation`.
        planned: the types to compare.
        texts: the ids of each text, without BOS.
        progress: gets the tokens.

    Raises:
        InvalidSettings: a text has fewer than two ids, so that none is predicted from another.
        InsufficientMemory: memory for the other caches was taken by others since the plan.
    """
    bos = bos_ids(loaded)
    windows = [list(cut_text(ids, bos, loaded.ctx_size)) for ids in texts]
    for ids, cut in zip(texts, windows, strict=True):
        if not cut:
            raise InvalidSettings("the text", expected="two tokens or more", actual=f"{len(ids)}")
    total = sum(len(window) - 1 for cut in windows for window in cut)
    found: list[Evaluation] = []

    def compare(lanes: list[Lane]) -> Iterator[int]:
        results = []
        for cut in windows:
            first = len(lanes[0].windows)
            for window in cut:
                yield from run_window(lanes, window, loaded.ctx_size)
            results.append([lane.result(first) for lane in lanes])
        together = [lane.result() for lane in lanes]
        found.append(Evaluation([len(cut) for cut in windows], results, together))

    with task(progress or NullProgress(), "evaluating", total, "tokens") as advance:
        for rows in run_lanes(loaded, planned, compare):
            advance(rows)
    return found[0]


def bos_ids(loaded: LoadedModel) -> list[int]:
    """Return the BOS id that the tokenizer puts before a text, in a list; [] for none."""
    tokenizer = loaded.tokenizer
    if not tokenizer.add_bos_token or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id]


def cut_text(ids: Sequence[int], bos: list[int], ctx_size: int) -> Iterator[list[int]]:
    """Cut ids into windows so that each id is predicted once.

    The last id of a window is only predicted and never an input. Without BOS the first id of
    the text is not predicted.
    """
    for first in range(0, len(ids), ctx_size):
        window = bos + list(ids[first : first + ctx_size + 1 - len(bos)])
        if len(window) > 1:
            yield window


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
            views = {
                name.removeprefix(f"{other}."): view
                for name, view in buffers.views("cache").items()
                if name.startswith(f"{other}.")
            }
            own = PagedCache.from_views(
                views, "cache", other,
                [(views, index) for index in range(model.config.num_hidden_layers)],
                loaded.ctx_size,
            )
            lanes.append(Lane(str(other), model.with_cache(own), own))
        yield from use(lanes)

    # Allocated here and not in the model's thread, where running generations would wait for it.
    buffers = allocate([planned.caches] if planned.caches is not None else [])
    try:
        yield from loaded.run_alone(steps)
    finally:
        buffers.release()


@dataclass
class WindowSums:
    """What a cache type did with one window.

    Args:
        loss: sum of the negative log likelihoods of `count` tokens.
        nats: divergences of the tokens, in pieces; empty for fp16.
        agreeing: tokens for which the type and fp16 predict the same next token.
    """

    loss: float = 0.0
    count: int = 0
    nats: list[np.ndarray] = field(default_factory=list)
    agreeing: int = 0


class Lane:
    """One cache type while texts run through it, and its sums by window.

    Args:
        name: the type's name.
        model: the forward pass over `cache`.
        cache: a key/value cache of this type.
    """

    def __init__(self, name: str, model: Model, cache: PagedCache) -> None:
        self.name, self.model, self.cache = name, model, cache
        self.windows: list[WindowSums] = []

    def begin_window(self) -> None:
        """Count what follows to a new window."""
        self.windows.append(WindowSums())

    def add(self, loss: torch.Tensor) -> None:
        """Add the negative log likelihoods of tokens, [tokens]."""
        window = self.windows[-1]
        window.loss += loss.sum().item()
        window.count += len(loss)

    def add_divergence(self, nats: torch.Tensor, agreeing: torch.Tensor) -> None:
        """Add the divergences of tokens, [tokens], and their agreement, bool [tokens]."""
        window = self.windows[-1]
        window.nats.append(nats.float().numpy())
        window.agreeing += int(agreeing.sum())

    def result(self, first: int = 0) -> Result:
        """Summarise the windows from `first` on."""
        windows = self.windows[first:]
        nbytes = sum(
            tensor.nbytes
            for layer in self.cache.layers
            for tensor in (layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales)
            if tensor is not None
        )
        divergence = None
        if windows[0].nats:
            nats = [np.concatenate(window.nats).astype(float) for window in windows]
            divergence = Divergence.from_nats(nats, [window.agreeing for window in windows])
        loss, error = mean_of_windows(
            [window.loss for window in windows], [window.count for window in windows]
        )
        perplexity = math.exp(loss)
        # The derivative of exp is exp.
        perplexity_error = None if error is None else perplexity * error
        return Result(self.name, nbytes, perplexity, perplexity_error, divergence)


def run_window(lanes: list[Lane], window: list[int], ctx_size: int) -> Iterator[int]:
    """Run a window of a text through all lanes in step; yields numbers of finished tokens."""
    for lane in lanes:
        lane.begin_window()
    inputs, targets = window[:-1], torch.tensor(window[1:])
    rope_class = lanes[0].model.rope_class(ctx_size)
    sequences = [lane.cache.acquire(ctx_size, (), rope_class) for lane in lanes]
    step = min(lanes[0].model.logits_rows, lanes[0].model.chunk_size)
    vocab_size = lanes[0].model.config.vocab_size
    rooms = torch.empty(
        4, max(1, _COMPARED_ELEMENTS // vocab_size), vocab_size, dtype=torch.float64
    )
    reference = torch.empty(step, vocab_size)
    try:
        for first in range(0, len(inputs), step):
            chunk = inputs[first : first + step]
            wanted = targets[first : first + step]
            exact = reference[: len(chunk)]
            for lane, sequence in zip(lanes, sequences, strict=True):
                rows = lane.model.forward([(sequence, chunk)], "all")
                is_first = lane is lanes[0]
                _count(lane, rows, wanted, None if is_first else exact, rooms)
                if is_first:
                    # The next lane overwrites the workspace, which holds these rows.
                    exact.copy_(rows)
            yield len(chunk)
    finally:
        for lane, sequence in zip(lanes, sequences, strict=True):
            lane.cache.release(sequence)


def _count(
    lane: Lane, rows: torch.Tensor, wanted: torch.Tensor, reference: torch.Tensor | None,
    rooms: torch.Tensor,
) -> None:
    """Add rows of logits, [tokens, vocab_size], compared with `reference` if given.

    Args:
        rooms: float64 [4, tokens at a time, vocab_size], overwritten. Tensors that are made anew
            for each step leave gaps in the heap, which grew by gigabytes in a long text.
    """
    for first in range(0, len(rows), rooms.shape[1]):
        part = slice(first, first + rooms.shape[1])
        inputs, logs, theirs, product = (room[: len(rows[part])] for room in rooms)
        torch.log_softmax(inputs.copy_(rows[part]), dim=-1, out=logs)
        lane.add(-logs.gather(1, wanted[part, None]).squeeze(1))
        if reference is not None:
            torch.log_softmax(inputs.copy_(reference[part]), dim=-1, out=theirs)
            torch.mul(torch.exp(theirs, out=inputs), torch.sub(theirs, logs, out=product),
                      out=product)
            # Rounding may make a divergence of zero slightly negative.
            nats = product.sum(dim=-1).clamp(min=0)
            lane.add_divergence(nats, logs.argmax(dim=-1) == theirs.argmax(dim=-1))
