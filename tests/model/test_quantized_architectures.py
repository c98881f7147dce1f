"""Every architecture in EXL2 and GPTQ folders, against transformers with the decoded weights."""

import json
import os
import random

import pytest

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidCheckpoint
from support.hf_models import (
    COMMON,
    MODELS,
    expected_logits,
    load_model,
    make_model,
    relative_error,
)
from support.model_builder import build_model, run_chunks
from support.quantized_folder import quantize_folder

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 1e-4
# Compiled operations round activations to a few bits in front of quantised matrices.
COMPILED_BOUND = 2e-2
NUM_IDS = 40
# Sizes that are inputs of a linear layer somewhere.
SIZES = ("hidden_size", "intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")


def quantize(name, format, seed, folder):
    """Write a quantised model; returns a text, and what transformers makes of it."""
    sizes = {key: value for key, value in (COMMON | MODELS[name][1]).items() if key in SIZES}
    whole = {key: -(-value // 32) * 32 for key, value in sizes.items()}
    make_model(name, seed, folder / "source", **whole)
    twin = quantize_folder(folder / "source", folder / "m", format, seed)
    ids = [random.Random(seed + i).randrange(COMMON["vocab_size"]) for i in range(NUM_IDS)]
    return ids, expected_logits(load_model(twin), ids)


def error_of(model, cache, ids, chunk, expected):
    """Return the relative error of a text's logits, in a mixture that of the median row.

    Where two experts are nearly tied, rounding may send a row or two to the other one.
    """
    logits = run_chunks(model, cache, ids, chunk)
    if model.config.experts is None:
        return relative_error(logits, expected)
    return ((logits - expected).norm(dim=1) / expected.norm(dim=1)).median()


@pytest.mark.parametrize("format", ["dense", "gptq"])
@pytest.mark.parametrize("name", ["phi3-longrope", "falcon-new", "internlm2"])
def test_numbers_of_heads_that_fit_no_fused_tensor_are_refused(name, format, tmp_path):
    """Fewer key/value heads would leave rows over, and the rest in the wrong layers."""
    folder = tmp_path / "m"
    make_model(name, 12, folder)
    if format == "gptq":
        quantize(name, format, 12, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    key = "num_kv_heads" if "num_kv_heads" in config else "num_key_value_heads"
    (folder / "config.json").write_text(json.dumps(config | {key: 1}))
    with pytest.raises(InvalidCheckpoint, match="output features"):
        build_model(folder, ReferenceOps())


@pytest.mark.parametrize("format", ["exl2", "gptq"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, format, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    ids, expected = quantize(name, format, seed, tmp_path)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.format == format
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    assert error_of(model, cache, ids, NUM_IDS, expected) <= BOUND, seed
    compiled = get_ops()
    if compiled.name != "reference":
        model, cache = build_model(tmp_path / "m", compiled, cache_type="fp16")
        assert error_of(model, cache, ids, 7, expected) <= COMPILED_BOUND, seed
