"""The models this engine runs: one table entry per Hugging Face architecture, data only.

docs/adding_an_architecture.md explains how to add one. `fields` has the record of an entry. Only
`checkpoint`, `model/builder.py` and `model/adapters.py` use the entries: all else sees parts, and
the numbers in `ModelConfig`.
Tensor names, default values and sliding windows are those of the `transformers` library
(`modeling_*.py` and `configuration_*.py` of version 5.23, and version 4 where it differs).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .fields import Architecture
from .layer_norm import LAYER_NORM
from .llama_like import LLAMA_LIKE
from .mixtures import MIXTURES

__all__ = ["ALIASES", "ARCHITECTURES", "Architecture"]

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {entry.name: entry for entry in (*LLAMA_LIKE, *LAYER_NORM, *MIXTURES)}
)

# The class was spelt this way before it was merged into `transformers`; folders of that
# time still say so.
ALIASES: Mapping[str, str] = MappingProxyType({"LLaMAForCausalLM": "LlamaForCausalLM"})
