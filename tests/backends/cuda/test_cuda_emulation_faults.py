"""Faults of kernels that the emulation must catch."""

import ctypes
import re

import numpy as np
import pytest

from exl_loader.backends.build import toolchain
from support.cuda_emulation import EmulatedLauncher, EmulationError
from support.cuda_emulation.arrays import aligned, run
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec, sanitized
from support.cuda_emulation.sanitized import EXIT_CODE, run_sanitized, runtimes

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="needs g++ or clang++")

SAMPLES = REPO / FOLDER / "samples.cu"
FAULTS = re.findall(r"k[A-Z]\w+", SAMPLES.read_text().partition("enum Fault")[2].partition("}")[0])


@pytest.fixture(scope="module")
def built():
    return EmulatedLauncher(emulation_spec([SAMPLES]))


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def launcher(built, request):
    built.set_order(request.param)
    return built


MESSAGES = {
    "kDivergentWarp": r"threads diverge: 0 waits at shfl \(samples.cu:\d+\), 16 waits at ballot",
    "kDivergentBlock": r"0 waits at block_sync \(samples.cu:\d+\), 32 waits at warp_sync|"
    r"0 waits at block_sync \(samples.cu:\d+\), 32 has left the kernel",
    "kDivergentSites": r"0 waits at block_sync \(samples.cu:\d+\), 32 waits at block_sync",
    "kLeftEarly": r"32 waits at block_sync \(samples.cu:\d+\), 40 has left the kernel",
    "kLeftCopies": "left with copy_async16 under way",
    "kWroteBehind": "wrote behind the 1024 bytes of shared memory",
    "kMisalignedLoad": "load_nc16 of an address that is no multiple of 16",
    "kCopyToGlobal": "copy_async16 to what is not shared memory",
    "kMatrixOfGlobal": "load_matrix_x4 of an address that is not shared memory",
}


def run_fault(launcher, fault):
    memory = aligned(np.zeros((64, 4), dtype=np.uint32))
    run(launcher, "faulty_kernel", ctypes.c_int32(FAULTS.index(fault)), memory,
        ctypes.c_int32(1024), block=64, shared=1024)


@pytest.mark.skipif(sanitized(), reason="the sanitizer ends the process")
@pytest.mark.parametrize("fault", MESSAGES)
def test_fault_is_named(launcher, fault):
    with pytest.raises(EmulationError, match=f"^faulty_kernel, block .*({MESSAGES[fault]})"):
        run_fault(launcher, fault)
    # And the next launch works.
    given = np.arange(64, dtype=np.float32)
    out = np.zeros_like(given)
    run(launcher, "reverse_kernel", given, out, block=64, shared=256)
    assert np.array_equal(out, given[::-1])


SANITIZER_WORDS = {
    "kWroteBehind": "heap-buffer-overflow",
    "kReadBehind": "heap-buffer-overflow",
    "kReadGlobalBehind": "heap-buffer-overflow",
    "kSignedOverflow": "signed integer overflow",
}


@pytest.mark.skipif(not sanitized(), reason="run by test_sanitizers_end_the_process")
@pytest.mark.parametrize("fault", SANITIZER_WORDS)
def test_fault_under_sanitizers(built, fault):
    run_fault(built, fault)


@pytest.mark.skipif(sanitized() or not runtimes(), reason="needs gcc's sanitizers")
@pytest.mark.parametrize("fault", SANITIZER_WORDS)
def test_sanitizers_end_the_process(fault):
    result = run_sanitized(f"{__file__}::test_fault_under_sanitizers[{fault}]")
    assert result.returncode == EXIT_CODE and SANITIZER_WORDS[fault] in result.stdout


def test_every_fault_is_expected():
    assert set(FAULTS) == set(MESSAGES) | set(SANITIZER_WORDS)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "words"),
    [
        ((1, 1, 1), 33, 0, "33 threads a block"),
        ((1, 1, 1), 2048, 0, "2048 threads a block"),
        ((0, 1, 1), 32, 0, "a grid of"),
        ((1, 65536, 1), 32, 0, "a grid of"),
        ((1, 1, 1), 32, 65537, "65537 bytes of shared memory, of 65536"),
    ],
)
def test_impossible_launches_are_refused(built, grid, block, shared, words):
    with pytest.raises(EmulationError, match=words):
        built.prepare("grid_kernel", grid, block, shared, ctypes.c_void_p())


def test_more_threads_than_a_kernel_is_compiled_for_are_refused(built):
    with pytest.raises(EmulationError, match="rope_kernel: 160 threads a block, of 128"):
        built.prepare("rope_kernel", (1, 1, 1), 160, 0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((ctypes.c_void_p(),), "1 arguments, not 2"),
        ((ctypes.c_void_p(), ctypes.c_int32()), "argument 1 is a c_int, not p8"),
        ((ctypes.c_double(), ctypes.c_void_p()), "argument 0 is a c_double, not p8"),
    ],
)
def test_wrong_arguments_are_refused(built, args, words):
    with pytest.raises(EmulationError, match=words):
        built.prepare("reverse_kernel", (1, 1, 1), 32, 0, *args)


def test_unknown_kernel_is_refused(built):
    with pytest.raises(EmulationError, match="no kernel no_kernel"):
        built.prepare("no_kernel", (1, 1, 1), 32, 0)
