"""The model that ships: its size, that it knows Python, and that its figures are honest."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch

import exl_loader
from exl_loader.convert.calibration import _CODE, _DOCUMENTATION
from support import REPO

DEMO = REPO / "exl_loader" / "demo_model"
MOST_BYTES = 8_000_000

# Written for this test, so that it is in no training file.
SNIPPET = '''
class Counter:
    """Count how often each word was seen."""

    def __init__(self, words=None):
        self.counts = {}
        if words is not None:
            for word in words:
                self.add(word)

    def add(self, word):
        self.counts[word] = self.counts.get(word, 0) + 1

    def __len__(self):
        return len(self.counts)
'''


@pytest.fixture(scope="module")
def demo():
    with exl_loader.load(DEMO, ctx_size=1024) as model:
        yield model


def corpus_module():
    """Import tools/demo_corpus.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(
        "demo_corpus", REPO / "tools" / "demo_corpus.py"
    )
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_small_and_exl2():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MOST_BYTES
    config = json.loads((DEMO / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "exl2"


def test_tokenizer_keeps_source_text_exactly(demo):
    for text in (SNIPPET, "  two\n\tTab  and   runs \n\n\n", "é 漢字 😀 \x00"):
        ids = demo.encode(text)
        assert ids[0] == demo.config.bos_token_id and demo.decode(ids) == text


def test_it_knows_python(demo):
    """Uniform guessing has perplexity 2048; the scrambled text shows it is not the tokens."""

    def perplexity(ids: list[int]) -> float:
        log_probs = demo.prompt_logits(ids[:-1]).double().log_softmax(-1)
        taken = log_probs.gather(1, torch.tensor(ids[1:])[:, None])
        return math.exp(-taken.mean().item())

    ids = demo.encode(SNIPPET)
    order = torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(1))
    scrambled = [ids[0], *(ids[1 + i] for i in order.tolist())]
    assert perplexity(ids) < 12 and perplexity(scrambled) > 10 * perplexity(ids)


def test_it_writes_python(demo):
    texts = []
    for seed in range(3):
        settings = {"max_new_tokens": 120, "temperature": 0.7, "top_p": 0.9, "seed": seed}
        texts.append("".join(demo.generate("class Queue:\n    def __init__(self", settings)))
    text = "\n".join(texts)
    assert text.count("\n        ") >= 6 and text.count("self.") >= 3
    assert text.count("    def ") + text.count("        return") >= 3


def test_default_calibration_has_no_held_out_file():
    corpus = corpus_module()
    held_out = {file.name for file in corpus.collect().held_out}
    assert held_out and not held_out & {*_CODE, _DOCUMENTATION}
