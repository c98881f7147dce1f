"""The reservation is kept: memory after full-context responses, measured from another process.

The failure this project exists to end is the second full-context response that runs out of
memory. A child process loads with the reservation itself as the device's limit and answers
when asked; this process reads the child's peak memory from /proc between its answers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import run_python
from support.exhaustive import some_of
from support.makers import write_quantized_model
from support.tiny import write_tiny_model

CTX = 18432
NEW_TOKENS = 32
MIB = 1 << 20
ALLOWED_GROWTH_BYTES = 16 * MIB

CHILD = """
import json, random, sys
import exl_loader
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import InvalidSettings, PromptTooLong

folder, cache_type = sys.argv[1], sys.argv[3]
ctx_size, new_tokens = int(sys.argv[2]), int(sys.argv[4])
total = exl_loader.plan(folder, ctx_size=ctx_size, cache_type=cache_type).total_bytes
model = exl_loader.load(folder, ctx_size=ctx_size, cache_type=cache_type, memory_limit=total)
SETTINGS = {"max_new_tokens": new_tokens, "ban_eos_token": True, "seed": 1}

def prompt(seed, length):
    return random.Random(seed).choices(range(3, 259), k=length)

def full(seed):
    count = len(list(model.generate_ids(prompt(seed, ctx_size - new_tokens), SETTINGS)))
    assert count == new_tokens, count

def stopped(seed):
    generation = model.generate_ids(prompt(seed, 700), SETTINGS)
    next(generation)
    model.stop()
    list(generation)

def cancelled(seed):
    generation = model.generate_ids(prompt(seed, 700), SETTINGS)
    next(generation)
    generation.close()

def wrong(seed):
    for bad, error in ((prompt(seed, ctx_size + 1), PromptTooLong), ([10**6], InvalidSettings)):
        try:
            list(model.generate_ids(bad, SETTINGS))
        except error:
            continue
        raise AssertionError(error)

def loaded(seed):
    assert model.allocated_bytes() == total

for line in sys.stdin:
    step, seed = line.split()
    globals()[step](int(seed))
    answer = [model.allocated_bytes(), memory.live_bytes(), total]
    print(json.dumps(answer), flush=True)
"""


class Child:
    """A process with a loaded model, driven a step at a time."""

    def __init__(self, folder: Path, cache_type: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(CTX), cache_type, str(NEW_TOKENS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._seed = 0

    def step(self, name: str) -> int:
        """Run a step; the buffers must be as planned. Returns the process's peak memory."""
        self._seed += 1
        try:
            print(name, self._seed, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pytest.fail(self.process.stderr.read())
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.process.stderr.read())
        allocated, live, total = json.loads(line)
        assert allocated == live == total, name
        return self.peak_bytes()

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(300)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def child(tiny_model_dir, request):
    running = Child(tiny_model_dir, request.param)
    yield running
    running.close()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("child", some_of(["q4", "q8", "q6", "fp16"], 3), indirect=True)
def test_the_third_full_context_response_takes_what_the_first_took(child):
    child.step("loaded")
    first = child.step("full")
    for disturbance in ("stopped", "cancelled", "wrong"):
        child.step(disturbance)
    second = child.step("full")
    child.step("cancelled")
    third = child.step("full")
    assert second - first <= ALLOWED_GROWTH_BYTES
    assert third - first <= ALLOWED_GROWTH_BYTES


@needs_proc
@pytest.mark.parametrize("child", ["q4"], indirect=True)
def test_short_responses_in_a_long_context(child):
    child.step("loaded")
    child.step("stopped")
    first = child.step("cancelled")
    for _ in range(3):
        child.step("wrong")
        child.step("stopped")
        last = child.step("cancelled")
    assert last - first <= ALLOWED_GROWTH_BYTES


LOADING = """
import json, sys
import exl_loader
from exl_loader import backends, engine, loader
from exl_loader.model import forward
from exl_loader.text import tokenizer

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

backends.get_ops("cpu")
device = exl_loader.plan(sys.argv[1], ctx_size=512).devices[0]
before = peak()
exl_loader.load(sys.argv[1], ctx_size=512)
print(json.dumps([peak() - before - device.total_bytes, device.overhead_bytes]))
"""


@needs_proc
@pytest.mark.parametrize("format", ["dense", "gptq", "exl2"])
def test_loading_itself_stays_within_the_overhead(tmp_path, format):
    folder = tmp_path / "m"
    config = {"hidden_size": 1024, "vocab_size": 20000, "num_hidden_layers": 1}
    if format == "dense":
        write_tiny_model(folder, **config)
    else:
        write_quantized_model(folder, format, config=config)
    beside_buffers, overhead = json.loads(run_python(LOADING, str(folder)))
    # PyTorch fills tables of its own at the first use of some operations.
    assert beside_buffers <= overhead + ALLOWED_GROWTH_BYTES
