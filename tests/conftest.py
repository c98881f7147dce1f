"""Settings and fixtures that all tests share. Nothing here imports the engine's compiled parts."""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

# The machine's environment variables that would change what is tested are removed; a test that
# needs one sets it. Variables that name inputs and outputs of the tests stay.
KEPT = {"EXL_LOADER_FIXTURES", "EXL_LOADER_MACHINE_KILLS", "EXL_LOADER_SCREENSHOTS"}
REMOVED = {
    "CC", "CFLAGS", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "CPATH", "CPLUS_INCLUDE_PATH",
    "CPPFLAGS", "CXX", "CXXFLAGS", "C_INCLUDE_PATH", "FORCE_COLOR", "GCC_EXEC_PREFIX", "LDFLAGS",
    "LIBRARY_PATH", "LINES", "NO_COLOR", "PYTHONIOENCODING", "PYTHONPATH", "PYTHONUTF8",
    "PYTHONWARNINGS", "SOURCE_DATE_EPOCH",
}
REMOVED_PREFIXES = ("CUDA_", "EXL_LOADER_", "GRADIO_", "HF_", "NVCC_", "NVRTC_", "TRANSFORMERS_")
for name in set(os.environ) - KEPT:
    if name in REMOVED or name.startswith(REMOVED_PREFIXES):
        del os.environ[name]

REPO = Path(__file__).resolve().parent.parent
# What tests compile is kept here between runs.
TEST_CACHE = REPO / "build" / "test-cache"

# Compiled modules are kept even if the environment forbids it. Without them each process that
# imports PyTorch compiles its modules again, for 2 s of processor time. Only modules of temporary
# folders are removed, because each run has new ones.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    BYTECODE = TEST_CACHE / "bytecode"
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(BYTECODE)
    sys.dont_write_bytecode = False
    shutil.rmtree(f"{BYTECODE}{Path(tempfile.gettempdir()).resolve()}", ignore_errors=True)

# One thread, because tests use small tensors: waking a second thread costs more than it saves,
# and on a busy machine waiting for it costs thirty times more. Tests of what threads share set
# their number, or use the fixture `two_threads`.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["EXL_LOADER_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test asks a model hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

# Seconds that pytest-timeout has to end a test before the test's process is ended.
GRACE_S = 30

# A copy of the process's stderr, because pytest captures stderr itself.
STDERR = pytest.StashKey[int]()

# Kernels built by tests are separate from the user's. They are kept between runs, because
# compiling is the slowest step and the build key makes a stale binary impossible.
os.environ["EXL_LOADER_CACHE_DIR"] = str(TEST_CACHE)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hypothesis  # noqa: E402  (after compiled modules are kept: pytest rewrites all of it)

from support import exhaustive, timing  # noqa: E402  (in this folder)

# Hypothesis limits the time of an example by default, remembers examples of earlier runs, and
# chooses other defaults where the variable CI is set.
hypothesis.settings.register_profile(
    "exl_loader", deadline=None, database=None, derandomize=False, print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("exl_loader")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="every case of what is otherwise sampled"
    )
    parser.addoption(
        "--one-in", type=int, default=1, metavar="N",
        help="of each test's cases the first, and about one in N of the others",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """End the process if a test hangs in compiled code.

    The signal of pytest-timeout does not interrupt compiled code. xdist fails the test and
    continues in another process.
    """
    mark = item.get_closest_marker("timeout")
    limit_s = mark.args[0] if mark else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(
        limit_s + GRACE_S, exit=True, file=item.config.stash[STDERR]
    )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[STDERR] = os.dup(2)
    if config.getoption("--exhaustive"):
        os.environ[exhaustive.ENV] = "1"
    if config.getoption("durations") is None:
        return
    config.pluginmanager.register(timing.PhaseTimes())
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(timing.RunTimes(terminal))


# After -k and -m, so that the first case is one that they select.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    taken: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    tests: set[str] = set()
    for item in items:
        is_sampled = config.getoption("--exhaustive") or not item.get_closest_marker("exhaustive")
        if is_sampled and config.getoption("--one-in") > 1:
            test = item.nodeid.partition("[")[0]
            # By hash, because every N-th case may have the same value of a parameter with N values.
            place = zlib.crc32(item.name.encode()) % config.getoption("--one-in")
            is_sampled = test not in tests or place == 0
            tests.add(test)
        (taken if is_sampled else left_out).append(item)
    items[:] = taken
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of the reference models (EXL2 folders beside `NAME.reference.safetensors`)."""
    named = os.environ.get("EXL_LOADER_FIXTURES")
    folder = Path(named) if named else REPO.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"no reference models at {folder}; set EXL_LOADER_FIXTURES")
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Keep the machine's cards out of the tests: `auto` is the CPU."""
    monkeypatch.setattr("exl_loader.backends.cuda.cards.auto_cards", lambda: ())
    monkeypatch.setattr("exl_loader.backends.cuda.cards.card_memory", lambda card: None)


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_collected_once():
    """Exclude permanent objects from garbage collection.

    A failed load collects garbage, some hundred times in a run, and would each time go through
    all objects of PyTorch's and transformers' modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_model(tmp_path):
    """Return a maker of small random Llama folders: `tiny_model(name="m", **config) -> Path`."""
    from support.tiny import write_tiny_model

    def make(name: str = "tiny", **options) -> Path:
        return write_tiny_model(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def _tiny_model_files(tmp_path_factory) -> dict[Path, bytes]:
    """The files of `tiny_model_dir` as they were written."""
    from support.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def tiny_model_dir(_tiny_model_files) -> Path:
    """A small random Llama with a tokenizer, shared by all tests that only read it."""
    return next(iter(_tiny_model_files)).parent


@pytest.fixture(autouse=True)
def _shared_model_is_only_read(request):
    """Fail a test that changes `tiny_model_dir`, and restore the folder for the others."""
    yield
    if "tiny_model_dir" not in request.fixturenames:
        return
    files = request.getfixturevalue("_tiny_model_files")
    folder = request.getfixturevalue("tiny_model_dir")
    changed = set(folder.iterdir()) ^ set(files)
    for path, data in files.items():
        if not path.exists() or path.read_bytes() != data:
            changed.add(path)
            path.write_bytes(data)
    assert not changed, "other tests read this folder: change one that `tiny_model` makes"


@pytest.fixture(scope="module")
def single_bytes(tmp_path_factory):
    """A tokenizer in which every token is one byte, so that each text has one encoding."""
    from exl_loader.text.tokenizer import Tokenizer
    from support.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, 288)
    return Tokenizer.from_dir(folder)


@pytest.fixture
def no_other_model(monkeypatch):
    """Let `memory.live_bytes` count this test's buffers only.

    Buffers of earlier tests are freed at any time, when a thread ends or the collector runs.
    """
    import weakref

    from exl_loader.memory import buffers as memory

    monkeypatch.setattr(memory, "_live", weakref.WeakKeyDictionary())


@pytest.fixture
def kernel_cache(tmp_path, monkeypatch) -> Path:
    """An own folder of built kernels for this process and its children; it does not exist yet."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("CXX", "EXL_LOADER_MARCH", "EXL_LOADER_REFERENCE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "a cache" / "kernels"


@pytest.fixture
def kernel_sources(tmp_path) -> Path:
    """Small sources of a library, in a folder whose name needs quoting."""
    from support.builds import write_sources

    return write_sources(tmp_path / "the $sources: (here)")


@pytest.fixture
def counting_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that logs its arguments, and is slow enough to be interrupted."""
    from support.builds import write_compiler

    log = tmp_path / "compiled.log"
    log.touch()
    script = write_compiler(tmp_path / "counting g++", f'echo "$*" >> "{log}"; sleep 0.5')
    monkeypatch.setenv("CXX", str(script))
    return log


@pytest.fixture
def hanging_compiler(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A compiler that hangs in a child process, as g++ does in cc1plus, while a file exists.

    Returns that file, and the file to which the hanging processes write their ids.
    """
    from support.builds import write_compiler

    hang, running = tmp_path / "hang", tmp_path / "running"
    hang.touch()
    running.touch()
    script = write_compiler(
        tmp_path / "hanging g++",
        f'if [ -e "{hang}" ]; then sleep 600 & echo $$ $! >> "{running}"; wait; fi',
    )
    monkeypatch.setenv("CXX", str(script))
    return hang, running


@pytest.fixture(params=["nvrtc", "nvcc"])
def compiler(request):
    """Each CUDA compiler of the machine."""
    from support.cuda_sources import cuda_compiler

    found = cuda_compiler(request.param)
    if found is None:
        pytest.skip(f"no {request.param}")
    return found


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    from playwright.sync_api import expect, sync_playwright

    from support.webui_page import CHROMIUM, FLAGS, WAIT_MS

    # Playwright's own 5 s are shorter than an answer of a busy machine.
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A browser of its own, with tabs and storage."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def reference_operations(no_other_model, monkeypatch):
    """Use the reference operations, for errors that Python finds, so that nothing is compiled."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")


@pytest.fixture(scope="module")
def one_thread():
    """Let PyTorch use one thread: with small tensors others cost time, and they split sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_threads():
    """Let the CPU's kernels use two threads in all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_THREADS", "2")
        yield


@pytest.fixture
def copy_of(originals, tmp_path):
    """Copy one of a module's models, to break it: `copy_of(name) -> Path`."""
    return lambda name: shutil.copytree(originals / name, tmp_path / name)


@pytest.fixture
def machine(monkeypatch):
    """Pretend an amount of free main memory, whatever this machine has."""
    import torch  # noqa: F401  (a process that loads has it in memory already)

    from exl_loader.backends import BACKENDS
    from exl_loader.backends.base import Capacity
    from exl_loader.backends.cpu.backend import CpuBackend

    def make(free_bytes: int, capacity_bytes: int = 1 << 36, processes=()):
        class Machine(CpuBackend):
            def capacity(self, name):
                return Capacity(capacity_bytes, free_bytes, 0)

            def processes(self, name, limit):
                return list(processes)[:limit]

        monkeypatch.setitem(BACKENDS, "cpu", Machine())

    return make


def _skip_in_several_processes(host: str) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
        pytest.skip(f"one {host} for several processes; without -n it is tested")


@pytest.fixture(scope="session")
def webui():
    """The folder of the real text-generation-webui, with the plugin in it meanwhile."""
    from extension.install import environment
    from extension.install import webui as installer
    from support.webui_server import PYTHON, WEBUI, tracked

    _skip_in_several_processes("web UI")
    root = Path(WEBUI or "").resolve()
    before = tracked(root)
    installer.install(root, PYTHON)
    yield root
    installer.uninstall(root, PYTHON)
    assert tracked(root) == before, "no file of the web UI may be changed"
    assert not environment.extension_folder(root).exists()


@pytest.fixture(scope="session")
def tabbyapi():
    """The folder of the real TabbyAPI, with the backend in it meanwhile."""
    from extension.install import tabbyapi as installer
    from extension.install.environment import TABBYAPI, find_python
    from support.tabby_server import FOLDER, PYTHON, tracked

    _skip_in_several_processes("TabbyAPI")
    root = Path(FOLDER or "").resolve()
    before = tracked(root)
    site = find_python(root, PYTHON, TABBYAPI).site_packages
    installer.install(root, PYTHON, lambda python: None)
    yield root
    installer.uninstall(root, PYTHON)
    assert tracked(root) == before, "no file of TabbyAPI may be changed"
    assert not list(site.glob("exl_loader_tabbyapi*"))


@pytest.fixture(scope="session")
def webui_models(tmp_path_factory) -> Path:
    """A folder of models for the real web UI: the shipped one, as `demo`."""
    from support.host_server import copy_demo

    return copy_demo(tmp_path_factory.mktemp("webui") / "models", "demo")


@pytest.fixture(scope="session")
def greedy_text() -> str:
    """The text that the engine itself generates for the real web UI's prompt."""
    import exl_loader
    from support.host_server import DEMO, GREEDY, PROMPT

    settings = {"temperature": 0, "max_new_tokens": GREEDY["max_tokens"]}
    with exl_loader.load(DEMO, ctx_size=512, cache_type="q4") as model:
        with model.generate(PROMPT, settings) as generation:
            return "".join(generation)
