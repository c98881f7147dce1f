"""Rotary position embeddings: the frequencies of every scaling scheme, in plain floats.

Formulas and key names are those of `transformers` (`modeling_rope_utils.py`, version 5.23). Each
scheme names its paper. `transformers` computes in float32 and this module in float64, so values
agree within float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.errors import InvalidConfig, InvalidSettings, shown
from ..utils.json_keys import Keys

MAX_POSITIONS = (1 << 31) - 1
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding of a model, with the key names of Hugging Face's config.

    Args:
        rope_type: a key of `ROPE_TYPES`.
        rope_theta: base of the frequencies.
        rotary_dim: rotated elements of a head, which are the first ones; even.
        max_position_embeddings: the model's length in tokens.
        original_max_position_embeddings: the length before the scheme extended it.

    The other fields belong to single schemes and are None (or empty) for the others.
    """

    rope_type: str
    rope_theta: float
    rotary_dim: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def own_length(self) -> int:
        """The model's length in tokens, with the scaling of its config.

        With linear, dynamic or yarn scaling, `max_position_embeddings` may be the length before
        scaling, as in the documentation of transformers.
        """
        if self.rope_type not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        scaled = int(self.original_max_position_embeddings * (self.factor or 1.0))
        return min(MAX_POSITIONS, max(self.max_position_embeddings, scaled))

    @property
    def depends_on_length(self) -> bool:
        """True where frequencies depend on the length that a sequence will reach."""
        return self.rope_type in ("dynamic", "longrope")

    def length_class(self, rope_len: int) -> int:
        """Return a number that is equal for lengths with equal frequencies."""
        if self.rope_type == "dynamic":
            return max(rope_len, self.max_position_embeddings)
        if self.rope_type == "longrope":
            return int(rope_len > self.original_max_position_embeddings)
        return 0


def inv_freq(
    config: RopeConfig,
    rope_len: int,
    *,
    alpha_value: float = 1.0,
    compress_pos_emb: float = 1.0,
) -> tuple[list[float], float]:
    """Compute the rotation per token of each pair of elements.

    Args:
        config: the model's rotary embedding.
        rope_len: tokens that the sequence will reach. It selects the short or long factors of
            longrope and the base of dynamic scaling once for a sequence, so that processing it
            in chunks agrees with processing it at once.
        alpha_value: NTK-aware scaling: the base is multiplied by
            alpha ** (rotary_dim / (rotary_dim - 2)), which divides the slowest frequency by
            alpha and keeps the fastest.
        compress_pos_emb: positions are divided by it, in addition to the model's own scheme.

    Returns:
        rotary_dim / 2 frequencies in radians a token, the fastest first, and the factor on
        cosine and sine.

    Raises:
        InvalidSettings: alpha_value or compress_pos_emb is not a number from 1e-6 to 1e6.
    """
    check_scaling(alpha_value, compress_pos_emb)
    theta = config.rope_theta * _ntk(alpha_value, config.rotary_dim)
    frequencies, factor = ROPE_TYPES[config.rope_type](config, theta, rope_len)
    return [f / compress_pos_emb for f in frequencies], factor


def check_scaling(alpha_value: Any, compress_pos_emb: Any) -> None:
    """Raise InvalidSettings unless both are numbers from 1e-6 to 1e6."""
    for name, value in (("alpha_value", alpha_value), ("compress_pos_emb", compress_pos_emb)):
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or not 1 / MAX_FACTOR <= value <= MAX_FACTOR:
            raise InvalidSettings(
                name, expected=f"a number above 0, from {1 / MAX_FACTOR:g} to {MAX_FACTOR:g}",
                actual=shown(value), remedy="1 leaves the model as it is",
            )


def _ntk(alpha: float, dim: int) -> float:
    return alpha ** (dim / (dim - 2))


def _plain(dim: int, theta: float) -> list[float]:
    return [theta ** (-i / dim) for i in range(0, dim, 2)]


def _default(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """Su et al., RoFormer, arXiv:2104.09864."""
    return _plain(config.rotary_dim, theta), 1.0


def _linear(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """Position interpolation, Chen et al., arXiv:2306.15595."""
    assert config.factor is not None
    return [f / config.factor for f in _plain(config.rotary_dim, theta)], 1.0


def _dynamic(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """NTK-aware scaling that grows with the length beyond `max_position_embeddings`."""
    assert config.factor is not None
    length = max(rope_len, config.max_position_embeddings)
    stretch = config.factor * length / config.max_position_embeddings - (config.factor - 1)
    return _plain(config.rotary_dim, theta * _ntk(stretch, config.rotary_dim)), 1.0


def _llama3(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """Llama 3.1: divides slow frequencies by `factor`, keeps fast ones, interpolates between."""
    assert config.factor and config.low_freq_factor and config.high_freq_factor
    low, high = config.low_freq_factor, config.high_freq_factor
    frequencies = []
    for plain in _plain(config.rotary_dim, theta):
        turns = config.original_max_position_embeddings * plain / (2 * math.pi)
        keep = min(1.0, max(0.0, (turns - low) / (high - low)))
        frequencies.append(plain * (keep + (1 - keep) / config.factor))
    return frequencies, 1.0


def _yarn(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """YaRN, Peng et al., arXiv:2309.00071."""
    original = config.original_max_position_embeddings
    factor = config.factor or config.max_position_embeddings / original
    dim = config.rotary_dim

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_turns(config.beta_fast or 32.0)
    high = pair_with_turns(config.beta_slow or 1.0)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for i, plain in enumerate(_plain(dim, theta)):
        interpolate = min(1.0, max(0.0, (i - low) / (high - low)))
        frequencies.append(plain * (1 - interpolate + interpolate / factor))
    return frequencies, _yarn_attention_factor(config, factor)


def _yarn_attention_factor(config: RopeConfig, factor: float) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)


def _longrope(config: RopeConfig, theta: float, rope_len: int) -> tuple[list[float], float]:
    """LongRoPE, Ding et al., arXiv:2402.13753."""
    original = config.original_max_position_embeddings
    divisors = config.long_factor if rope_len > original else config.short_factor
    attention_factor = config.attention_factor
    if attention_factor is None:
        factor = config.factor or config.max_position_embeddings / original
        stretch = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    plain = _plain(config.rotary_dim, theta)
    return [f / d for f, d in zip(plain, divisors, strict=True)], attention_factor


ROPE_TYPES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def parse_ropes(
    keys: Keys, head_dim: int, max_position_embeddings: int,
    type_names: Mapping[str, str] | None = None, local_theta: str | None = None,
) -> tuple[RopeConfig, ...]:
    """Read the rotary embeddings from a config, in either layout.

    Transformers 4 has `rope_theta` at the top level and `rope_scaling` (or null) beside it.
    Transformers 5 has both in `rope_parameters`, which may be nested by layer type.

    Args:
        keys: the whole config.
        head_dim: elements of a head.
        max_position_embeddings: the model's length in tokens.
        type_names: other names of schemes in this architecture -> those in `ROPE_TYPES`.
        local_theta: in the layout of version 4, the config key of `rope_theta` of layers with a
            sliding window; None where these layers have no rotary embedding of their own.

    Returns:
        One for all layers; or one for layers that attend to everything, and another one for
        those with a sliding window.

    Raises:
        InvalidConfig: a scheme is unknown, or its values are missing or invalid.
    """
    scheme = keys.mapping("rope_scaling") or keys.mapping("rope_parameters") or {}

    def parse(scheme: Mapping[str, Any], theta_key: str = "rope_theta") -> RopeConfig:
        return _parse(keys, scheme, head_dim, max_position_embeddings, type_names or {}, theta_key)

    if local_theta is None:
        return (parse(_flatten(keys, scheme)),)
    local: Mapping[str, Any] = {}
    if any(isinstance(value, dict) for value in scheme.values()):
        nested = Keys(scheme, f"the RoPE settings of {keys.where}")
        local = nested.mapping("sliding_attention") or {}
        scheme = nested.mapping("full_attention") or {}
    ropes = parse(scheme), parse(local, local_theta)
    if ropes[1].depends_on_length:
        raise InvalidConfig(
            f"rope_parameters in {keys.where}",
            expected="a scheme that does not depend on the length, for a sliding window",
            actual=ropes[1].rope_type,
        )
    return ropes[:1] if ropes[0] == ropes[1] else ropes


def _parse(
    keys: Keys, scheme: Mapping[str, Any], head_dim: int, max_position_embeddings: int,
    type_names: Mapping[str, str], theta_key: str,
) -> RopeConfig:
    """Read one rotary embedding.

    Args:
        scheme: its own settings; the others are those of `parse_ropes`.
        theta_key: config key of its base, where the settings have none.
    """
    inherited = {
        name: keys.raw(key)
        for name, key in (
            ("rope_theta", theta_key), ("partial_rotary_factor", "partial_rotary_factor")
        )
        if keys.raw(key) is not None
    }
    rope = Keys(scheme, f"the RoPE settings of {keys.where}", inherited)
    rope_type = rope.text("rope_type") or rope.text("type") or "default"
    rope_type = type_names.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise rope.fail("rope_type", f"one of {', '.join(ROPE_TYPES)}", rope_type)
    partial = rope.number("partial_rotary_factor", 1e-3, 1.0)
    rotary_dim = int(head_dim * (1.0 if partial is None else partial))
    if "rotary_dim" in keys.defaults:
        # GPT-J rotates whole heads where it is null.
        rotary_dim = keys.integer("rotary_dim", 4, head_dim) or head_dim
    if rotary_dim % 2 or rotary_dim < 4:
        raise rope.fail("partial_rotary_factor", "an even number of rotated elements, 4 or more",
                        f"{rotary_dim} of a head's {head_dim}")
    # The top level wins, as in transformers, because Phi-3 has the value there.
    original = (
        keys.integer("original_max_position_embeddings", 2, MAX_POSITIONS)
        or rope.integer("original_max_position_embeddings", 2, MAX_POSITIONS)
        or max_position_embeddings
    )
    return RopeConfig(
        rope_type=rope_type,
        rope_theta=rope.required_number("rope_theta", 1.001, 1e15),
        rotary_dim=rotary_dim,
        max_position_embeddings=max_position_embeddings,
        original_max_position_embeddings=original,
        **_scheme_values(rope, rope_type, rotary_dim // 2),
    )


def _flatten(keys: Keys, scheme: dict[str, Any]) -> Mapping[str, Any]:
    """Unwrap settings nested by layer type, which must be equal for all layer types."""
    nested = [value for value in scheme.values() if isinstance(value, dict)]
    if not nested:
        return scheme
    if any(value != nested[0] for value in nested[1:]) or len(nested) != len(scheme):
        raise InvalidConfig(
            f"rope_parameters in {keys.where}",
            expected="the same RoPE settings in all layers",
            actual=f"different ones for {', '.join(map(str, scheme))}",
            remedy="Models with a rotary embedding per layer type are not supported",
        )
    return nested[0]


def _scheme_values(rope: Keys, rope_type: str, num_pairs: int) -> dict[str, Any]:
    """Read the values of one scheme; ignore keys of other schemes."""
    if rope_type == "default":
        return {}
    if rope_type in ("linear", "dynamic"):
        return {"factor": rope.required_number("factor", 1e-3, MAX_FACTOR)}
    if rope_type == "llama3":
        low = rope.required_number("low_freq_factor", 1e-3, MAX_FACTOR)
        high = rope.required_number("high_freq_factor", 1e-3, MAX_FACTOR)
        if high <= low:
            raise rope.fail("high_freq_factor", f"more than low_freq_factor ({low:g})")
        factor = rope.required_number("factor", 1e-3, MAX_FACTOR)
        return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    values: dict[str, Any] = {
        "factor": rope.number("factor", 1e-3, MAX_FACTOR),
        "attention_factor": rope.number("attention_factor", 1e-6, MAX_FACTOR),
    }
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            values[name] = rope.number(name, 0.0, MAX_FACTOR)
        values["truncate"] = rope.boolean("truncate") is not False
        return values
    for name in ("short_factor", "long_factor"):
        values[name] = rope.numbers(name, num_pairs, 1e-6, MAX_FACTOR)
        if values[name] is None:
            raise rope.fail(name, f"a list of {num_pairs} numbers")
    return values
