"""Planning reads headers alone: quickly, without PyTorch, without a weight."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sparse import LLAMA_2_7B, exl2_tensors, write_sparse_exl2
from tiny import CONFIG

SHARDS = 10
# 37 tensors a layer and 8 around them.
LAYERS = 54
LIMIT_S = 0.1

SCRIPT = """
import json, sys, time
import exl_loader
assert "torch" not in sys.modules
def timed(**options):
    started = time.process_time()
    exl_loader.plan(sys.argv[1], 18432, "q4", **options)
    return time.process_time() - started
single = [timed() for _ in range(5)]
split = [timed(vram="3GiB,2GiB,4GiB,24GiB") for _ in range(3)]
print(json.dumps({
    "single": min(single), "first": single[0], "split": min(split),
    "torch": "torch" in sys.modules, "numpy": "numpy" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    config = LLAMA_2_7B | {"num_hidden_layers": LAYERS}
    assert len(exl2_tensors(CONFIG | config, 4, 6)) >= 2000
    folder = tmp_path_factory.mktemp("large") / "model"
    return write_sparse_exl2(folder, shards=SHARDS, **config)


def test_two_thousand_tensors_in_ten_shards_within_a_tenth_of_a_second(large_model):
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(large_model)], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert not found["torch"] and not found["numpy"]
    # The processor's time, and the best of some: the machine may be busy, the work is the same.
    assert found["single"] < LIMIT_S, found
    assert found["split"] < LIMIT_S, found


def test_the_command_needs_no_torch_either(large_model, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('planning must not need PyTorch')")
    answer = subprocess.run(
        [sys.executable, "-m", "exl_loader", "plan", str(large_model), "--json"],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["num_layers"] == LAYERS
