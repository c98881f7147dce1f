"""Odd values in fields of a page, in the web UI's state and in saved settings."""

from __future__ import annotations

import pytest

import exl_loader
from exl_loader.generation.settings import SamplingSettings
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidSettings
from extension.install import plugin_files, saved_settings
from extension.install.environment import InstallError, check_folder
from extension.panel.panel import ModelChoice, offers_llama, plan_html, reserve
from extension.webui import contract, request
from extension.webui.options import with_current_values
from support.odd_values import odd_values
from support.special_files import SPECIAL_FILES
from support.tiny import write_tiny_model

CTX = 256

OPTIONS = (
    "model_dir", "ctx_size", "cache_type", "cache_8bit", "cache_4bit", "gpu_split",
    "alpha_value", "compress_pos_emb", "as_architecture", "as_llama", "model_draft",
    "ctx_size_draft", "draft_max", "chunk_size", "embedding_device",
)
STATE = sorted(request.SAMPLERS | {
    "max_new_tokens", "logit_bias", "logprobs", "truncation_length", "add_bos_token",
    "auto_max_new_tokens", "custom_stopping_strings", "stop_strings",
})

pytestmark = pytest.mark.timeout(600)


def json_values() -> list:
    """Return the odd values that a page, the API or a YAML file can contain."""
    kinds = (type(None), bool, int, float, str, list, dict)
    return [value for value in odd_values() if type(value) in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("odd") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_dir(folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_odd_field_of_the_loader(folder, name):
    for value in odd_values():
        try:
            values = {"model_dir": str(folder), "model_draft": "", name: value}
            options = ModelChoice.from_values(values)
        except InvalidSettings as error:
            assert name in str(error)
            continue
        plan_html(options).encode()
        assert offers_llama(options) is (options.as_architecture is not None)
        try:
            assert reserve(options).total_bytes > 0
            options.for_load()
        except ExlLoaderError as error:
            str(error).encode()


@pytest.mark.parametrize("name", STATE)
def test_an_odd_value_in_a_request(tokenizer, name):
    for value in json_values():
        state = {"max_new_tokens": 5, name: value}
        try:
            ids = request.prompt_ids(tokenizer, "Hi", state, CTX)
            assert 0 < len(ids) < CTX
            chosen = request.settings(state, len(ids), CTX)
            assert SamplingSettings.from_dict(chosen).max_new_tokens < CTX
        except InvalidSettings as error:
            assert name in str(error) or ("stop" in name and "stop_strings" in str(error))
            str(error).encode()


@pytest.mark.parametrize("name", ["loader", "max_seq_len", *OPTIONS])
def test_an_odd_value_in_saved_settings(name, capsys):
    for value in json_values():
        config = {"pattern": {"loader": "ExLlamav2"} | {name: value}, "other": value}
        assert with_current_values(config) is config
        assert "other" in config
    capsys.readouterr().err.encode()


def test_odd_saved_settings_and_names():
    for value in odd_values():
        assert with_current_values(value) is value
        assert contract.loader_name(value) is None


# Files of the web UI


@pytest.fixture
def webui_folder(tmp_path):
    root = tmp_path / "webui"
    (root / "modules").mkdir(parents=True)
    (root / "user_data" / "models").mkdir(parents=True)
    (root / "server.py").write_text("")
    (root / "modules" / "loaders.py").write_text("")
    return root


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_special_files_in_a_web_ui(webui_folder, kind):
    make = SPECIAL_FILES[kind]
    path = webui_folder / "user_data" / "models" / saved_settings.CONFIG
    make(path)
    assert saved_settings.config_files(webui_folder) == [path]
    for read in (saved_settings.entries, saved_settings.remove_entries):
        with pytest.raises(ExlLoaderError, match=saved_settings.CONFIG):
            read(path)
    make(webui_folder / "user_data" / "CMD_FLAGS.txt")
    assert saved_settings.named_flags(webui_folder) == {}
    make(webui_folder / plugin_files.RECORD)
    assert plugin_files.read_record(webui_folder) == {}
    make(webui_folder / plugin_files.START)
    assert not plugin_files.hook_is_current(webui_folder)
    (webui_folder / "modules" / "loaders.py").unlink()
    make(webui_folder / "modules" / "loaders.py")
    with pytest.raises(InstallError):
        check_folder(webui_folder)


@pytest.mark.parametrize("text", [
    "", "{", "[1]", '{"packages": 5}', '{"packages": "numpy"}', '{"packages": [5]}',
    '{"packages": {"a": 1}}', "9" * 5000, "[" * 100_000, "\x00",
])
def test_a_damaged_record_of_installed_packages_counts_as_none(tmp_path, text):
    (tmp_path / plugin_files.RECORD).write_text(text)
    assert plugin_files.read_record(tmp_path) == {}
    plugin_files.write_record(tmp_path, {"packages": ["jinja2"]})
    assert plugin_files.read_record(tmp_path) == {"packages": ["jinja2"]}


def test_plan_takes_no_unknown_option_from_the_page(folder):
    with pytest.raises(InvalidSettings, match="cache_4bit"):
        exl_loader.plan(folder, cache_4bit=True)
