"""Log probabilities of tokens, as the model gives them: before any sampler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, and which ones were likeliest in its place.

    Args:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: (token id, logprob), likeliest first; of equally likely ones the lower id first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: npt.ArrayLike, token_id: int, count: int) -> TokenLogprobs:
    """Compute a token's log probability and the `count` largest ones.

    Args:
        logits: float32 [vocab_size], those that the token was chosen from; finite.
        token_id: below vocab_size.
        count: at least 0; more than vocab_size gives vocab_size.
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
    # Of several at the limit the lowest ids are kept, which a partition alone would not promise.
    candidates = np.flatnonzero(row >= least)
    return candidates[np.lexsort((candidates, -row[candidates]))][:count]
