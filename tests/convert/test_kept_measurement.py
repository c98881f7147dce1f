"""The measurement that `install.py --demo smollm2` converts with."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks.sparse_models import llama_tensors, write_header_only
from exl_loader.convert.allocation import Option, allocate
from exl_loader.convert.measurement_file import read_measurement
from exl_loader.convert.roles import block_roles, layer_blocks
from exl_loader.convert.source import Source
from support import REPO

# tools/smollm2.py takes these numbers from the GGUF file.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "num_hidden_layers": 30, "max_position_embeddings": 8192, "hidden_size": 576, "head_dim": 64,
    "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "rope_theta": 1e5, "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2,
}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def source(tmp_path):
    """SmolLM2 without weights."""
    folder = tmp_path / "smollm2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    tensors = llama_tensors(SMOLLM2, lambda name, k, n: {f"{name}.weight": ("F16", (n, k))})
    write_header_only(folder / "model.safetensors", tensors)
    found = Source(folder)
    yield found
    found.close()


def test_the_kept_measurement_is_of_the_demos_model(source):
    install = module(REPO / "install.py")
    blocks = {}
    for index, layer in enumerate(source.parts.layers):
        blocks |= layer_blocks(index, layer)
    measured = read_measurement(install.SMOLLM2_MEASUREMENT, blocks)
    assert measured.keys() == blocks.keys()
    assert all(block.divergence is not None for block in measured.values())
    weights = sum(
        linear.spec.in_features * linear.spec.out_features
        for block in blocks.values() for linears in block_roles(block).values()
        for linear in linears
    )
    options = [
        [Option(one.size, one.error * block.divergence) for one in block.combinations]
        for block in measured.values()
    ]
    for bits in (float(install.SMOLLM2_BITS), 4.0, 6.0):
        chosen = allocate(options, int(bits * weights))
        size = sum(block[i].size for block, i in zip(options, chosen, strict=True))
        # The ways that were left out are not missed: the budget is used up.
        assert (bits - 0.01) * weights < size <= bits * weights


def test_a_measurement_that_is_made_smaller_keeps_what_a_budget_needs():
    tool = module(REPO / "tools" / "keep_measurement.py")
    ways = [
        {"accuracy": 1 - error, "total_bits": 1000 * bits, "q_proj": {"bits": [bits]}}
        for bits, error in ((2, 0.123456), (3, 0.0456789), (5, 0.0123456), (8, 0.00123456))
    ]
    values = {"measurement": {"block": ways}, "last_module_idx": 3,
              "exl_loader": {"version": "1", "divergence": {"block": 1.23456}}}
    found = tool.smaller(values, least=4, most=6)
    assert [way["total_bits"] for way in found["measurement"]["block"]] == [2000, 5000, 8000]
    assert [way["accuracy"] for way in found["measurement"]["block"]] == [
        0.8765, 0.98765, 0.998765
    ]
    assert found["exl_loader"]["divergence"] == {"block": 1.235}
    assert found["last_module_idx"] == 3


def test_a_smaller_measurement_is_written_as_json(tmp_path):
    tool = module(REPO / "tools" / "keep_measurement.py")
    values = {"measurement": {"a": [{"total_bits": 1}], "b": [{"total_bits": 2}]}, "more": 3}
    tool.write(values, tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == values
