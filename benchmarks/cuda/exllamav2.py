"""Run exllamav2, where it is installed, on the models of speed.py: the peer to compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

CACHES = {
    "fp16": "ExLlamaV2Cache", "q8": "ExLlamaV2Cache_Q8", "q6": "ExLlamaV2Cache_Q6",
    "q4": "ExLlamaV2Cache_Q4",
}  # fmt: skip


def installed() -> bool:
    """Return whether exllamav2 is installed, without importing it, which compiles for minutes."""
    return importlib.util.find_spec("exllamav2") is not None


class Peer:
    """One model in exllamav2.

    Args:
        folder: the model.
        ctx_size: tokens of context.
        chunk_size: tokens of one pass over a prompt.
    """

    def __init__(self, folder: Path, ctx_size: int, chunk_size: int):
        import exllamav2

        self._module: Any = exllamav2
        config = exllamav2.ExLlamaV2Config(str(folder))
        config.max_seq_len, config.max_input_len = ctx_size, chunk_size
        self._ctx_size, self._vocab_size = ctx_size, config.vocab_size
        self._model = exllamav2.ExLlamaV2(config)
        self._model.load()
        self._cache: Any = None

    def use_cache(self, cache_type: str) -> bool:
        """Replace the cache by one of this type; return False if exllamav2 has no such type."""
        self._cache = None
        if cache_type not in CACHES or not hasattr(self._module, CACHES[cache_type]):
            return False
        torch.cuda.empty_cache()
        make = getattr(self._module, CACHES[cache_type])
        self._cache = make(self._model, batch_size=1, max_seq_len=self._ctx_size)
        return True

    @torch.inference_mode()
    def decode(self, depth: int, steps: int) -> None:
        """Generate greedily at a depth of `depth` tokens, whatever the cache holds."""
        self._cache.current_seq_len = depth
        token = torch.tensor([[5]])
        for _ in range(steps):
            logits = self._model.forward(token, self._cache, input_mask=None)
            token = logits[:, -1].argmax(dim=-1, keepdim=True).cpu()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        """Read a prompt and compute the logits of its last token."""
        self._cache.current_seq_len = 0
        ids = (torch.arange(tokens) % (self._vocab_size - 3) + 3)[None]
        self._model.forward(ids[:, :-1], self._cache, preprocess_only=True)
        self._model.forward(ids[:, -1:], self._cache)[:, -1].argmax().cpu()

    def unload(self) -> None:
        """Free the card's memory."""
        self._cache = None
        self._model.unload()
        torch.cuda.empty_cache()
