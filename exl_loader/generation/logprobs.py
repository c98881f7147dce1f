"""Log probabilities of tokens under the model's own distribution, before any sampler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of a token, and the most likely tokens at its position.

    Args:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: (token id, logprob), most likely first; equally likely ones by rising id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: npt.ArrayLike, token_id: int, count: int) -> TokenLogprobs:
    """Compute the log probability of a token and the `count` largest ones.

    Args:
        logits: float32 [vocab_size], finite: the row that the token was drawn from.
        token_id: below vocab_size.
        count: number of entries in `top`, at least 0; limited to vocab_size.
    """
    row = np.asarray(logits, np.float64)
    largest = row.max()
    total = largest + np.log(np.exp(row - largest).sum())
    top = _largest(row, min(count, len(row)))
    return TokenLogprobs(
        token_id, float(row[token_id] - total), tuple((int(i), float(row[i] - total)) for i in top)
    )


def _largest(row: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    if count == 0:
        return np.empty(0, np.intp)
    least = np.partition(row, -count)[-count]
    # Of equal values at the limit the lowest ids are kept, which a partition does not guarantee.
    candidates = np.flatnonzero(row >= least)
    return candidates[np.lexsort((candidates, -row[candidates]))][:count]
