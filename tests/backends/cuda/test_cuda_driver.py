"""Launching through the driver's API, against a fake driver (fake_driver.cpp)."""

import ctypes
import ctypes.util
import gc
import os

import numpy as np
import pytest

from exl_loader.backends.build.build import build, build_entry
from exl_loader.backends.build.spec import BuildSpec
from exl_loader.backends.build.toolchain import find_compiler
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.backends.cuda.driver import (
    CardMemory,
    Driver,
    MappedMemory,
    driver_release,
    held_bytes,
)
from exl_loader.backends.cuda.kernels import DriverLauncher, open_launcher
from exl_loader.backends.cuda.taken import taken_of
from exl_loader.utils.errors import DeviceError, InsufficientMemory, KernelBuildError
from exl_loader.utils.system.processors import cpu_features
from support import in_threads
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec
from support.cuda_sources import cuda_compiler, sample_root

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
    functions.pointers = [
        ctypes.cast(function, ctypes.c_void_p)
        for function in (samples.exl_emulated_launch, samples.exl_emulated_signature)
    ]
    functions.fake_configure(*functions.pointers, *CAPABILITY, 13000)
    functions.fake_used.restype = ctypes.c_uint64
    yield functions
    functions.fake_spoil(0)
    functions.fake_graph_bytes(ctypes.c_uint64(64 << 10))


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


def test_a_launcher_knows_the_cards_limits(launcher, library):
    assert (launcher.multiprocessors, launcher.shared_limit_bytes) == (4, 99 << 10)
    assert Driver(library).capability(0) == CAPABILITY
    assert driver_release(library) == (13, 0)


class Pair(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("count", ctypes.c_int32)]


def test_arguments_are_read_at_each_launch(launcher):
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


def test_large_shared_memory_is_requested(launcher):
    small, _ = reverse(launcher)
    launch, is_right = reverse(launcher, KERNEL_BYTES)
    launch()
    assert is_right()
    # A smaller launch of the same kernel does not lower the limit.
    small()
    less, less_is_right = reverse(launcher, KERNEL_BYTES - 1024)
    less()
    assert less_is_right()
    launch()
    message = r"at most .* with 101376 bytes .*found 2 x 1 x 1 .* with 102400 bytes"
    with pytest.raises(DeviceError, match=message):
        reverse(launcher, 100 << 10)


@pytest.mark.parametrize("grid", [
    (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (0, 1, 1), (1, 0, 1),
])  # fmt: skip
def test_grids_beyond_the_cards_limits_are_refused(launcher, grid):
    shape = " x ".join(map(str, grid))
    with pytest.raises(DeviceError, match=f"2147483647 x 65535 x 65535 .*found {shape} "):
        launcher.prepare("arguments_kernel", grid, 32, 0)


@pytest.mark.parametrize("block", [0, 1056])
def test_blocks_beyond_the_cards_limits_are_refused(launcher, block):
    with pytest.raises(DeviceError, match=f"of 1024 threads .*blocks of {block} threads"):
        launcher.prepare("arguments_kernel", (1, 1, 1), block, 0)


def in_thread(work, *args):
    """Run a function in a thread of its own; return its result, or raise what it raised."""
    return in_threads(lambda work: work(*args), [work])[0]


# A thread's current context: none, as in a new thread, this card's, or another card's.
CURRENT = pytest.mark.parametrize("current", [None, 0, 1])


@pytest.fixture
def work_in(fake):
    """Run a function in a thread with a current context, and check that this stays current."""
    for card in (0, 1):
        fake.fake_retain(card)

    def run(current, work):
        def in_context():
            if current is not None:
                fake.fake_push(current)
            result = work()
            assert fake.fake_current() == (-1 if current is None else current)
            return result

        return in_thread(in_context)

    yield run
    for card in (0, 1):
        fake.cuDevicePrimaryCtxRelease_v2(card)


@CURRENT
def test_any_thread_prepares_and_launches(launcher, work_in, current):
    """Prepare a kernel for the first time, with more shared memory than the default."""
    launch, is_right = work_in(current, lambda: reverse(launcher, KERNEL_BYTES))
    work_in(current, launch)
    assert is_right()


@CURRENT
def test_any_thread_opens_and_closes(library, fake, entry, work_in, current):
    before = fake.fake_modules(), fake.fake_retained(1)
    launcher = work_in(current, lambda: DriverLauncher(entry, 1, lambda: 0, Driver(library)))
    assert fake.fake_modules() == before[0] + 1
    work_in(current, launcher.close)
    assert (fake.fake_modules(), fake.fake_retained(1)) == before


@CURRENT
def test_any_thread_drops_the_last_reference(library, fake, entry, work_in, current):
    before = fake.fake_modules(), fake.fake_retained(1), fake.fake_graphs()
    launcher = DriverLauncher(entry, 1, lambda: 0, Driver(library))
    held = [launcher.capture(reverse(launcher)[0])]
    del launcher
    assert fake.fake_modules() == before[0] + 1 and fake.fake_graphs() == before[2] + 1
    work_in(current, held.clear)
    assert (fake.fake_modules(), fake.fake_retained(1), fake.fake_graphs()) == before


@CURRENT
def test_any_thread_takes_and_frees_memory(library, fake, work_in, current):
    before = fake.fake_things(), fake.fake_used(1), fake.fake_retained(1)
    held = [work_in(current, lambda: CardMemory(1, 1000, Driver(library)))]
    assert fake.fake_used(1) == before[1] + 1000 and held_bytes(1) == 1000
    work_in(current, held.clear)
    assert (fake.fake_things(), fake.fake_used(1), fake.fake_retained(1)) == before
    assert held_bytes(1) == 0


def test_memory_keeps_its_context(library, fake):
    """A primary context without users is destroyed, with its memory."""
    assert fake.fake_retained(0) == 0
    memory = CardMemory(0, 1000, Driver(library))
    assert fake.fake_retained(0) == 1 and fake.fake_used(0) == 1000
    del memory
    assert fake.fake_retained(0) == 0 and fake.fake_used(0) == 0


def test_memory_that_the_driver_refuses(library, fake):
    with pytest.raises(MemoryError, match=f"{2 << 30} bytes"):
        CardMemory(0, 2 << 30, Driver(library))
    assert held_bytes(0) == 0 and fake.fake_retained(0) == 0 and fake.fake_current() == -1


@CURRENT
def test_any_thread_takes_and_frees_mapped_memory(library, fake, work_in, current):
    before = fake.fake_things(), fake.fake_retained(1)
    held = [work_in(current, lambda: MappedMemory(1, 1000, Driver(library)))]
    assert fake.fake_used(1) == 0 and held_bytes(1) == 0
    assert (fake.fake_things(), fake.fake_retained(1)) == (before[0] + 1, before[1] + 1)
    work_in(current, held.clear)
    assert (fake.fake_things(), fake.fake_retained(1)) == before


def test_arrays_keep_mapped_memory(library, fake):
    before = fake.fake_things()
    array = np.asarray(MappedMemory(0, 1000, Driver(library)))
    array[:] = 7
    assert array.shape == (1000,) and fake.fake_things() == before + 1
    del array
    assert fake.fake_things() == before


def test_mapped_memory_that_the_driver_refuses(library, fake):
    with pytest.raises(MemoryError, match=f"{2 << 30} bytes"):
        MappedMemory(0, 2 << 30, Driver(library))
    assert fake.fake_retained(0) == 0 and fake.fake_current() == -1


@pytest.mark.parametrize("memory", [CardMemory, MappedMemory])
def test_an_interrupt_right_after_the_allocation_loses_no_memory(library, fake, memory):
    before = fake.fake_things(), fake.fake_used(1), fake.fake_retained(1)
    driver = Driver(library)
    call = driver.call

    def interrupted(name, *arguments):
        call(name, *arguments)
        if name in ("cuMemAlloc_v2", "cuMemHostAlloc"):
            raise KeyboardInterrupt

    driver.call = interrupted
    with pytest.raises(KeyboardInterrupt):
        memory(1, 1000, driver)
    assert (fake.fake_things(), fake.fake_used(1), fake.fake_retained(1)) == before
    assert held_bytes(1) == 0


def test_the_fake_driver_forbids_what_the_real_one_does(library, fake, launcher):
    """Each call fails without a context and in another card's context, as in the manual."""
    driver, invalid_context = Driver(library), 201
    functions, out = driver.functions, ctypes.c_void_p()
    function = launcher._kernel  # resolves within a context alone
    with launcher._context:
        reverse_kernel = function("reverse_kernel")
        stream = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(stream), 1)
    memory = CardMemory(1, 16, driver)
    address = ctypes.c_uint64(memory.__cuda_array_interface__["data"][0])
    mapped = MappedMemory(1, 16, driver)
    pinned = ctypes.c_uint64(mapped.__array_interface__["data"][0])
    calls = {
        "cuModuleLoadData": (ctypes.byref(out), b"\x7fELF"),
        "cuModuleUnload": (launcher._modules[0],),
        "cuModuleGetFunction": (ctypes.byref(out), launcher._modules[0], b"reverse_kernel"),
        "cuFuncSetAttribute": (reverse_kernel, 8, 1 << 10),
        "cuLaunchKernel": (reverse_kernel, 1, 1, 1, 32, 1, 1, 0, None, None, None),
        "cuMemFree_v2": (address,),
        "cuMemFreeHost": (pinned,),
        "cuMemGetInfo_v2": (ctypes.byref(out), ctypes.byref(out)),
        "cuCtxSynchronize": (),
        "cuStreamCreate": (ctypes.byref(out), 1),
        "cuStreamSynchronize": (stream,),
        "cuStreamBeginCapture_v2": (stream, 2),
        "cuStreamEndCapture": (stream, ctypes.byref(out)),
        "cuStreamDestroy_v2": (stream,),
    }
    for name, arguments in calls.items():
        assert getattr(functions, name)(*arguments) == invalid_context, name
    fake.fake_retain(0)
    fake.fake_push(0)
    try:
        bound = {name: arguments for name, arguments in calls.items()
                 if name not in ("cuModuleLoadData", "cuMemGetInfo_v2", "cuCtxSynchronize",
                                 "cuStreamCreate")}
        for name, arguments in bound.items():
            assert getattr(functions, name)(*arguments) == invalid_context, name
    finally:
        functions.cuCtxPopCurrent_v2(ctypes.byref(out))
        functions.cuDevicePrimaryCtxRelease_v2(0)
    with launcher._context:
        driver.call("cuStreamDestroy_v2", stream)


# ---- Graphs ------------------------------------------------------------------------------------


def test_a_graph_launches_with_the_arguments_of_its_capture(launcher, fake):
    out, number = np.zeros(4), ctypes.c_int64(3)
    launch = launcher.prepare(
        "arguments_kernel", (1, 1, 1), 32, 0, ctypes.c_void_p(out.ctypes.data), number,
        ctypes.c_int32(-7), ctypes.c_float(0.25), Pair(out.ctypes.data, 0),
    )
    graph = launcher.capture(launch)
    assert not out.any() and fake.fake_stream() != 77
    number.value = 4
    graph()
    assert out[0] == 3 and fake.fake_stream() == 77
    launch()
    assert out[0] == 4


@CURRENT
def test_any_thread_captures_and_replays(launcher, work_in, current):
    launch, is_right = reverse(launcher, KERNEL_BYTES)
    graph = work_in(current, lambda: launcher.capture(launch))
    assert not is_right()
    work_in(current, graph)
    assert is_right()


def test_launches_of_other_threads_are_no_part_of_a_capture(launcher, fake):
    mine, mine_is_right = reverse(launcher)
    other, other_is_right = reverse(launcher)

    def run():
        mine()
        in_thread(other)

    graph = launcher.capture(run)
    assert other_is_right() and not mine_is_right()
    graph()
    assert mine_is_right()


def test_releases_during_a_capture_run_after_it(library, fake, launcher, entry):
    """Waiting for a card while a step is captured on it would spoil the capture."""
    launch, is_right = reverse(launcher)
    dropped = [
        CardMemory(1, 1000, Driver(library)),
        DriverLauncher(entry, 1, lambda: 0, Driver(library)),
        launcher.capture(reverse(launcher)[0]),
    ]
    before = fake.fake_modules(), fake.fake_graphs(), fake.fake_used(1)

    def run():
        dropped.pop()  # in the thread that captures, and in others
        in_thread(dropped.clear)
        launch()
        assert (fake.fake_modules(), fake.fake_graphs(), fake.fake_used(1)) == before

    graph = launcher.capture(run)
    assert fake.fake_modules() == before[0] - 1 and fake.fake_graphs() == before[1]
    assert fake.fake_used(1) == before[2] - 1000
    graph()
    assert is_right()


def test_no_garbage_is_collected_during_a_capture(launcher):
    launch, _ = reverse(launcher)
    seen = []
    launcher.capture(lambda: (seen.append(gc.isenabled()), launch()))
    assert seen == [False] and gc.isenabled()


@pytest.mark.parametrize("fault", ["spoilt", "raises", "no room"])
def test_a_capture_that_fails_leaves_nothing_and_the_next_one_works(launcher, fake, fault):
    launch, is_right = reverse(launcher)
    before = fake.fake_things(), fake.fake_retained(1), fake.fake_used(1)

    def run():
        launch()
        if fault == "raises":
            raise KeyError

    if fault == "spoilt":
        fake.fake_spoil(1)
    elif fault == "no room":
        fake.fake_graph_bytes(ctypes.c_uint64(2 << 30))
    with pytest.raises({"raises": KeyError, "spoilt": DeviceError,
                        "no room": InsufficientMemory}[fault]):
        launcher.capture(run)
    fake.fake_graph_bytes(ctypes.c_uint64(1))
    assert (fake.fake_things(), fake.fake_retained(1), fake.fake_used(1)) == before
    assert fake.fake_current() == -1
    launch()
    assert is_right()
    launcher.capture(launch)()


def test_memory_of_graphs_is_measured(launcher, fake):
    launch, _ = reverse(launcher)
    fake.fake_graph_bytes(ctypes.c_uint64(3 << 20))
    taken = taken_of("cuda:1")
    held, graphs = taken.held_bytes, taken.graphs
    one = launcher.capture(lambda: (launch(), launch()))
    two = launcher.capture(launch)
    assert (one.nbytes, two.nbytes) == (6 << 20, 3 << 20)
    assert taken.held_bytes == held + (9 << 20) and taken.graphs == graphs + 2
    del one
    assert taken.held_bytes == held + (3 << 20) and taken.most_bytes >= held + (9 << 20)


def test_memory_of_kernels_is_measured(library, fake, entry):
    """At loading, and at the first use if the driver loads kernels lazily."""
    taken = taken_of("cuda:0")
    held = taken.held_bytes
    fake.fake_module_bytes(ctypes.c_uint64(5 << 20), ctypes.c_uint64(1 << 20))
    try:
        launcher = DriverLauncher(entry, 0, lambda: 0, Driver(library))
        assert taken.held_bytes == held + (5 << 20)
        for _ in range(2):
            reverse(launcher)
            assert taken.held_bytes == held + (6 << 20)
        launcher.close()
    finally:
        fake.fake_module_bytes(ctypes.c_uint64(0), ctypes.c_uint64(0))
    assert taken.held_bytes == held


def test_closing_releases_everything(library, fake, entry):
    before = fake.fake_modules(), fake.fake_retained(0)
    launcher = DriverLauncher(entry, 0, lambda: 0, Driver(library))
    assert fake.fake_modules() == before[0] + 1 and fake.fake_retained(0) == before[1] + 1
    launcher.close()
    launcher.close()
    assert (fake.fake_modules(), fake.fake_retained(0)) == before
    assert fake.fake_current() == -1


def test_a_launcher_lives_as_long_as_its_launches(library, fake, entry):
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
    monkeypatch.setattr("exl_loader.backends.cuda.compilers.csrc_dir", lambda: root)
    environ = {**os.environ, "EXL_LOADER_CACHE_DIR": str(tmp_path)}
    fake.fake_configure(None, None, 8, 6, 13000)
    launcher = open_launcher(0, lambda: 0, environ=environ, library=library)
    launcher.close()
    assert list(tmp_path.glob("kernels/cuda_sm_86-*/samples.cubin"))
    fake.fake_configure(None, None, 7, 0, 13000)
    with pytest.raises(KernelBuildError, match="compute capability 7.5"):
        open_launcher(0, lambda: 0, environ=environ, library=library)
    # A card that no compiler knows yet gets PTX.
    fake.fake_configure(*fake.pointers, 99, 0, 13090)
    launcher = open_launcher(0, lambda: 0, environ=environ, library=library)
    launch, is_right = reverse(launcher)
    launch()
    assert is_right() and list(tmp_path.glob("kernels/cuda_compute_*/samples.ptx"))
    launcher.close()
    # The driver would refuse cubins of a newer release.
    fake.fake_configure(None, None, 8, 6, 10020)
    with pytest.raises(KernelBuildError, match="newer than the driver"):
        open_launcher(0, lambda: 0, environ=environ, library=library)


def test_a_driver_that_lacks_a_function_is_too_old(library, fake):
    with pytest.raises(DeviceError, match=r"cuOfNextYear.*Install a newer driver"):
        Driver(library).call("cuOfNextYear", 1)


def test_a_library_that_is_no_driver_has_no_release():
    assert driver_release(ctypes.util.find_library("m")) is None
