"""What a quantised cache loses on a real model, SmolLM2-135M-Instruct.

The folder is made by `python tools/smollm2.py build/smollm2`; without it the test is skipped.
docs/cache_quality.md has the figures of long texts.
"""

from __future__ import annotations

import inspect
import tarfile

import pytest

from exl_loader import load
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.commands.evaluation import evaluate
from exl_loader.commands.evaluation_plan import parse_cache_types, plan_evaluation
from support import REPO

MODEL = REPO / "build" / "smollm2"
TOKENS = 1000
# Nats a token, twice the divergence that was measured when they were chosen.
LARGEST = {"q8": 2e-5, "q6": 1.7e-4, "q8_q4": 7e-4, "q4": 3.3e-3, "q4_q3": 5.6e-3, "q3": 1.5e-2}


@pytest.mark.smollm2
@pytest.mark.skipif(
    not (MODEL / "config.json").exists(),
    reason="no build/smollm2; python tools/smollm2.py build/smollm2 makes it",
)
def test_cache_types_diverge_little_from_16_bits():
    planned = plan_evaluation(
        str(MODEL), parse_cache_types(",".join(LARGEST)), config=ModelConfig.from_dir(MODEL),
        ctx_size=1024,
    )
    with load(MODEL, ctx_size=1024, device="cpu") as model:
        text = model.encode(inspect.getsource(tarfile)[:8000], add_bos=False)[:TOKENS]
        results = evaluate(model, planned, [text])
    found = {r.cache_type: r.divergence.mean for r in results.together if r.divergence}
    assert found.keys() == LARGEST.keys()
    assert all(found[name] <= most for name, most in LARGEST.items()), found
    # Each type is worth its bits, and keys are worth more than values.
    assert found["q8"] < found["q6"] < found["q8_q4"] < found["q4"] < found["q4_q3"] < found["q3"]
