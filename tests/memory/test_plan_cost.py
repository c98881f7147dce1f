"""Planning reads headers alone: each file once, in few calls, without PyTorch or a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sparse_models import exl2_tensors
from support import run_python
from support.sparse import LLAMA_2_7B, write_sparse_exl2
from support.tiny import CONFIG

SHARDS = 10
# 37 tensors a layer and 8 around them.
LAYERS = 54
# 108 and 324 with the five cache types that a plan shows. benchmarks/cpu/planning.py has the time.
CALLS_A_TENSOR = 150
CALLS_A_TENSOR_OF_A_SPLIT = 350

SCRIPT = """
import json, os, sys
import exl_loader
assert "torch" not in sys.modules
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
def bytes_read():
    try:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])
    except OSError:
        return None
def counted(**options):
    calls = 0
    def note(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
    sys.setprofile(note)
    exl_loader.plan(sys.argv[1], ctx_size=18432, cache_type="q4", **options)
    sys.setprofile(None)
    return calls
exl_loader.plan(sys.argv[1], ctx_size=18432, cache_type="q4")
opened.clear()
before = bytes_read()
exl_loader.plan(sys.argv[1], ctx_size=18432, cache_type="q4")
after = bytes_read()
files = [os.path.basename(path) for path in opened if path.startswith(sys.argv[1] + os.sep)]
print(json.dumps({
    "single": counted(), "split": counted(vram="3GiB,2GiB,4GiB,24GiB"), "files": files,
    "bytes_read": None if before is None else after - before,
    "torch": "torch" in sys.modules, "numpy": "numpy" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    config = LLAMA_2_7B | {"num_hidden_layers": LAYERS}
    assert len(exl2_tensors(CONFIG | config, 4, 6)) >= 2000
    folder = tmp_path_factory.mktemp("large") / "model"
    return write_sparse_exl2(folder, shards=SHARDS, **config)


@pytest.fixture(scope="module")
def counted(large_model):
    """Return calls and files of planning the large model, in a process of its own."""
    return json.loads(run_python(SCRIPT, str(large_model)))


def test_a_plan_of_two_thousand_tensors_needs_few_calls_per_tensor(counted):
    assert not counted["torch"] and not counted["numpy"]
    assert counted["single"] < CALLS_A_TENSOR * 2000
    assert counted["split"] < CALLS_A_TENSOR_OF_A_SPLIT * 2000


def test_plan_opens_each_file_once_and_reads_headers_alone(counted, large_model):
    shards = sorted(path.name for path in large_model.glob("*.safetensors"))
    assert sorted(name for name in counted["files"] if name.endswith(".safetensors")) == shards
    assert len(counted["files"]) == len(set(counted["files"])) == len(shards) + 1
    if counted["bytes_read"] is None:
        pytest.skip("only Linux counts the bytes that a process reads")
    headers = sum(header_bytes(large_model / name) for name in shards)
    # Besides the headers: config.json, and the system's files about memory and processes.
    assert headers <= counted["bytes_read"] < headers + (4 << 20)


def header_bytes(path: Path) -> int:
    """Return the size of a file's header: its length field and its text."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


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
