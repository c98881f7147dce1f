"""The emulation itself: its wrappers against their definitions, and what it must catch."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import EmulatedLauncher
from cuda_emulation.launcher import FOLDER, REPO, emulation_spec

from exl_loader.kernels import toolchain

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="needs g++ or clang++")

SAMPLES = REPO / FOLDER / "samples.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1)]


@pytest.fixture(scope="module")
def launcher():
    return EmulatedLauncher(emulation_spec([Path(SAMPLES)]))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
def test_barrier_orders_threads(launcher, order):
    launcher.set_order(*order)
    given = np.arange(512, dtype=np.float32)
    out = np.zeros_like(given)
    launcher.prepare("reverse_kernel", (2, 1, 1), 256, 1024, pointer(given), pointer(out))()
    assert np.array_equal(out, given.reshape(2, 256)[:, ::-1].ravel())


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
def test_missing_barrier_shows(launcher, order):
    launcher.set_order(*order)
    given = np.arange(512, dtype=np.float32)
    out = np.zeros_like(given)
    launcher.prepare("racing_kernel", (2, 1, 1), 256, 1024, pointer(given), pointer(out))()
    assert np.isnan(out).any()
