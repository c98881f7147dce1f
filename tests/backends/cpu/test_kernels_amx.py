"""Products on AMX tiles: the bits of the other kernels, in every thread, where permitted."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess

import pytest
import torch

from exl_loader.backends.build.toolchain import find_compiler
from exl_loader.backends.cpu import amx
from exl_loader.backends.cpu.threads import default_threads
from exl_loader.utils import output
from support import run_python
from support.kernel_cases import compiled_ops, packed_linear, random_rows
from support.linear_cases import MAX_THREADS, equal_from_threads, product
from support.targets import Target, target

# Groups of (bits, rows): spans of half a step of a tile, of one and of two, whole and padded ones,
# and all bits together.
LAYOUTS = {
    "groups of 32": lambda bits: [(bits, 32)] * 9,
    "groups of 64": lambda bits: [(bits, 64)] * 5,
    "groups of 128": lambda bits: [(bits, 128)] * 5,
    "one group": lambda bits: [(bits, 552)],
    "uneven": lambda bits: [(bits, 96), (bits, 40), (bits, 31), (bits, 200)],
}
BITS = (2, 3, 4, 5, 6, 8)


@pytest.fixture
def tiles():
    """The kernels for this machine, with tiles on; skips where it has none."""
    ops = target("native", None, threads=2)
    if ops.ops.set_amx(True) != amx.ON:
        pytest.skip("no AMX tiles")
    yield ops
    ops.ops.set_amx(False)
    ops.ops.set_threads(default_threads())


def without_tiles(ops: Target, x: torch.Tensor, w, **arguments) -> torch.Tensor:
    ops.ops.set_amx(False)
    expected = product(ops, x, w, **arguments)
    ops.ops.set_amx(True)
    return expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", BITS)
def test_tiles_give_the_bits_of_the_other_kernels(tiles, bits, layout):
    seed = int.from_bytes(os.urandom(4), "little")
    groups = LAYOUTS[layout](bits)
    for zeros in (False, True):
        for columns in (1, 16, 50, 100, 129):
            w = packed_linear(groups, columns, zeros=zeros, perm=columns != 50, bias=columns > 50,
                              seed=seed)
            for rows in (9, 15, 16, 17, 47, 272):
                x = random_rows(rows, w.in_features, seed)
                expected = without_tiles(tiles, x, w)
                assert torch.equal(product(tiles, x, w), expected), (seed, zeros, columns, rows)


def test_any_number_of_rows_gives_the_same_bits(tiles):
    mixed = [(8, 64), (2, 32), (4, 128), (3, 96), (5, 40), (6, 160)]
    for zeros in (False, True):
        w = packed_linear(mixed, 40, zeros=zeros, perm=True, bias=True)
        x = random_rows(300, w.in_features)
        whole = without_tiles(tiles, x, w)
        for rows in range(1, 301):
            assert torch.equal(product(tiles, x[:rows].clone(), w), whole[:rows]), rows


def test_extreme_activations_give_the_same_bits(tiles):
    """The largest sums, zero rows, and rows with an infinity or a NaN."""
    for zeros in (False, True):
        w = packed_linear([(8, 128), (4, 128)], 48, zeros=zeros)
        w.codes.fill_(255)
        x = torch.ones(20, 256)
        x[1] = 0.0
        x[2] = -1.0
        x[3, 7] = float("inf")
        x[4, 200] = float("nan")
        x[5, ::2] = -1.0
        assert torch.equal(product(tiles, x, w).nan_to_num(7.0),
                           without_tiles(tiles, x, w).nan_to_num(7.0))


def test_products_are_added(tiles):
    w, x = packed_linear([(4, 128)] * 2, 70, bias=True), random_rows(33, 256)
    before = torch.randn(33, 70)
    expected = without_tiles(tiles, x, w, add_to=before)
    assert torch.equal(product(tiles, x, w, add_to=before), expected)


def test_every_worker_configures_its_tiles(tiles):
    """A tile instruction in a thread without a configuration would end the process."""
    w = packed_linear([(4, 128)] * 2, 16 * 200, perm=True)
    x = random_rows(40, 256)
    expected = without_tiles(tiles, x, w)
    for threads in range(1, MAX_THREADS + 1):
        tiles.ops.set_threads(threads)
        for _ in range(5):
            assert torch.equal(product(tiles, x, w), expected)


def test_calls_from_several_threads(tiles):
    layers = [packed_linear([(4, 128)] * 4, 256, seed=seed, perm=True) for seed in range(4)]
    x = random_rows(20, 512)
    expected = [without_tiles(tiles, x, w) for w in layers]
    assert equal_from_threads(lambda w: product(tiles, x, w), layers, expected)


def test_a_forked_child_has_tiles(tiles):
    w, x = packed_linear([(4, 128)] * 4, 256), random_rows(20, 512)
    expected = product(tiles, x, w)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(tiles, x, w), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_tiles_are_released(tiles, tmp_path):
    """Code that runs on the thread afterwards finds no configuration."""
    source, library = tmp_path / "palette.cpp", tmp_path / "palette.so"
    source.write_text(
        'extern "C" int palette() {\n'
        "    unsigned char config[64] = {};\n"
        '    asm volatile("sttilecfg %0" : "=m"(config));\n'
        "    return config[0];\n"
        "}\n", encoding="utf-8")
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run([*compiler.command, "-shared", "-fPIC", "-mamx-tile", source, "-o", library],
                   check=True)
    tiles.ops.set_threads(1)
    product(tiles, random_rows(20, 256), packed_linear([(4, 128)] * 2, 32))
    assert ctypes.CDLL(str(library)).palette() == 0


def test_a_fresh_opening_uses_tiles_without_a_warning(tiles, caplog):
    output.warn_once.cache_clear()
    tiles.ops.set_amx(False)
    amx.use_amx(tiles.ops)
    assert not caplog.records
    assert amx.products_are_right(tiles.ops)


class Recorder:
    """Operations whose library answers `state`, and whose products on tiles may be wrong."""

    def __init__(self, state: int, error: float = 0.0):
        self.ops = compiled_ops()
        self.state, self.error, self.on = state, error, False

    def set_amx(self, on: bool) -> int:
        self.on = on and self.state == amx.ON
        return self.state if on else amx.OFF

    def linear(self, x, w, out, scratch, add=False) -> None:
        self.ops.linear(x, w, out, scratch, add)
        if self.on:
            out[-1, -1] += self.error


@pytest.mark.parametrize(("recorder", "reason"), [
    (lambda: Recorder(amx.ON, error=1e-4), "wrong"),
    (lambda: Recorder(amx.REFUSED), "does not permit"),
])  # fmt: skip
def test_a_machine_whose_tiles_fail_says_so_and_goes_on(recorder, reason, caplog):
    output.warn_once.cache_clear()
    ops = recorder()
    with caplog.at_level(logging.WARNING, logger="exl_loader"):
        amx.use_amx(ops)
    assert not ops.on
    (record,) = caplog.records
    assert reason in record.message and "AMX" in record.message


def test_right_tiles_stay_on(caplog):
    ops = Recorder(amx.ON)
    amx.use_amx(ops)
    assert ops.on and not caplog.records


@pytest.mark.parametrize(("features", "march", "warnings"), [
    (("x86_64", "amx_int8", "amx_tile"), "", 1),
    (("x86_64", "amx_int8", "amx_tile"), "x86-64-v3", 0),
    (("x86_64", "avx512_vnni"), "", 0),
])  # fmt: skip
def test_kernels_without_amx_warn_only_on_a_machine_with_it(monkeypatch, caplog, features, march,
                                                            warnings):
    output.warn_once.cache_clear()
    monkeypatch.setattr(amx, "cpu_features", lambda: features)
    monkeypatch.setenv("EXL_LOADER_MARCH", march)
    with caplog.at_level(logging.WARNING, logger="exl_loader"):
        amx.use_amx(Recorder(amx.NOT_COMPILED))
    assert len(caplog.records) == warnings


REFUSED_BY_THE_SYSTEM = """
import ctypes, logging
logging.basicConfig()
# Linux refuses tiles to a process with a thread whose signal stack is too small for their state.
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import sys
sys.path.insert(0, "tests")
import torch
from exl_loader.backends.cpu import amx
from exl_loader.backends.cpu.open import open_compiled
from support.kernel_cases import packed_linear, random_rows
from exl_loader.backends.cpu.linear import linear_scratch_bytes
ops = open_compiled()
w, x, out = packed_linear([(4, 128)] * 4, 256, seed=3), random_rows(20, 512), torch.empty(20, 256)
ops.linear(x, w, out, torch.empty(linear_scratch_bytes(20, 512), dtype=torch.uint8))
print(ops.set_amx(True), out.double().sum().item().hex())
"""


def test_a_process_without_permission_runs_without_tiles(tiles):
    w, x = packed_linear([(4, 128)] * 4, 256, seed=3), random_rows(20, 512)
    expected = product(tiles, x, w).double().sum().item()
    assert run_python(REFUSED_BY_THE_SYSTEM).split() == [str(amx.REFUSED), expected.hex()]


@pytest.mark.slow
def test_kernels_of_a_machine_without_tiles_give_the_same_bits(tiles):
    """The kernels for AVX2, which are all that such a machine compiles."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("instruction sets of x86-64")
    other = target("x86-64-v3", None, threads=2)
    assert other.ops.set_amx(True) == amx.NOT_COMPILED
    w = packed_linear([(4, 128), (6, 64), (2, 32)], 50, zeros=True, perm=True)
    for rows in (9, 40):
        x = random_rows(rows, w.in_features)
        assert torch.equal(product(other, x, w), product(tiles, x, w))
