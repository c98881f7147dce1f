"""Every architecture in EXL2 and GPTQ folders, against transformers with the decoded weights."""

import json
import os
import random

import pytest

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidCheckpoint
from support.exhaustive import rotated
from support.hf_models import COMMON, MODELS, expected_logits, logits_error, make_model
from support.model_builder import build_model, run_chunks
from support.quantized_folder import make_quantized_model

pytestmark = pytest.mark.usefixtures("one_thread")

BOUND = 1e-4
# Compiled operations round activations to a few bits in front of quantised matrices.
COMPILED_BOUND = 2e-2
NUM_IDS = 40


@pytest.mark.parametrize("format", ["dense", "gptq"])
@pytest.mark.parametrize("name", ["phi3-longrope", "falcon-new", "internlm2"])
def test_numbers_of_heads_that_fit_no_fused_tensor_are_refused(name, format, tmp_path):
    """Fewer key/value heads would leave rows over, and the rest in the wrong layers."""
    folder = tmp_path / "m"
    make_model(name, 12, folder)
    if format == "gptq":
        make_quantized_model(name, format, 12, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    key = "num_kv_heads" if "num_kv_heads" in config else "num_key_value_heads"
    (folder / "config.json").write_text(json.dumps(config | {key: 1}))
    with pytest.raises(InvalidCheckpoint, match="output features"):
        build_model(folder, ReferenceOps())


@pytest.mark.parametrize(("name", "format"), rotated(sorted(MODELS), ["exl2", "gptq"]))
def test_logits_equal_transformers(name, format, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    ids = [random.Random(seed + i).randrange(COMMON["vocab_size"]) for i in range(NUM_IDS)]
    expected = expected_logits(make_quantized_model(name, format, seed, tmp_path), ids)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.format == format
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    assert logits_error(model, run_chunks(model, cache, ids, NUM_IDS), expected) <= BOUND, seed
    compiled = get_ops()
    if compiled.name != "reference":
        model, cache = build_model(tmp_path / "m", compiled, cache_type="fp16")
        rows = run_chunks(model, cache, ids, 7)
        assert logits_error(model, rows, expected) <= COMPILED_BOUND, seed
