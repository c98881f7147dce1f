"""Folders written by auto-round, compared with the weights that auto-round computes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from exl_loader import load, plan
from exl_loader.checkpoint import Checkpoint, is_quantised
from exl_loader.formats import linear_spec, read_linear
from support import REPO
from support.auto_round_writer import IDS, VARIANTS
from support.makers import warnings_of_weights

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("auto_round") is None, reason="auto-round is not installed"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


WRITER = REPO / "tests" / "support" / "auto_round_writer.py"
# With the writer, the versions of these packages determine the contents of the folders.
PACKAGES = ("auto-round", "torch", "transformers")


@pytest.fixture(scope="module")
def written() -> Path:
    """Return the folders of all variants, kept between runs and shared by pytest's processes."""
    key = hashlib.sha256(WRITER.read_bytes())
    key.update(" ".join(map(metadata.version, PACKAGES)).encode())
    cache = REPO / "build" / "test-cache"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"auto_round-{key.hexdigest()[:16]}"
    with FileLock(cache / "auto_round.lock"):
        if not folder.exists():
            for outdated in cache.glob("auto_round-*"):
                shutil.rmtree(outdated)
            unfinished = Path(tempfile.mkdtemp(prefix="auto_round-", dir=cache))
            _write(unfinished)
            unfinished.rename(folder)
    return folder


def _write(folder: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, WRITER, folder], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_equal_those_of_auto_round(written, name):
    folder, variant = written / name, VARIANTS[name]
    assert is_quantised(folder) and plan(folder, ctx_size=256).format == "gptq"
    measured = torch.load(folder / "dequantised.pt")
    widths = set()
    with Checkpoint.open(folder) as checkpoint:
        for key, value in measured.items():
            if "_proj" not in key:
                continue
            spec = linear_spec(checkpoint, key.removesuffix(".weight"), *value.t().shape)
            found = read_linear(spec, checkpoint).weight().t()
            widths.add(spec.options.get("bits", 16))
            # auto-round computes in bfloat16. A zero point that is wrong by one changes a weight by
            # one step, which is at least 1/256 of the largest weight.
            step = float(value.abs().max()) / 1024
            torch.testing.assert_close(found, value.float(), rtol=2**-7, atol=step)
    assert widths == {variant.bits} | ({8, 16} if variant.layers else set())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_auto_rounds_weights(written, name, caplog):
    expected = torch.load(written / name / "logits.pt")
    with load(written / name, ctx_size=256, cache_type="fp32", device="cpu") as model:
        found = model.prompt_logits(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.01
    assert not warnings_of_weights(caplog), "auto-round's own settings cause no warning"
