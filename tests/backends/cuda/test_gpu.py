"""Tests that need a card: the driver's figures, long texts, and compute-sanitizer.

`pytest -m gpu` runs this file and the `gpu` variants of the others: every kernel against the
reference (operations/, test_cuda_linear, _pack, _attention), and whole models
(test_cuda_model).
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import pytest
import torch

import exl_loader
from benchmarks.cuda import speed_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]

DEVICE = "cuda:0"
CTX = 18432
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of 1.1 B parameters at 4 bits."""
    return speed_models.write_model(
        tmp_path_factory.mktemp("gpu") / "1B", speed_models.GEOMETRIES["1B"]
    )


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Load context, kernels and PyTorch's own modules before anything is measured."""
    small = speed_models.write_model(
        tmp_path_factory.mktemp("gpu") / "dry", speed_models.GEOMETRIES["dry"]
    )
    with exl_loader.load(small, ctx_size=512, device=DEVICE) as model:
        list(model.generate_ids([5] * 300, {"max_new_tokens": 8, "ban_eos_token": True}))


def free_bytes():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_the_driver_sees_what_was_reserved(folder, cache_type):
    before = free_bytes()
    planned = exl_loader.plan(folder, ctx_size=CTX, cache_type=cache_type, device=DEVICE)
    with exl_loader.load(folder, ctx_size=CTX, cache_type=cache_type, device=DEVICE) as model:
        taken = before - free_bytes()
        assert model.reservation.total_bytes == planned.total_bytes == model.allocated_bytes()
        assert planned.devices[0].overhead_measured
        assert abs(taken - planned.total_bytes) <= 0.01 * planned.total_bytes
    assert before - free_bytes() <= 0.01 * planned.total_bytes


def test_two_full_contexts_within_the_reservation(folder):
    """Two responses over the full context use no more than the reservation."""
    total = exl_loader.plan(folder, ctx_size=CTX, cache_type="q4", device=DEVICE).total_bytes
    settings = {"max_new_tokens": CTX, "ban_eos_token": True, "temperature": 0}
    with exl_loader.load(folder, ctx_size=CTX, cache_type="q4", device=DEVICE,
                         memory_limit=total) as model:
        after = []
        for first in (5, 6):
            generation = model.generate_ids([first] * (CTX - 2048), settings)
            assert len(list(generation)) == 2048
            assert generation.finish_reason == "context"
            after.append(free_bytes())
        assert model.allocated_bytes() == total
        assert abs(after[0] - after[1]) <= 16 * MIB


def test_reloading_leaves_nothing_behind(folder):
    before = free_bytes()
    for _ in range(5):
        with exl_loader.load(folder, ctx_size=2048, device=DEVICE) as model:
            list(model.generate_ids([5, 6, 7], {"max_new_tokens": 4}))
    assert before - free_bytes() <= 16 * MIB


def test_steps_are_captured(folder):
    def steps(forward, cache):
        sequence = cache.acquire(100)
        eager = forward.forward([(sequence, [5])]).clone()
        for _ in range(2):
            sequence.past_len = 0
            yield torch.equal(forward.forward([(sequence, [5])]), eager)
        parts = [part for step in forward._local.steps.values() for part in step.stages]
        yield [part.graph is not None for part in parts]

    with exl_loader.load(folder, ctx_size=2048, device=DEVICE) as model:
        assert list(model.run_alone(steps)) == [True, True, [True]]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH")
    small = speed_models.write_model(tmp_path / "m", speed_models.GEOMETRIES["dry"])
    script = (
        "import exl_loader\n"
        f"with exl_loader.load({str(small)!r}, ctx_size=512, cache_type='q4',"
        f" device={DEVICE!r}) as model:\n"
        "    list(model.generate_ids([5] * 300, {'max_new_tokens': 3, 'ban_eos_token': True}))\n"
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", script]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-4000:]
