"""Answers of the web UI's API to loads and requests that fail, in the double of the web UI."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from exl_loader.utils.errors import ExlLoaderError
from extension.webui import loading, registration
from support.tiny import write_tiny_model
from support.webui_double import enter_webui, forget_webui, write_webui

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

PROMPT = "Hello there"


@pytest.fixture
def api(tmp_path, monkeypatch):
    """The double's API with the plugin in it, and a folder of models with `tiny`."""
    from fastapi.testclient import TestClient

    root = write_webui(tmp_path / "webui")
    models = root / "user_data" / "models"
    write_tiny_model(models / "tiny")
    enter_webui(monkeypatch, root, "--model-dir", str(models))
    for name in ("shared", "loaders", "models_settings", "models", "text_generation"):
        importlib.import_module(f"modules.{name}")
    assert registration.register()
    script = importlib.import_module("modules.api.script")
    client = TestClient(script.app, raise_server_exceptions=False)

    def ask(path, **body):
        answer = client.post(path, json=body)
        return answer.status_code, answer.json()

    def load(model="tiny", **args):
        return ask("/load", model_name=model, args={"loader": "ExLlamav2", "ctx_size": 256} | args)

    def stream(**body):
        return [json.loads(line) for line in client.post("/stream", json=body).text.splitlines()]

    yield SimpleNamespace(
        models=models, ask=ask, load=load, stream=stream, shared=sys.modules["modules.shared"],
        info=lambda: client.get("/info").json())
    forget_webui()


def test_a_successful_load_and_request_are_answered_as_before(api):
    assert api.load() == (200, "OK")
    status, answer = api.ask("/completions", prompt=PROMPT, temperature=0, ban_eos_token=True)
    assert status == 200 and answer["choices"][0]["text"]
    pieces = api.stream(prompt=PROMPT, temperature=0, ban_eos_token=True)
    assert "".join(c["choices"][0]["text"] for c in pieces) == answer["choices"][0]["text"]
    # Both stopped at max_new_tokens, whatever the web UI guesses from token counts.
    assert answer["choices"][0]["finish_reason"] == "length"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert api.info() == {"model_name": "tiny", "loader": "ExLlamav2"}


@pytest.mark.parametrize(("args", "reason"), [
    ({"ctx_size": -5}, "ctx_size: expected an integer from 1 to 2147483647, found -5"),
    ({"ctx_size": "abc"}, "ctx_size: expected a number of tokens or auto, found 'abc'"),
    ({"ctx_size": 100.5}, "ctx_size"), ({"ctx_size": [256]}, "ctx_size"),
    ({"ctx_size": 10**400}, "ctx_size"), ({"ctx_size": True}, "ctx_size"),
    ({"cache_type": "q5"}, "cache_type: expected one of"), ({"cache_type": 8}, "cache_type"),
    ({"cache_4bit": "perhaps"}, "cache_4bit: expected true or false"),
    ({"alpha_value": -1}, "alpha_value"), ({"alpha_value": "x"}, "alpha_value"),
    ({"alpha_value": 0}, "alpha_value"), ({"compress_pos_emb": "inf"}, "compress_pos_emb"),
    ({"gpu_split": "twenty"}, "gpu_split"), ({"loader": "nonsense"}, "loader"),
])
def test_a_refused_option_is_answered_with_status_400_and_the_reason(api, args, reason):
    status, answer = api.load(**args)
    assert status == 400
    assert answer["detail"].startswith("Failed to load the model: ") and reason in answer["detail"]
    assert api.shared.args.loader != "nonsense"
    assert api.load() == (200, "OK"), "the refused value is not kept"


@pytest.mark.parametrize("args", [
    {"ctx_size": "256"}, {"ctx_size": 256.0}, {"ctx_size": None}, {"alpha_value": "2.5"},
    {"alpha_value": ""}, {"cache_8bit": "true"}, {"cache_8bit": 1}, {"cache_4bit": "off"},
    {"loader": "exllama-v2"}, {"loader": "EXL2"},
])
def test_values_that_can_be_read_are_no_error(api, args):
    assert api.load(**args) == (200, "OK")
    assert api.shared.args.loader == "ExLlamav2"
    assert api.shared.args.ctx_size == loading.current().ctx_size


def write_gguf(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0")


def cut(name):
    def write(folder):
        data = (folder / name).read_bytes() if (folder / name).exists() else b'{"weight_map": {"a'
        (folder / name).write_bytes(data[: max(10, len(data) // 3)])

    return write


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(("damage", "words"), [
    (write_gguf, ("GGUF", "llama.cpp")),
    (cut("config.json"), ("config.json", "valid JSON", "Download")),
    (cut("tokenizer_config.json"), ("tokenizer_config.json", "valid JSON", "Download")),
    (cut("tokenizer.json"), ("tokenizer", "Download")),
    (cut("model.safetensors"), ("model.safetensors", "Download")),
    (pickled, ("pytorch_model.bin", "safetensors")),
])
def test_a_damaged_folder_is_named_with_its_remedy(api, damage, words):
    shutil.copytree(api.models / "tiny", api.models / "damaged")
    damage(api.models / "damaged")
    status, answer = api.load("damaged")
    assert status in (400, 500)
    for word in words:
        assert word in answer["detail"]
    assert "report" not in answer["detail"] and "Error" not in answer["detail"]
    assert loading.current() is None


def test_a_missing_model_is_named(api):
    status, answer = api.load("absent")
    assert status == 400 and "absent: expected a model folder" in answer["detail"]


@pytest.mark.parametrize(("body", "param"), [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_k": -3}, "top_k"), ({"max_new_tokens": -4}, "max_new_tokens"),
    ({"truncation_length": "abc"}, "truncation_length"),
    ({"custom_token_bans": "1,x"}, "custom_token_bans"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"grammar_string": "root ::= missing"}, "grammar_string"),
])
def test_a_refused_setting_is_answered_with_status_400_in_the_webuis_form(api, body, param):
    if "grammar_string" in body:
        pytest.importorskip("llguidance")
    api.load()
    status, answer = api.ask("/completions", prompt=PROMPT, **body)
    assert status == 400
    error = answer["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"].startswith(param)
    last = api.stream(prompt=PROMPT, **body)[-1]
    assert last == {"choices": [], "error": error}
    assert api.ask("/completions", prompt=PROMPT)[0] == 200, "the refused value is not kept"


def test_the_web_uis_own_errors_are_unchanged(api):
    api.load()
    status, answer = api.ask("/completions")
    assert status == 400 and answer["error"]["message"] == "Missing required input"


def test_a_folder_without_tokenizer_answers_text_with_an_error(api):
    for path in api.models.glob("tiny/tokenizer*"):
        path.unlink()
    assert api.load()[0] == 200
    for path, body in (("/completions", {"prompt": PROMPT}), ("/encode", {"text": PROMPT})):
        status, answer = api.ask(path, **body)
        assert status == 400 and "tokenizer" in answer["error"]["message"]
        assert "Copy the tokenizer files" in answer["error"]["message"]
    assert "tokenizer" in api.stream(prompt=PROMPT)[-1]["error"]["message"]
    status, answer = api.load(loader="ExLlamav2_HF")
    assert status == 500 and "tokenizer" in answer["detail"]
    assert loading.current() is None, "a model that cannot be used is unloaded"


def test_a_model_is_unloaded_if_the_web_ui_fails_after_the_load(api, monkeypatch):
    monkeypatch.setattr(sys.modules["modules.shared"], "settings", None)
    status, answer = api.load()
    assert status == 500 and "TypeError" in answer["detail"]
    assert loading.current() is None


def test_warnings_of_a_load_are_in_the_models_info_and_the_log(api, capsys):
    path = api.models / "tiny" / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": 256}
    path.write_text(json.dumps(config))
    assert api.load()[0] == 200 and "warnings" not in api.info()
    assert api.load(ctx_size=512)[0] == 200
    (warning,) = [w for w in api.info()["warnings"] if "own length" in w]
    assert "512 tokens" in warning and "alpha_value 2.6 or compress_pos_emb 2" in warning
    assert f"exl_loader: {warning}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text", "words"), [
    ("config.json", '{"a": 1, "b', "valid JSON"), ("config.json", "[1, 2]", "JSON object"),
    ("config.json", "", "valid JSON"), ("tokenizer_config.json", '"text"', "JSON object"),
    ("tokenizer_config.json", "\x00", "valid JSON"), ("chat_template.json", "{", "valid JSON"),
])
def test_a_file_that_the_web_ui_cannot_read_is_named(api, monkeypatch, capsys, name, text, words):
    settings = sys.modules["modules.models_settings"]
    (api.models / "tiny" / name).write_text(text)

    def read(model, *_):
        raise ValueError("Expecting value: line 1 column 1 (char 0)")

    monkeypatch.setattr(settings, "infer_loader", read)
    with pytest.raises(ExlLoaderError) as raised:
        settings.get_model_metadata("tiny")
    assert name in str(raised.value) and words in str(raised.value)
    assert "Download this file" in str(raised.value)
    # A page that selects the model keeps its values and shows the reason.
    state = {"ctx_size": 4096}
    assert settings.apply_model_settings_to_state("tiny", state)["ctx_size"] == 4096
    assert name in capsys.readouterr().err


def test_an_unexpected_key_is_named(api, monkeypatch):
    settings = sys.modules["modules.models_settings"]
    path = api.models / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": "abc"}))

    def read(model, *_):
        raise TypeError("'<' not supported between instances of 'int' and 'str'")

    monkeypatch.setattr(settings, "infer_loader", read)
    status, answer = api.load()
    assert status == 500 and "max_position_embeddings in " in answer["detail"]
    assert "'abc'" in answer["detail"] and "instances" not in answer["detail"]


def test_unexpected_values_are_reported_as_errors_of_the_folder(api, monkeypatch):
    settings = sys.modules["modules.models_settings"]

    def read(model, *_):
        raise AttributeError("'NoneType' object has no attribute 'get'")

    monkeypatch.setattr(settings, "infer_loader", read)
    status, answer = api.load()
    assert status == 500
    assert "tiny: expected JSON files with the keys of a model" in answer["detail"]


def test_errors_that_no_file_causes_are_unchanged(api, monkeypatch):
    settings = sys.modules["modules.models_settings"]

    def read(model, *_):
        raise FileNotFoundError("No .gguf models found")

    monkeypatch.setattr(settings, "infer_loader", read)
    with pytest.raises(FileNotFoundError):
        settings.get_model_metadata("tiny")


def test_unknown_options_are_logged(api, capsys):
    assert api.load(cache_4bits=True)[0] == 200
    assert "unknown options were ignored: cache_4bits" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["abc", []])
def test_a_config_that_only_transformers_cannot_read_is_named(api, value):
    path = api.models / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": value}))
    assert api.load() == (200, "OK")
    status, answer = api.load(loader="ExLlamav2_HF")
    assert status == 500 and "config.json of " in answer["detail"]
    assert "choose the loader ExLlamav2" in answer["detail"] and loading.current() is None
