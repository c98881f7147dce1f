"""The keys of config.json of which an architecture makes use, by their usual names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..utils.errors import InvalidConfig, UnsupportedArchitecture, shown
from ..utils.json_keys import Keys
from ..utils.output import warn_once
from .architectures.fields import Architecture

# Keys that change the forward pass of some architectures, most of them in the table -> values
# that change nothing. The classes of other architectures have no use for them.
_SPECIAL_KEYS = {
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,),
    "attention_multiplier": (), "logit_scale": (1,), "scale_emb": (1,), "scale_depth": (),
    "dim_model_base": (), "use_qk_norm": (False,), "qk_layernorm": (False,),
    "use_bidirectional_attention": (False,), "is_causal": (True,), "clip_qkv": (),
    "alibi": (False,), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "no_rope_layers": ([],), "attention_chunk_size": (), "attn_temperature_tuning": (False,),
    "use_parallel_residual": (False,), "parallel_attn": (False,),
}  # fmt: skip


class _OwnKeys(Keys):
    """Keys by their usual names, where an architecture names some of them otherwise.

    Args:
        names: usual name -> the architecture's.
    """

    def __init__(self, values: Mapping[str, Any], where: str, architecture: Architecture) -> None:
        super().__init__(values, where, architecture.defaults)
        self._names = architecture.keys

    def raw(self, key: str) -> Any:
        """Return the unchecked value, or its default, or None."""
        name = self._name(key)
        return self.values[name] if name in self.values else self.defaults.get(key)

    def _name(self, key: str) -> str:
        """Return the config's name of a key."""
        names = self._names.get(key, key)
        if isinstance(names, str):
            return names
        return next((name for name in names if name in self.values), names[0])

    def fail(self, key: str, expected: str, actual: Any = None) -> InvalidConfig:
        """Make the error for a key, which has the architecture's name of it."""
        value = self.raw(key) if actual is None else actual
        return Keys(self.values, self.where).fail(self._name(key), expected, value)


def own_keys_of(values: dict[str, Any], where: str, architecture: Architecture) -> Keys:
    """Return the keys of which an architecture has a use, and warn about others."""
    for section in architecture.sections:
        values = values | (Keys(values, where).mapping(section) or {})
    own = architecture.own_keys()
    foreign = [
        key for key, neutral in _SPECIAL_KEYS.items()
        if values.get(key) is not None and values[key] not in neutral and key not in own
    ]
    if foreign:
        warn_once(
            f"{where}: {architecture.name} has no use for {', '.join(foreign)}; if the model "
            "was trained with it, the output is wrong"
        )
    values = {key: value for key, value in values.items() if key not in foreign}
    return _OwnKeys(values, where, architecture)


def check_fixed(keys: Keys, architecture: Architecture) -> None:
    """Raise UnsupportedArchitecture where a key asks for what no part computes."""
    for key, value in architecture.fixed.items():
        actual = keys.raw(key)
        if actual is not None and actual != value:
            raise UnsupportedArchitecture(
                f"{key} in {keys.where}", expected=f"{value} in a {architecture.name}",
                actual=shown(actual), remedy="Choose a model without it",
            )
