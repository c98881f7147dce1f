"""SmolLM2-135M-Instruct, a real model: logits, tokenizer, chat and bytes.

The folder is made by `python tools/smollm2.py build/smollm2`, as `.ci/run` does. Without it these
tests are skipped. Bounds are those of `test_model_architectures.py`.
"""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import exl_loader  # noqa: E402
from exl_loader.backends import get_ops  # noqa: E402
from exl_loader.backends.reference.ops import ReferenceOps  # noqa: E402
from support import REPO  # noqa: E402
from support.hf_models import expected_logits, load_model, relative_error  # noqa: E402
from support.model_builder import build_model, run_chunks  # noqa: E402

MODEL = REPO / "build" / "smollm2"
pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not (MODEL / "config.json").exists(),
        reason="no build/smollm2; python tools/smollm2.py build/smollm2 makes it",
    ),
]

TEXTS = (
    "The quick brown fox jumps over the lazy dog. In 1984 there were 12,345 of them.",
    "def f(x):\n    # doubles\n\treturn x * 2\n\n\nprint(f(21))\n",
    "Grüße aus Köln — 東京へ行きます 😀 naïve café\r\n  three  spaces",
    "<|im_start|>user\nHello<|im_end|>\n",
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def transformers_model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def ids():
    """Return 96 token ids of the texts and the README, from a random offset."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = "\n".join(TEXTS) + (REPO / "README.md").read_text(encoding="utf-8")
    first = random.randrange(200)
    return tokenizer(text).input_ids[first : first + 96]


@pytest.mark.parametrize(
    ("kind", "cache_type", "bound"), [("reference", "fp32", 2e-5), ("cpu", "fp16", 2e-2)]
)
def test_logits_equal_transformers(kind, cache_type, bound, transformers_model, ids):
    ops = ReferenceOps() if kind == "reference" else get_ops()
    if ops.name != kind:
        pytest.skip("no compiler")
    model, cache = build_model(MODEL, ops, cache_type=cache_type)
    whole = run_chunks(model, cache, ids, len(ids))
    assert relative_error(whole, expected_logits(transformers_model, ids)) <= bound
    assert relative_error(run_chunks(model, cache, ids, 37), whole) <= 1e-5


def test_tokens_and_chat_equal_transformers():
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    with exl_loader.load(MODEL, ctx_size=512, device="cpu") as model:
        for text in TEXTS:
            assert model.encode(text, add_bos=False) == theirs(text).input_ids
            assert model.decode(model.encode(text, add_bos=False), skip_special=False) == text
        expected = theirs.apply_chat_template(
            QUESTION, tokenize=False, add_generation_prompt=True
        )
        assert model.apply_chat_template(QUESTION) == expected


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q6", "q4", "q3"])
def test_it_answers_a_question_in_the_planned_memory(cache_type):
    options = {"ctx_size": 512, "cache_type": cache_type, "device": "cpu"}
    reservation = exl_loader.plan(MODEL, **options)
    with exl_loader.load(MODEL, **options) as model:
        assert model.allocated_bytes() == reservation.total_bytes
        prompt = model.apply_chat_template(QUESTION)
        answer = "".join(model.generate(prompt, max_new_tokens=20, temperature=0))
    assert "Paris" in answer
