"""Time prompts and generated tokens at depths of the context, and the memory that limits them.

Passes are timed below the scheduler, one text at a time. A context is filled with copies of the
keys and values of its first 256 tokens, because the content of a cache does not change the time.

Generating a token reads the weights and the cache once, so the memory's bandwidth is its limit. A
share of it is the time that reading those bytes takes at the bandwidth that was measured right
before, divided by the time that the tokens took.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from ..backends import backend_of
from ..cache.layout import PAGE_LEN
from ..model.parts.experts import Experts
from ..utils.byte_counts import amount
from ..utils.errors import InsufficientMemory

if TYPE_CHECKING:
    import torch

    from ..backends.base import DeviceOps
    from ..cache.layout import CacheType
    from ..cache.paging import PagedCache, PagedSequence
    from ..generation.forward_model import ForwardModel
    from ..model.assembly import ModelParts

T = TypeVar("T")
Clock = Callable[[], float]

# Tokens that are generated before the clock runs: the first step of a shape records it, and a card
# captures the second.
WARM_UP_TOKENS = 4

# The ids of most vocabularies' special tokens, which no text is made of.
SPECIAL_IDS = 3


def random_ids(count: int, vocab_size: int, seed: int | None = None) -> list[int]:
    """Draw token ids, none of the special ones at the beginning of the vocabulary."""
    generator = random.Random(seed)
    first = min(SPECIAL_IDS, vocab_size - 1)
    return [generator.randrange(first, vocab_size) for _ in range(count)]


def run(steps: Generator[None, None, T]) -> T:
    """Run all steps of a timed pass, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class TimedText:
    """A text of random tokens in a model, set to any depth, whose passes are timed.

    Methods that time are generators: they yield between two passes, when the clock does not run,
    so that an interrupt need not wait for the last one. They return seconds; see `run`.

    Args:
        model, cache: as `LoadedModel.run_alone` lends them.
        ctx_size: tokens that the text may have.
        vocab_size: of the model.
        clock: returns seconds.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, ctx_size: int, vocab_size: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._model, self._cache = model, cache
        self._ctx_size, self._vocab_size = ctx_size, vocab_size
        self._clock = clock
        self._sequence: PagedSequence | None = None

    def generate(self, depth: int, count: int) -> Generator[None, None, float]:
        """Time `count` steps of one token each, after `depth` tokens."""
        sequence = yield from self._at(depth)
        seconds = 0.0
        for token in random_ids(count, self._vocab_size):
            start = self._clock()
            (row,) = self._model.forward_rows([(sequence, [token])])
            # Waits for the device, as choosing the next token does.
            row.argmax(self._vocab_size)
            seconds += self._clock() - start
            yield
        return seconds

    def read(self, depth: int, count: int) -> Generator[None, None, float]:
        """Time a prompt of `count` tokens after `depth` tokens, up to the logits of its last."""
        sequence = yield from self._at(depth)
        return (yield from self._read(sequence, random_ids(count, self._vocab_size)))

    def logits(self, ids: Sequence[int]) -> Generator[None, None, torch.Tensor]:
        """Return the logits after a text, float32 [vocab_size], valid until the next call."""
        sequence = yield from self._at(0)
        first = len(ids) - min(len(ids), self._model.chunk_size)
        if first:
            yield from self._read(sequence, ids[:first])
        return self._model.forward([(sequence, list(ids[first:]))])[0]

    def release(self) -> None:
        """Give the pages back; the next pass takes them again."""
        if self._sequence is not None:
            self._cache.release(self._sequence)
            self._sequence = None

    def _read(
        self, sequence: PagedSequence, ids: Sequence[int]
    ) -> Generator[None, None, float]:
        seconds, chunk = 0.0, self._model.chunk_size
        for first in range(0, len(ids), chunk):
            is_last = first + chunk >= len(ids)
            start = self._clock()
            logits = self._model.forward(
                [(sequence, list(ids[first : first + chunk]))], "last" if is_last else "none"
            )
            if is_last:
                logits[0].argmax()
            seconds += self._clock() - start
            yield
        return seconds

    def _at(self, depth: int) -> Generator[None, None, PagedSequence]:
        """Return the sequence with `depth` tokens: one page that is computed, and copies of it."""
        if self._sequence is None:
            self._sequence = self._cache.acquire(
                self._ctx_size, (), self._model.rope_class(self._ctx_size)
            )
            count = min(PAGE_LEN, self._ctx_size)
            yield from self._read(self._sequence, random_ids(count, self._vocab_size, seed=0))
            first, *others = self._sequence.pages
            for layer in self._cache.layers:
                for part in (layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales):
                    if part is not None and others:
                        part[others] = part[first].clone()
        self._sequence.past_len = depth
        return self._sequence


class ReadBuffers:
    """The buffers by whose reading the bandwidth of devices is measured.

    Use it as a context manager, which gives the memory back. A plan that is made meanwhile sees
    their memory as taken.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        # Of each device the buffer, and the object that owns its memory.
        self._buffers: dict[str, tuple[torch.Tensor, object]] = {}
        self._clock = clock

    @property
    def devices(self) -> set[str]:
        """The devices that have a buffer."""
        return set(self._buffers)

    def take(self, device: str) -> None:
        """Take a device's buffer.

        Raises:
            InsufficientMemory: the device has no room for it.
        """
        backend = backend_of(device)
        backend.initialize(device)
        nbytes, free = backend.read_buffer_bytes, backend.capacity(device).free_bytes
        error = InsufficientMemory(
            f"{device}: no memory to measure the bandwidth with",
            expected=f"{amount(nbytes)} free, before the model is loaded",
            actual=amount(max(0, free)),
            remedy="Close the program that holds the memory, or measure on another device",
        )
        if free < nbytes:
            raise error
        try:
            buffer, owner = backend.empty(device, nbytes)
        except MemoryError:
            raise error from None
        backend.touch(buffer)
        self._buffers[device] = buffer, owner

    def __enter__(self) -> ReadBuffers:
        return self

    def __exit__(self, *error: object) -> None:
        self._buffers.clear()

    def bandwidths(self, ops: Mapping[str, DeviceOps]) -> dict[str, float]:
        """Measure the bandwidth of each device, in bytes a second."""
        found = {}
        for device, (buffer, _) in self._buffers.items():
            start = self._clock()
            nbytes = ops[device].read_through(buffer)
            found[device] = nbytes / (self._clock() - start)
        return found


@dataclass(frozen=True)
class StepBytes:
    """The bytes that generating a token reads, by device.

    Args:
        weights: device -> bytes of the weights. Of a mixture's experts those of one row, of the
            embedding nothing.
        layers: (device, sliding window or 0, bytes of a token in the cache) of each layer.
    """

    weights: Mapping[str, int]
    layers: tuple[tuple[str, int, int], ...]

    @classmethod
    def from_parts(cls, parts: ModelParts, cache_type: CacheType) -> StepBytes:
        """Take the bytes of a planned or loaded model."""
        weights = dict.fromkeys(parts.device_map.devices, 0)
        layers = []
        of_token = cache_type.bytes_per_token(
            parts.config.num_key_value_heads, parts.config.head_dim
        )
        for layer in parts.layers:
            weights[layer.device] += sum(spec.nbytes for spec in layer.specs())
            if isinstance(layer.mlp, Experts):
                experts = layer.mlp.experts
                nbytes = sum(
                    spec.nbytes
                    for expert in experts for weight in expert.weights() for spec in weight.specs()
                )
                weights[layer.device] -= nbytes - nbytes * layer.mlp.top_k // len(experts)
            layers.append((layer.device, layer.attention.shape.sliding_window, of_token))
        if parts.head is not None and parts.device_map.head is not None:
            weights[parts.device_map.head] += sum(spec.nbytes for spec in parts.head.specs())
        return cls(weights, tuple(layers))

    def at(self, depth: float) -> dict[str, float]:
        """Return device -> bytes of a token after `depth` tokens."""
        found: dict[str, float] = dict(self.weights)
        for device, window, of_token in self.layers:
            found[device] += of_token * (min(depth, window) if window else depth)
        return found

    def seconds(self, test: SpeedTest, bandwidths: Mapping[str, float]) -> float:
        """Return the time that memory alone takes for a test that generates."""
        nbytes = self.at(test.depth + test.tokens / 2)
        return test.tokens * sum(nbytes[device] / bandwidths[device] for device in nbytes)


@dataclass(frozen=True)
class SpeedTest:
    """What is timed.

    Args:
        kind: `prompt` or `generate`.
        tokens: how many.
        depth: tokens of the context before them.
    """

    kind: Literal["prompt", "generate"]
    tokens: int
    depth: int

    @property
    def ctx_size(self) -> int:
        """Tokens of context that the test needs."""
        tokens = self.tokens
        return self.depth + (max(tokens, WARM_UP_TOKENS) if self.kind == "generate" else tokens)

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens}" + (f" at depth {self.depth}" if self.depth else "")


@dataclass
class SpeedResult:
    """The repetitions of a test.

    Args:
        test: what was timed.
        seconds: of each repetition.
        memory_seconds: of each repetition that generated, what memory alone would have taken.
        bandwidths: bytes a second of all devices' memory, measured before each of these.
    """

    test: SpeedTest
    seconds: list[float] = field(default_factory=list)
    memory_seconds: list[float] = field(default_factory=list)
    bandwidths: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.test.tokens / seconds for seconds in self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens a second of the slowest and of the fastest repetition."""
        return self.test.tokens / max(self.seconds), self.test.tokens / min(self.seconds)

    @property
    def bandwidth_share(self) -> float | None:
        """Share of the memory's bandwidth that generating used, the median; None for a prompt."""
        if not self.memory_seconds:
            return None
        pairs = zip(self.memory_seconds, self.seconds, strict=True)
        return statistics.median(memory / seconds for memory, seconds in pairs)


def measure(
    model: ForwardModel, cache: PagedCache, *, tests: Sequence[SpeedTest], repetitions: int,
    ctx_size: int, vocab_size: int, ops: Mapping[str, DeviceOps], step_bytes: StepBytes,
    buffers: ReadBuffers, clock: Clock = time.perf_counter,
) -> Iterator[SpeedResult | None]:
    """Run tests in order, for `LoadedModel.run_alone`.

    Args:
        model, cache: as it lends them.
        tests: what to time.
        repetitions: of each test.
        ctx_size: at least that of every test.
        vocab_size: of the model.
        ops: device -> its operations.
        step_bytes: of the model with this cache.
        buffers: of the same devices.

    Yields:
        The result of each test after every repetition, so that the caller sees it grow; None
        between two passes.
    """
    text = TimedText(model, cache, ctx_size, vocab_size, clock)
    warm: set[tuple[str, int]] = set()
    try:
        for test in tests:
            yield from _warm_up(text, test, warm)
            result = SpeedResult(test)
            for _ in range(repetitions):
                if test.kind == "generate":
                    result.bandwidths.append(buffers.bandwidths(ops))
                    result.seconds.append((yield from text.generate(test.depth, test.tokens)))
                    result.memory_seconds.append(step_bytes.seconds(test, result.bandwidths[-1]))
                else:
                    result.seconds.append((yield from text.read(test.depth, test.tokens)))
                yield result
    finally:
        text.release()


def _warm_up(
    text: TimedText, test: SpeedTest, warm: set[tuple[str, int]]
) -> Generator[None, None, None]:
    """Run passes of a test's shapes before they are timed.

    Args:
        warm: shapes that have run, to which the test's are added.
    """
    shape = (test.kind, test.tokens if test.kind == "prompt" else test.depth)
    if shape in warm:
        return
    warm.add(shape)
    if test.kind == "prompt":
        yield from text.read(test.depth, test.tokens)
    else:
        yield from text.generate(test.depth, WARM_UP_TOKENS)
