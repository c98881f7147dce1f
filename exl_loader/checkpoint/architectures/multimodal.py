"""Models that read images too, of which this engine runs the language part.

Their config.json has the language part's keys in `text_config`, and leaves out those that have
the default value of the language part's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextPart:
    """A language part.

    Args:
        architecture: name of its entry in `ARCHITECTURES`.
        defaults: its sizes, where `text_config` leaves them out.
    """

    architecture: str
    defaults: Mapping[str, Any]


_LLAMA = TextPart(
    "LlamaForCausalLM",
    {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
     "num_hidden_layers": 32, "num_attention_heads": 32},
)  # fmt: skip
_MISTRAL = TextPart(
    "MistralForCausalLM",
    {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
     "num_hidden_layers": 32, "num_attention_heads": 32},
)  # fmt: skip
_QWEN2 = TextPart("Qwen2ForCausalLM", {})
_QWEN2_VL = TextPart(
    "Qwen2ForCausalLM",
    {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_window_layers": 80},
)
_GEMMA3 = TextPart(
    "Gemma3ForCausalLM",
    {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
     "tie_word_embeddings": True},
)  # fmt: skip

# Class -> `model_type` of `text_config` -> language part. The first is that of a `text_config`
# without a `model_type`, and of a config.json without `text_config`.
MULTIMODAL: Mapping[str, Mapping[str, TextPart]] = {
    "LlavaForConditionalGeneration": {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2},
    "Mistral3ForConditionalGeneration": {"mistral": _MISTRAL},
    "Qwen2VLForConditionalGeneration": {"qwen2_vl_text": _QWEN2_VL, "qwen2_vl": _QWEN2_VL},
    "Qwen2_5_VLForConditionalGeneration": {
        "qwen2_5_vl_text": _QWEN2_VL, "qwen2_5_vl": _QWEN2_VL,
    },
    "Gemma3ForConditionalGeneration": {"gemma3_text": _GEMMA3},
}  # fmt: skip
