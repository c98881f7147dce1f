"""How the backend gets into TabbyAPI's modules."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from exl_loader import InvalidSettings, ModelUnloaded
from extension.tabby import registration
from extension.tabby.container import ExlLoaderContainer
from extension.tabby.contract import TabbyDiffers
from support import REPO
from support.host_server import DEMO
from support.tabby_double import HFModel, enter_tabby


@pytest.fixture
def tabby(monkeypatch):
    yield enter_tabby(monkeypatch)
    registration.patches.undo()


@pytest.fixture
def created(monkeypatch):
    """The options with which this backend's container is created."""
    found = []

    async def create(cls, folder, hf_model, **values):
        found.append(values)
        return "ours"

    monkeypatch.setattr(ExlLoaderContainer, "create", classmethod(create))
    return found


class Exl3:
    @classmethod
    async def create(cls, folder, hf_model, **values):
        return "exl3"


def validate_backend(backend, hf_model):
    if hf_model.quant_method() in ("exl2", "gptq"):
        raise ValueError("no longer supported")


def model_module(**content) -> ModuleType:
    module = ModuleType("common.model")
    vars(module).update({"container": None, **content})
    return module


def load(model: ModuleType, hf_model, folder: Path = DEMO, **values):
    """What TabbyAPI does with its two globals at a load."""
    model.validate_backend(values.get("backend"), hf_model)
    return asyncio.run(model.ExllamaV3Container.create(folder, hf_model, **values))


@pytest.mark.parametrize(("backend", "method", "expected"), [
    (None, "exl2", "ours"), (None, "gptq", "ours"), ("exllamav2", "exl2", "ours"),
    ("exl_loader", None, "ours"), ("exl_loader", "exl2", "ours"), (None, "exl3", "exl3"),
    ("exllamav3", None, "exl3"),
    # Only quantize_config.json says that such a folder is quantised; here it is config.json.
    (None, None, "ours"),
])
def test_a_folder_chooses_its_backend(tabby, created, backend, method, expected):
    model = model_module(validate_backend=validate_backend, ExllamaV3Container=Exl3)
    registration.extend_model(model)
    values = {} if backend is None else {"backend": backend}
    assert load(model, HFModel(method), **values) == expected
    assert len(created) == (expected == "ours")


def test_an_unquantised_folder_is_ours_only_where_exl3_is_not_installed(
    tabby, created, tmp_path
):
    (tmp_path / "config.json").write_text("{}")
    with_exl3 = model_module(validate_backend=validate_backend, ExllamaV3Container=Exl3)
    registration.extend_model(with_exl3)
    assert load(with_exl3, HFModel(None), tmp_path) == "exl3"
    without = model_module(validate_backend=validate_backend)
    registration.extend_model(without)
    assert load(without, HFModel(None), tmp_path) == "ours"


def test_an_unknown_backend_is_refused_with_those_that_there_are(tabby, created):
    model = model_module(validate_backend=validate_backend, ExllamaV3Container=Exl3)
    registration.extend_model(model)
    with pytest.raises(ValueError, match="'vllm'.*exllamav3, exl_loader and exllamav2"):
        load(model, HFModel(), backend="vllm")
    # TabbyAPI's own check goes on for its own backend.
    with pytest.raises(ValueError, match="no longer supported"):
        load(model, HFModel("exl2"), backend="exllamav3")


def test_a_table_of_backends_gets_ours(tabby):
    before = {"exllamav3": Exl3}
    model = model_module(_BACKEND_REGISTRY=before)
    registration.extend_model(model)
    assert model._BACKEND_REGISTRY == before | dict.fromkeys(
        ("exl_loader", "exllamav2"), ExlLoaderContainer)
    registration.patches.undo()
    assert model._BACKEND_REGISTRY is before


def test_everything_can_be_taken_back(tabby):
    model = model_module(validate_backend=validate_backend, ExllamaV3Container=Exl3)
    registration.extend_model(model)
    registration.patches.undo()
    assert model.validate_backend is validate_backend and model.ExllamaV3Container is Exl3


def test_a_tabbyapi_that_is_not_known_is_named(tabby):
    with pytest.raises(TabbyDiffers, match="neither a table of backends nor validate_backend"):
        registration.extend_model(model_module())


def test_samplers_are_reported_as_ignored_for_exl3_only(tabby, monkeypatch):
    class Request:
        reported = 0

        def warn_unsupported_params(self):
            Request.reported += 1

    sampling = SimpleNamespace(BaseSamplerRequest=Request)
    registration.extend_sampling(sampling)
    model = model_module(container=object())
    monkeypatch.setitem(sys.modules, "common.model", model)
    Request().warn_unsupported_params()
    assert Request.reported == 1
    model.container = object.__new__(ExlLoaderContainer)
    Request().warn_unsupported_params()
    assert Request.reported == 1


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        self.status_code, self.detail = status_code, detail


@pytest.mark.parametrize(("error", "status", "message"), [
    (InvalidSettings("top_k", expected="a number"), 400, "top_k: expected a number"),
    (ModelUnloaded("the model"), 503, "the model"),
    (RuntimeError("a defect"), 503, "look at the console"),
])
def test_a_client_gets_the_reason_of_our_errors(tabby, error, status, message):
    answers = ModuleType("answers")
    answers.HTTPException = HTTPException
    answers.handle_request_error = lambda message, exc_info=True: message
    registration.extend_answers(answers)
    try:
        raise error
    except Exception:
        found = answers.HTTPException(503, answers.handle_request_error("look at the console"))
    assert (found.status_code, found.detail) == (status, message)


# ---- The launcher ----

# A TabbyAPI that says which backends it has, after it has imported `common.model`.
MAIN = """
import sys
def entrypoint():
    from common import model
    print("backends", type(model.ExllamaV3Container).__name__, sys.argv[1:], flush=True)
"""


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = REPO / "extension" / "tabby" / "launcher.py"
    return subprocess.run([sys.executable, str(launcher), *arguments], capture_output=True,
                          text=True, timeout=120)


def write_tabbyapi(root: Path) -> Path:
    """Write a TabbyAPI of three files."""
    (root / "common").mkdir(parents=True)
    (root / "backends").mkdir()
    (root / "main.py").write_text(MAIN + "if __name__ == '__main__':\n    entrypoint()\n")
    (root / "common" / "model.py").write_text(
        "container = None\ndef validate_backend(backend, hf_model):\n    pass\n"
        "class ExllamaV3Container:\n    pass\n")
    return root


def test_the_launcher_starts_main_with_the_backend_and_its_arguments(tmp_path):
    result = launch(str(write_tabbyapi(tmp_path / "tabby")), "--port", "1")
    assert result.returncode == 0, result.stderr
    assert "backends _Chooser ['--port', '1']" in result.stdout


def test_the_launcher_names_a_folder_that_is_not_tabbyapis(tmp_path):
    result = launch(str(tmp_path))
    assert result.returncode == 2 and "main.py or common/model.py is missing" in result.stderr
    assert launch().returncode == 2 and launch("--help").returncode == 0
