"""Launching through the driver's API, against a driver that is none (fake_driver.cpp)."""

import ctypes
import os
import threading

import numpy as np
import pytest
from cuda_emulation.launcher import FOLDER, REPO, emulation_spec
from cuda_sources import cuda_compiler, sample_root

from exl_loader.errors import DeviceError, KernelBuildError
from exl_loader.kernels.build import build, build_entry
from exl_loader.kernels.cuda.driver import Driver, DriverLauncher, driver_release
from exl_loader.kernels.cuda.open import open_launcher
from exl_loader.kernels.cuda.spec import cuda_spec
from exl_loader.kernels.spec import BuildSpec
from exl_loader.kernels.toolchain import cpu_features, find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++"),
    pytest.mark.skipif(os.name == "nt", reason="the fake driver is for Linux"),
    pytest.mark.skipif(cuda_compiler("nvrtc") is None, reason="needs NVRTC"),
]

CAPABILITY = (9, 0)
KERNEL_BYTES = 60 << 10


@pytest.fixture(scope="module")
def library():
    """Path of the fake driver, which runs the emulated sample kernels."""
    spec = BuildSpec(
        name="fake_driver", root=REPO, sources=(f"{FOLDER}/fake_driver.cpp",), headers=(),
        compiler=find_compiler(), flags=("-std=c++17", "-O1", "-fPIC"), link_flags=("-shared",),
        cpu_features=cpu_features(),
    )
    return str(build(spec))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return sample_root(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def entry(root):
    return build_entry(cuda_spec(CAPABILITY, compiler=cuda_compiler("nvrtc"), root=root))


@pytest.fixture
def fake(library):
    functions = ctypes.CDLL(library)
    functions.fake_stream.restype = ctypes.c_uint64
    samples = ctypes.CDLL(str(build(emulation_spec([REPO / FOLDER / "samples.cu"]))))
    launch = ctypes.cast(samples.exl_emulated_launch, ctypes.c_void_p)
    functions.fake_configure(launch, *CAPABILITY, 13000)
    return functions


@pytest.fixture
def launcher(library, fake, entry):
    launcher = DriverLauncher(entry, 1, lambda: 77, Driver(library))
    yield launcher
    launcher.close()


def reverse(launcher, shared_bytes=1024):
    given = np.arange(512, dtype=np.float32)
    out = np.zeros_like(given)
    args = (ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    launch = launcher.prepare("reverse_kernel", (2, 1, 1), 256, shared_bytes, *args)
    return launch, lambda: np.array_equal(out, given.reshape(2, 256)[:, ::-1].ravel())


def test_kernel_is_launched_on_the_callers_stream(launcher, fake):
    launch, is_right = reverse(launcher)
    assert fake.fake_stream() != 77
    launch()
    assert is_right() and fake.fake_stream() == 77


def test_card_is_described(launcher, library):
    assert (launcher.multiprocessors, launcher.shared_limit_bytes) == (4, 99 << 10)
    assert Driver(library).capability(0) == CAPABILITY
    assert driver_release(library) == (13, 0)


def test_arguments_are_read_at_each_launch(launcher):
    class Pair(ctypes.Structure):
        _fields_ = [("values", ctypes.c_void_p), ("count", ctypes.c_int32)]

    values, out = np.array([1, 2.5], dtype=np.float32), np.zeros(4)
    big = ctypes.c_int64(-(2**40))
    launch = launcher.prepare(
        "arguments_kernel", (1, 1, 1), 32, 0, ctypes.c_void_p(out.ctypes.data), big,
        ctypes.c_int32(-7), ctypes.c_float(0.25), Pair(values.ctypes.data, 2),
    )
    launch()
    assert out.tolist() == [-(2.0**40), -7, 0.25, 2.5]
    big.value = 5
    launch()
    assert out[0] == 5


def test_large_shared_memory_is_asked_for(launcher):
    small, _ = reverse(launcher)
    launch, is_right = reverse(launcher, KERNEL_BYTES)
    launch()
    assert is_right()
    # A smaller launch of the same kernel takes nothing back from the larger one.
    small()
    less, less_is_right = reverse(launcher, KERNEL_BYTES - 1024)
    less()
    assert less_is_right()
    launch()
    with pytest.raises(DeviceError, match="cuFuncSetAttribute"):
        reverse(launcher, 100 << 10)


def test_other_threads_and_other_cards_contexts(launcher, fake):
    """A thread without a context, and one in which another card is current."""
    launch, is_right = reverse(launcher)
    seen = []

    def work(card):
        if card is not None:
            fake.fake_push(card)
        launch()
        seen.append((card, is_right(), fake.fake_current()))

    for card in (None, 0, 1):
        thread = threading.Thread(target=work, args=(card,))
        thread.start()
        thread.join()
    assert seen == [(None, True, -1), (0, True, 0), (1, True, 1)]


def test_closing_gives_all_back(library, fake, entry):
    before = fake.fake_modules(), fake.fake_retained(0)
    launcher = DriverLauncher(entry, 0, lambda: 0, Driver(library))
    assert fake.fake_modules() == before[0] + 1 and fake.fake_retained(0) == before[1] + 1
    launcher.close()
    launcher.close()
    assert (fake.fake_modules(), fake.fake_retained(0)) == before
    assert fake.fake_current() == -1


def test_a_launcher_lives_as_long_as_what_it_prepared(library, fake, entry):
    before = fake.fake_modules(), fake.fake_retained(0)
    launcher = DriverLauncher(entry, 0, lambda: 77, Driver(library))
    launch, is_right = reverse(launcher)
    del launcher
    launch()
    assert is_right() and fake.fake_modules() == before[0] + 1
    del launch
    assert (fake.fake_modules(), fake.fake_retained(0)) == before
    assert fake.fake_current() == -1


def test_cubins_of_another_card_are_refused(library, fake, entry, tmp_path):
    before = fake.fake_modules(), fake.fake_retained(0)
    bad = tmp_path / "bad.cubin"
    bad.write_bytes(b"no cubin")
    other = type(entry)(tmp_path, (*entry.files, bad))
    with pytest.raises(DeviceError, match=r"device kernel image is invalid \(200\)"):
        DriverLauncher(other, 0, lambda: 0, Driver(library))
    assert (fake.fake_modules(), fake.fake_retained(0)) == before


def test_unknown_kernel_is_named(launcher):
    with pytest.raises(DeviceError, match=r"kernel no_kernel: named symbol not found \(500\)"):
        launcher.prepare("no_kernel", (1, 1, 1), 32, 0)


def test_failed_kernel_is_named(launcher):
    memory = np.zeros(1024, dtype=np.uint8)
    args = (ctypes.c_int32(0), ctypes.c_void_p(memory.ctypes.data), ctypes.c_int32(1024))
    launch = launcher.prepare("faulty_kernel", (1, 1, 1), 64, 1024, *args)
    message = "launch of faulty_kernel on cuda:1: .*threads diverge.*start"
    with pytest.raises(DeviceError, match=message):
        launch()


def test_no_driver_is_an_error_with_a_remedy():
    assert driver_release("libno_such_driver.so") is None
    with pytest.raises(DeviceError, match="device='cpu'"):
        Driver("libno_such_driver.so")


def test_no_such_card_is_an_error(library, fake, entry):
    with pytest.raises(DeviceError, match="cuDeviceGet"):
        DriverLauncher(entry, 7, lambda: 0, Driver(library))


def test_opening_builds_for_the_card(library, fake, root, tmp_path, monkeypatch):
    monkeypatch.setattr("exl_loader.kernels.cuda.spec.csrc_dir", lambda: root)
    environ = {**os.environ, "EXL_LOADER_CACHE_DIR": str(tmp_path)}
    fake.fake_configure(None, 8, 6, 13000)
    launcher = open_launcher(0, lambda: 0, environ=environ, library=library)
    launcher.close()
    assert list(tmp_path.glob("kernels/cuda_sm_86-*/samples.cubin"))
    fake.fake_configure(None, 7, 0, 13000)
    with pytest.raises(KernelBuildError, match="compute capability 7.5"):
        open_launcher(0, lambda: 0, environ=environ, library=library)
    # What is newer than the driver would be refused by it.
    fake.fake_configure(None, 8, 6, 10020)
    with pytest.raises(KernelBuildError, match="newer than the driver"):
        open_launcher(0, lambda: 0, environ=environ, library=library)
