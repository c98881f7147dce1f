"""A model on several devices gives the bits that it gives on one. No card is needed here.

The devices are `cpu`, `cpu:1` and so on: main memory in buffers of their own, and the same
operations. `test_cuda_stages.py` has the same on emulated cards.
"""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends import get_ops
from support.hf_models import MODELS, make_model
from support.model_builder import build_model, run_chunks, split, together

# Tied embeddings, biases of keys, experts, soft caps with windows, frequencies by length,
# fused sources with norms of heads, two RoPEs, layers without RoPE, attention beside the MLP.
NAMES = ["llama-tied", "qwen2", "mixtral", "gemma2", "phi3-longrope", "llama-dynamic", "qwen3",
         "gemma3", "cohere2", "nemotron"]
IDS = [(7 * i * i + 3) % 331 for i in range(44)]


@pytest.mark.parametrize("name", NAMES)
def test_a_split_model_gives_the_bits_of_one_device(name, tmp_path):
    make_model(name, 3, tmp_path / "m", "float16")
    ops, options = get_ops("cpu"), {"cache_type": "q4", "sequences": 3}
    found = []
    count = MODELS[name][1].get("num_hidden_layers", 3)
    for devices in (split(count), split(1, count - 1), split(1, 1, count - 2)):
        model, cache = build_model(tmp_path / "m", ops, device=devices, **options)
        assert len(model._local.stages) == len(devices.devices)
        found.append([
            run_chunks(model, cache, IDS, 17), run_chunks(model, cache, IDS[:20], 1, total=44),
            together(model, cache, [IDS, IDS[20:], IDS[10:30]]),
        ])
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))
