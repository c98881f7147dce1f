"""How far the RoPE options stretch a model's own length, and the warning beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...checkpoint.config import ModelConfig
from ...checkpoint.rope import MAX_FACTOR, MAX_POSITIONS, check_scaling


def stretched_length(config: ModelConfig, alpha_value: float, compress_pos_emb: float) -> int:
    """Return the model's own length in tokens, stretched by the RoPE options.

    A `compress_pos_emb` of n makes room for n times as many positions. An `alpha_value` of n
    stretches the length to at most n times. The quality of the text there is for the user to
    judge.

    Raises:
        InvalidSettings: a RoPE option makes no sense.
    """
    check_scaling(alpha_value, compress_pos_emb)
    return stretched(config.own_length, alpha_value, compress_pos_emb)


def stretched(own_length: int, alpha_value: float, compress_pos_emb: float) -> int:
    """Return a length in tokens, stretched by the RoPE options."""
    stretch = max(1.0, alpha_value) * max(1.0, compress_pos_emb)
    # The nearest float to 1.4 is less than 1.4, and 5 times 1.4 has to be 7.
    return min(MAX_POSITIONS, int(round(own_length * stretch, 6)))


@dataclass(frozen=True)
class LengthWarning:
    """A context beyond the model's length, and the RoPE options that would stretch the model.

    Args:
        ctx_size: tokens of context.
        own_length: the model's own length in tokens, with the RoPE scaling of its config.
        stretched_length: that length, stretched by the RoPE options of this plan.
        alpha_value, compress_pos_emb: the value of either option that stretches the model to
            `ctx_size` while the other keeps its value; None where no allowed value does.
    """

    ctx_size: int
    own_length: int
    stretched_length: int
    alpha_value: float | None
    compress_pos_emb: float | None

    @property
    def remedy(self) -> str:
        """The options that stretch the model, such as `alpha_value 2.6 or compress_pos_emb 2`."""
        values = {"alpha_value": self.alpha_value, "compress_pos_emb": self.compress_pos_emb}
        return " or ".join(f"{name} {v:g}" for name, v in values.items() if v is not None)

    @property
    def text(self) -> str:
        """The warning as one line."""
        stretched = ""
        if self.stretched_length > self.own_length:
            stretched = f", which the RoPE options stretch to {self.stretched_length:,}"
        ways = f"Set {self.remedy} to stretch it, or choose" if self.remedy else "Choose"
        return (
            f"a context of {self.ctx_size:,} tokens is beyond the model's own length of "
            f"{self.own_length:,} tokens{stretched}; text degrades there. {ways} at most "
            f"{self.stretched_length:,} tokens."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes and `text` as JSON types."""
        return vars(self) | {"text": self.text}


def length_warning(
    ctx_size: int, own_length: int, alpha_value: float, compress_pos_emb: float
) -> LengthWarning | None:
    """Return a warning for a context beyond the model's length, else None.

    Args:
        ctx_size: tokens of context.
        own_length: the model's own length in tokens, with the RoPE scaling of its config.
        alpha_value, compress_pos_emb: the RoPE options of the plan.
    """
    reach = stretched(own_length, alpha_value, compress_pos_emb)
    if ctx_size <= reach:
        return None
    # For each option the other one keeps its value.
    for_alpha = ctx_size / stretched(own_length, 1.0, compress_pos_emb)
    for_compress = ctx_size / stretched(own_length, alpha_value, 1.0)
    return LengthWarning(
        ctx_size, own_length, reach, _allowed(alpha_for(for_alpha)), _allowed(_up(for_compress))
    )


def alpha_for(stretch: float) -> float:
    """Return the recommended `alpha_value` for a context `stretch` times the model's length.

    The parabola is ExLlama's fit to measured perplexities. TabbyAPI uses it too, and the values
    that the web UI recommends (1.75 for 1.5 times, 2.5 for twice) are near it.
    """
    fitted = -0.13436 + 0.80541 * stretch + 0.28833 * stretch * stretch
    return max(round(fitted, 1), _up(stretch))


def _up(value: float) -> float:
    """Round up to tenths, the step of the sliders of the pages."""
    return math.ceil(value * 10) / 10


def _allowed(value: float) -> float | None:
    return value if value <= MAX_FACTOR else None
