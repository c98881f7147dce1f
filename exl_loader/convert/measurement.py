"""Measure what each way to store a block changes in the block's output, and what that is worth.

Of each block, attention or MLP, every matrix is quantised with every mix of `MIXES`, and the block
runs on calibration text with this matrix alone replaced. The errors of different matrices are
nearly independent, so that the squared errors of a combination add up.

How much an error of a block changes the model's predictions differs a lot between blocks. It is
measured too: a copy of the text's hidden states runs through this block quantised with `PROBE` and
through all other blocks as they are, and the divergence of its predictions from those of the
source is divided by the block's squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..formats.layer import LinearSpec
from ..model.parts.linear import Linear
from ..model.parts.part import Block
from ..utils.integers import ceil_div
from .activations import LayerRunner, LoadedLayer, first_products
from .allocation import Option, efficient, gain
from .error_feedback import PreparedHessian, quantize, sort_rows
from .mixes import Mix
from .packing import dequantize
from .reservation import LOGITS_ROWS
from .roles import block_roles
from .source import Source

MIXES = (
    Mix((2,), (32,)),
    Mix((3, 2), (32, 32), (0.25, 0.75)),
    Mix((3,), (32,)),
    Mix((4, 3), (32, 32), (0.25, 0.75)),
    Mix((4,), (128,)),
    Mix((4,), (32,)),
    Mix((5, 4), (32, 32), (0.25, 0.75)),
    Mix((5,), (32,)),
    Mix((6,), (32,)),
    Mix((8,), (128,)),
)
PROBE = Mix((4,), (32,))
# Smaller than any error, so that logarithms and quotients exist.
LEAST_ERROR = 1e-12


@dataclass(frozen=True)
class Way(Option):
    """A way to store the matrices of a role.

    Args:
        mix: of each of them.
    """

    mix: Mix


@dataclass(frozen=True)
class Combination(Option):
    """A way to store a block. Its error is relative: squared, over the output's squared norm.

    Args:
        mixes: role -> mix of its matrices.
    """

    mixes: Mapping[str, Mix]


@dataclass(frozen=True)
class BlockMeasurement:
    """What was measured of a block.

    Args:
        combinations: by rising size and falling error.
        divergence: nats per token for an error of 1, as far as they are proportional; None where
            it was not measured.
    """

    combinations: Sequence[Combination]
    divergence: float | None


def count_steps(block: Block) -> int:
    """Return how often `measure_block` reports a finished step."""
    return len(MIXES) * len(block_roles(block))


def least_bits(spec: LinearSpec) -> int:
    """Return the bits of a layer in the file with the smallest mix that is measured."""
    return min(mix.stored_bits(spec.in_features, spec.out_features) for mix in MIXES)


def measure_block(
    runner: LayerRunner,
    source: Source,
    loaded: LoadedLayer,
    block: Block,
    hessians: Mapping[str, PreparedHessian],
    x: torch.Tensor,
    advance: Callable[[int], None],
) -> tuple[list[Combination], dict[str, torch.Tensor], float]:
    """Measure the ways to store a block.

    Args:
        runner: runs the block.
        source: reads its weights.
        loaded: the block's layer, with the source's weights, which it has again afterwards.
        block: attention or MLP of the layer.
        hessians: name of a linear layer -> prepared Hessian of its input.
        x: the block's inputs, float32 [R, T, hidden_size].
        advance: called with 1 after each mix of each role.

    Returns:
        Its combinations; name -> weight of its linear layers quantised with `PROBE`; the error
        of the block with these.
    """
    trial = BlockTrial(runner, loaded, block, x)
    ways: dict[str, list[Way]] = {}
    probe: dict[str, torch.Tensor] = {}
    for role, linears in block_roles(block).items():
        weights = _SortedWeights(source, hessians, keep=len(linears) == 1)
        ways[role] = []
        for mix in MIXES:
            decoded = {
                linear.name: dequantize(quantize(
                    runner.ops, weights.copy_of(linear), linear.spec.out_features,
                    hessians[linear.name], mix, tick=runner.tick,
                ))
                for linear in linears
            }
            loaded.replace(decoded)
            size = sum(
                mix.stored_bits(linear.spec.in_features, linear.spec.out_features)
                for linear in linears
            )
            ways[role].append(Way(size, trial.error(), mix))
            if mix == PROBE:
                probe |= decoded
            advance(1)
        loaded.restore(linear.name for linear in linears)
    loaded.replace(probe)
    probe_error = trial.error()
    loaded.restore(probe)
    return combine(ways), probe, probe_error


class _SortedWeights:
    """Weights as `quantize` takes them.

    Args:
        source: reads them.
        hessians: name of a linear layer -> prepared Hessian of its input.
        keep: whether the last one is kept in memory, to be copied instead of read again.
    """

    def __init__(
        self, source: Source, hessians: Mapping[str, PreparedHessian], keep: bool
    ) -> None:
        self._source, self._hessians, self._keep = source, hessians, keep
        self._kept: dict[str, torch.Tensor] = {}

    def copy_of(self, linear: Linear) -> torch.Tensor:
        """Return the sorted rows of a layer, which may be overwritten."""
        kept = self._kept.get(linear.name)
        if kept is not None:
            return kept.clone()
        rows = sort_rows(self._source.linear(linear.spec).weight(), self._hessians[linear.name])
        if self._keep:
            self._kept = {linear.name: rows}
            return rows.clone()
        return rows


class BlockTrial:
    """Compares a block with changed weights with itself as it is now.

    The products of the block's input with weights that were not replaced are computed only once.

    Args:
        runner: runs the block.
        loaded: the block's layer.
        block: attention or MLP of the layer.
        x: the block's inputs, float32 [R, T, hidden_size].
    """

    def __init__(
        self, runner: LayerRunner, loaded: LoadedLayer, block: Block, x: torch.Tensor
    ) -> None:
        self._runner, self._loaded, self._block, self._x = runner, loaded, block, x
        self._products = first_products(block)
        self._expected = runner.run_block(loaded, block, x, self._products)
        self._energy = self._expected.double().square().sum().item()

    def error(self) -> float:
        """Return the squared error of the output, relative to its squared norm."""
        change = self._runner.run_block(self._loaded, self._block, self._x, self._products)
        squared = change.sub_(self._expected).double().square().sum().item()
        return max(squared / self._energy, LEAST_ERROR) if self._energy > 0 else LEAST_ERROR


def combine(roles: Mapping[str, Sequence[Way]]) -> list[Combination]:
    """Combine the ways to store each role: from the smallest on, the best step per bit each time.

    These are the combinations on the lower convex hull of error over size, because the errors of
    roles add up.

    Returns:
        The combinations, by rising size and falling error.
    """
    ladders = {role: [ways[i] for i in efficient(ways)] for role, ways in roles.items()}
    steps = [
        (gain(smaller, larger), role, larger)
        for role, ladder in ladders.items() for smaller, larger in pairwise(ladder)
    ]
    chosen = {role: ladder[0] for role, ladder in ladders.items()}
    found = [_combination(chosen)]
    # The gains of a role fall, so sorting keeps the order of its steps.
    for _, role, way in sorted(steps, key=lambda step: -step[0]):
        chosen[role] = way
        found.append(_combination(chosen))
    return found


def _combination(chosen: Mapping[str, Way]) -> Combination:
    return Combination(
        sum(way.size for way in chosen.values()),
        sum(way.error for way in chosen.values()),
        {role: way.mix for role, way in chosen.items()},
    )


def count_parts(states: torch.Tensor) -> int:
    """Return how often `mean_divergences` reports a finished part of these hidden states."""
    return ceil_div(states.flatten(0, 1).shape[0], LOGITS_ROWS)


def mean_divergences(
    runner: LayerRunner, expected: torch.Tensor, actual: Mapping[str, torch.Tensor],
    advance: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return Kullback-Leibler divergences of predictions, nats per token.

    With logits z of the source, z' of another and p = softmax(z), the divergence of a token is
    sum p (z - z') - (logsumexp(z) - logsumexp(z')).

    Args:
        runner: with a loaded head.
        expected: hidden states of texts after the last layer, float32 [R, T, hidden_size].
        actual: name -> those with something quantised.
        advance: called with 1 after each part of the texts; None for nothing.

    Returns:
        Name -> mean divergence.
    """
    rows = expected.flatten(0, 1)
    totals = dict.fromkeys(actual, 0.0)
    for first in range(0, len(rows), LOGITS_ROWS):
        part = slice(first, first + LOGITS_ROWS)
        logits = runner.logits(rows[part])
        norm = torch.logsumexp(logits, dim=-1)
        p = (logits - norm[:, None]).exp_()
        # The negative of the source's part is its entropy.
        entropy = norm.double().sum() - torch.linalg.vecdot(p, logits).double().sum()
        for name, states in actual.items():
            logits = runner.logits(states.flatten(0, 1)[part])
            cross = torch.linalg.vecdot(p, logits).double().sum()
            norms = torch.logsumexp(logits, dim=-1).double().sum()
            totals[name] += (norms - cross - entropy).item()
        if advance is not None:
            advance(1)
    # Rounding may make a divergence of zero slightly negative.
    return {name: max(total, 0.0) / len(rows) for name, total in totals.items()}
