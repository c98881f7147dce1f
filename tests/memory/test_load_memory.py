"""Loading takes its buffers and a few pieces of the file besides, measured by /proc."""

from __future__ import annotations

import sys

import pytest

from benchmarks.cpu import speed_models
from support import run_python

# A head of 37 MiB and layers of 2 to 8 MiB.
CONFIG = speed_models.GEOMETRY | {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 3,
    "num_attention_heads": 24,
}  # fmt: skip
# Modules that loading imports, objects that remain, and on each thread a piece of codes and a
# layer's scales. Less than the head.
ALLOWANCE_BYTES = 32 << 20

CHILD = """
import os, re, sys
os.environ["EXL_LOADER_THREADS"] = "2"  # each thread holds a piece
import torch
from exl_loader.backends import get_ops
import exl_loader

def status(key):
    with open("/proc/self/status") as file:
        return int(re.search(key + r":\\s+(\\d+)", file.read())[1]) * 1024

get_ops("cpu")
torch.set_num_threads(1)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = status("VmRSS")
model = exl_loader.load(sys.argv[1], ctx_size=256)
print(status("VmHWM") - before, model.allocated_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in /proc")
def test_loading_holds_no_tensor_besides_the_weights(tmp_path):
    folder = speed_models.write_exl2(tmp_path / "model", CONFIG)
    head_bytes = CONFIG["hidden_size"] * CONFIG["vocab_size"] * 6 // 8
    peak, allocated = map(int, run_python(CHILD, str(folder)).split())
    assert peak > allocated  # or nothing was measured
    assert ALLOWANCE_BYTES < head_bytes
    assert peak <= allocated + ALLOWANCE_BYTES
