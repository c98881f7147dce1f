"""The plugin in a double of the web UI: what it adds, changes and leaves alone."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from extension.panel import panel
from extension.webui import contract, loading, registration
from support import REPO, in_threads
from support.tiny import write_tiny_model
from support.webui_double import enter_webui, forget_webui, write_webui


@pytest.fixture
def webui(tmp_path, monkeypatch):
    """Make a web UI and import its modules; the plugin is not registered yet."""

    def make(arguments=(), **changes):
        root = write_webui(tmp_path / "webui", **changes)
        enter_webui(monkeypatch, root, *arguments)
        names = ("shared", "loaders", "models_settings", "models")
        return SimpleNamespace(
            root=root, **{name: importlib.import_module(f"modules.{name}") for name in names})

    yield make
    forget_webui()


@pytest.fixture
def model(tmp_path):
    """Write a folder with the config of an EXL2 model, and one that can really be loaded."""
    models = tmp_path / "webui" / "user_data" / "models"
    write_tiny_model(models / "tiny")
    quantised = models / "quantised"
    quantised.mkdir()
    config = {"quantization_config": {"quant_method": "exl2", "bits": 4.0}}
    (quantised / "config.json").write_text(json.dumps(config))
    return "tiny"


def test_the_tables_have_the_loaders_and_their_options(webui):
    web = webui()
    before = (web.loaders.list_model_elements(), web.loaders.get_all_params())
    assert registration.register()
    assert set(web.loaders.loaders_and_params) >= {"ExLlamav2", "ExLlamav2_HF"}
    elements = web.loaders.list_model_elements()
    assert elements[: len(before[0])] == before[0]
    assert {"cache_8bit", "cache_4bit", "alpha_value", "compress_pos_emb"} <= set(elements)
    assert {"cache_8bit", "exl_gauge"} <= set(web.loaders.get_all_params()) - set(before[1])
    assert web.shared.args.cache_4bit is False and web.shared.original_args.alpha_value == 1.0


def test_samplers_are_those_that_the_engine_supports(webui):
    web = webui()
    registration.register()
    native = web.loaders.loaders_samplers["ExLlamav2"]
    assert native == {"temperature", "top_p", "mirostat_mode", "auto_max_new_tokens", "seed",
                      "grammar_string", "guidance_scale"}
    hf = web.loaders.loaders_samplers["ExLlamav2_HF"]
    assert hf == web.loaders.loaders_samplers["ExLlamav3_HF"]
    assert hf is not web.loaders.loaders_samplers["ExLlamav3_HF"]


def test_a_model_gets_the_stopping_strings_of_a_chat(webui):
    web = webui()
    generation = importlib.import_module("modules.text_generation")
    registration.register()
    seen = {}
    web.shared.model = SimpleNamespace(generate=lambda question, state: seen.update(state) or "")
    state = {"custom_stopping_strings": '"x"'}
    list(generation.generate_reply_custom("q", "q", state, ["<|end|>"], is_chat=True))
    assert seen["exl_loader_stopping_strings"] == ["<|end|>"]
    assert seen["custom_stopping_strings"] == '"x"' and state == {"custom_stopping_strings": '"x"'}
    list(generation.generate_reply_custom("q", "q", state))
    assert seen["exl_loader_stopping_strings"] is None


def test_load_model_reaches_copies_imported_by_value(webui, model):
    web = webui(["--model-dir", "user_data/models"])
    copy = web.models.load_model
    registration.register()
    web.shared.args.ctx_size = 512
    loaded, tokenizer = copy(model, "ExLlamav2")
    assert type(loaded).__name__ == "Exllamav3Model" and tokenizer is loaded
    assert web.shared.settings["truncation_length"] == 512 == loaded.loaded.ctx_size
    assert copy("whatever", "llama.cpp") == ("llama", "llama")


def test_tracebacks_point_into_the_webuis_file(webui):
    web = webui()
    line = web.models.load_model.__code__.co_firstlineno
    registration.register()
    code = web.models.load_model.__code__
    assert code.co_filename.endswith("models.py") and code.co_firstlineno == line


def test_exl2_folders_are_recognised_and_others_are_not(webui, model):
    web = webui()
    registration.register()
    (web.root / "user_data/models/dense").mkdir()
    (web.root / "user_data/models/dense/config.json").write_text("{}")
    (web.root / "user_data/models/llama").mkdir()
    (web.root / "user_data/models/llama/a.gguf").write_text("")
    infer = web.models_settings.infer_loader
    found = {n: infer(n, {}) for n in ("quantised", "dense", "llama", "absent")}
    assert found == {
        "quantised": "ExLlamav2", "dense": "Transformers", "llama": "llama.cpp", "absent": None}
    assert web.models_settings.get_model_metadata("quantised")["loader"] == "ExLlamav2"
    web.shared.args.portable = True
    assert infer("quantised", {}) == "llama.cpp"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("exllamav2", "ExLlamav2"), ("ExLlama-v2", "ExLlamav2"), ("exl2", "ExLlamav2"),
     ("exllama2", "ExLlamav2"), ("exllama_v2_hf", "ExLlamav2_HF"),
     ("exllamav2-hf", "ExLlamav2_HF"), ("exllamav3", None), ("hf", None), ("", None)],
)
def test_spellings(spelling, name):
    assert contract.loader_name(spelling) == name


def test_a_loader_given_on_the_command_line_is_not_lost(webui):
    web = webui(["--loader", "exllama_v2"])
    assert web.shared.args.loader is None, "the web UI alone drops it"
    registration.register()
    assert web.shared.args.loader == "ExLlamav2"
    assert web.shared.fix_loader_name("transformers") == "Transformers"


def test_settings_saved_by_old_versions_are_used(webui, model):
    web = webui()
    saved = {"old$": {"loader": "ExLlamav2", "max_seq_len": 2048, "cache_4bit": True},
             "other$": {"loader": "Transformers", "max_seq_len": 1},
             "quantised$": {"loader": "AutoGPTQ"}}
    (web.root / "user_data/models/config-user.json").write_text(json.dumps(saved))
    registration.register()
    config = web.shared.load_user_config()
    assert config["old$"]["ctx_size"] == 2048 and "ctx_size" not in config["other$"]
    web.shared.user_config = config
    assert web.models_settings.get_model_metadata("old")["cache_4bit"] is True
    assert web.models_settings.get_model_metadata("quantised")["loader"] == "ExLlamav2"


def test_pages_opened_after_a_load_show_that_load(webui, model):
    web = webui()
    registration.register()
    web.shared.args.cache_8bit, web.shared.args.ctx_size = True, 512
    loaded, _ = web.models.load_model(model, "ExLlamav2")
    shown = web.shared.persistent_interface_state
    expected = {"loader": "ExLlamav2", "ctx_size": 512, "cache_type": "q8", "cache_8bit": True,
                "cache_4bit": False, "alpha_value": 1.0}
    assert shown.items() >= (expected | {"truncation_length": 512}).items()
    apply = web.models_settings.apply_model_settings_to_state
    page = dict.fromkeys(expected)
    assert apply(model, dict(page)) == expected
    assert loading.is_loaded_as(loading.options_for(model, "ExLlamav2", apply(model, dict(page))))
    other = apply("quantised", page | {"alpha_value": 3.0, "cache_type": "q6"})
    assert other["ctx_size"] == 8192, "another model has its own"
    assert (other["alpha_value"], other["cache_type"]) == (1.0, "q6")
    loaded.unload()
    assert apply(model, dict(page))["ctx_size"] == 8192


def test_the_architecture_chosen_for_a_model_does_not_stay_for_the_next(webui, model):
    web = webui()
    models = web.root / "user_data/models"
    for name, saved in (("frob", None), ("saved", True), ("not", False)):
        write_tiny_model(models / name, architectures=["FrobForCausalLM"], model_type="frob")
        if saved is not None:
            web.shared.user_config[f"{name}$"] = {"loader": "ExLlamav2", "as_llama": saved}
    registration.register()
    apply = web.models_settings.apply_model_settings_to_state
    for asked in (False, True):
        web.shared.original_args.as_llama = asked
        shown = {name: apply(name, {"as_llama": True})["as_llama"]
                 for name in (model, "frob", "saved", "not")}
        assert shown == {model: False, "frob": asked, "saved": True, "not": False}


def test_context_0_is_the_webuis_default(webui, model):
    web = webui()
    registration.register()
    options = loading.options_for(model, "ExLlamav2", {"ctx_size": 0})
    web.models.load_model(model, "ExLlamav2")
    assert loading.is_loaded_as(options) and options.ctx_size == 8192


def test_context_0_is_left_to_the_plan_without_a_default(webui, model):
    webui(models=("shared.args.ctx_size = 8192", "pass"))
    registration.register()
    assert loading.options_for(model, "ExLlamav2", {"ctx_size": 0}).ctx_size is None


@pytest.mark.parametrize("flags, expected", [
    ({}, "q4"), ({"cache_8bit": True}, "q8"), ({"cache_type": "q6"}, "q6"),
    ({"cache_type": "q8_0"}, "q8"), ({"cache_type": "fp16"}, "fp16")])
def test_cache_flags_override_settings_saved_for_a_model(webui, flags, expected):
    web = webui()
    for name, value in flags.items():
        setattr(web.shared.args, name, value)
        web.shared.provided_arguments.append(name)
    registration.register()
    saved = {"cache_type": "q4", "cache_8bit": False, "cache_4bit": True}
    web.models_settings.update_model_parameters(saved, initial=True)
    args = web.shared.args
    assert panel.resolve_cache_type(
        args.cache_type, args.cache_8bit, args.cache_4bit) == expected


def test_registering_twice_and_taking_it_back(webui):
    web = webui()
    tables = {k: list(v) for k, v in web.loaders.loaders_and_params.items()}
    elements = web.loaders.list_model_elements()
    functions = (web.models_settings.infer_loader, web.models.load_model.__code__)
    args = dict(vars(web.shared.args))
    assert registration.register() and registration.register()
    assert web.loaders.list_model_elements().count("cache_8bit") == 1
    registration.unregister()
    assert {k: list(v) for k, v in web.loaders.loaders_and_params.items()} == tables
    assert web.loaders.list_model_elements() == elements
    assert (web.models_settings.infer_loader, web.models.load_model.__code__) == functions
    assert vars(web.shared.args) == args


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("loaders", ('"llama.cpp": ["ctx', '"ExLlamav2": [], "llama.cpp": ["ctx'), "already"),
        ("models", ("load_func_map", "dispatch"), "load_func_map"),
        ("models_settings", ("infer_loader", "guess_loader"), "infer_loader"),
        ("loaders", ("list_model_elements", "elements"), "list_model_elements"),
        ("shared", ("def fix_loader_name", "fix = fix_loader_name = lambda name: name\ndef _fix"),
         None),
    ],
)
def test_an_unsupported_web_ui_is_left_alone_with_one_message(webui, capsys, file, change, reason):
    web = webui(**{file: change})
    tables = {k: list(v) for k, v in web.loaders.loaders_and_params.items()}
    args = dict(vars(web.shared.args))
    assert registration.register() is (reason is None)
    assert registration.register() is (reason is None)
    said = capsys.readouterr().err
    if reason is None:
        assert said == ""
        return
    assert said.count("exl_loader:") == 1 and reason in said
    assert {k: list(v) for k, v in web.loaders.loaders_and_params.items()} == tables
    assert vars(web.shared.args) == args


def test_on_version_3_the_message_names_its_own_loader(webui, capsys):
    """Its modules also lack attributes, but naming one of those would explain nothing."""
    webui(loaders=('"llama.cpp": ["ctx', '"ExLlamav2": [], "llama.cpp": ["ctx'),
         shared=("original_args", "args_at_start"))
    assert not registration.register()
    assert "it already has a loader named ExLlamav2" in capsys.readouterr().err


def test_a_failure_half_way_takes_everything_back(webui, capsys, monkeypatch):
    web = webui()
    tables = dict(web.loaders.loaders_and_params)

    def fail(*_):
        raise RuntimeError("moved")

    monkeypatch.setattr(registration, "_watch_later_modules", fail)
    assert not registration.register()
    assert web.loaders.loaders_and_params == tables
    with pytest.raises(KeyError):
        web.models.load_model("x", "ExLlamav2")
    assert "RuntimeError: moved" in capsys.readouterr().err


def test_modules_imported_later_are_extended_after_their_import(webui):
    web = webui()
    registration.register()
    web.shared.args.loader = "ExLlamav2"
    completions = importlib.import_module("modules.api.completions")
    assert not completions.wants_processors() and completions.stream()
    web.shared.args.loader = "Transformers"
    assert completions.wants_processors() and not completions.stream()


def test_modules_imported_before_are_extended_at_once(webui):
    web = webui()
    completions = importlib.import_module("modules.api.completions")
    registration.register()
    web.shared.args.loader = "ExLlamav2"
    assert not completions.wants_processors()


def test_a_later_module_that_differs_is_reported_and_left_alone(webui, capsys):
    webui(ui_model_menu=("def load_lora_wrapper", "def lora_wrapper"))
    assert registration.register()
    menu = importlib.import_module("modules.ui_model_menu")
    assert next(menu.load_model_wrapper("x", "y")) == "the web UI's own"
    assert "modules.ui_model_menu" in capsys.readouterr().err


def test_a_page_that_differs_opens_without_our_options(webui, capsys):
    """The page looks for a component of every option that the tables have."""
    web = webui(ui_model_menu=("def create_event_handlers", "def connect"))
    assert registration.register()
    importlib.import_module("modules.ui_model_menu")
    assert "cache_4bit" not in web.loaders.loaders_and_params["ExLlamav2"]
    assert "cache_4bit" not in web.loaders.list_model_elements()
    assert "create_event_handlers" in capsys.readouterr().err


def test_the_page_counts_its_own_answer(webui):
    web = webui()
    chat = importlib.import_module("modules.chat")
    registration.register()
    web.shared.model = model = SimpleNamespace(last_prompt_token_count=7)
    assert chat.update_token_display_from_state({"truncation_length": 9}) == "7 of 9"
    model.read_as_page = lambda: setattr(model, "last_prompt_token_count", 8)
    assert chat.update_token_display_from_state({"truncation_length": 9}) == "8 of 9"


def test_a_page_that_counts_nothing_is_left_alone(webui, capsys):
    """Up to v4.7."""
    webui(chat=("update_token_display_from_state", "count_prompt_tokens"))
    registration.register()
    importlib.import_module("modules.chat")
    assert "modules.chat" not in capsys.readouterr().err


def test_a_second_load_frees_the_first_models_memory(webui, model):
    web = webui()
    registration.register()
    first, _ = web.models.load_model(model, "ExLlamav2")
    web.models.load_model(model, "ExLlamav2")
    assert first.loaded.allocated_bytes() == 0
    assert loading.current().allocated_bytes() > 0


def test_a_failed_load_frees_everything(webui, model):
    web = webui()
    registration.register()
    first, _ = web.models.load_model(model, "ExLlamav2")
    web.shared.args.cache_type = "q5"
    from exl_loader.utils.errors import InvalidSettings

    with pytest.raises(InvalidSettings, match="q5"):
        web.models.load_model(model, "ExLlamav2")
    assert first.loaded.allocated_bytes() == 0 and loading.current() is None


def test_an_idle_reload_uses_the_options_of_the_last_load(webui, model):
    """Opening the page overwrites the options that an idle reload would read."""
    web = webui(["--idle-timeout", "1"])
    registration.register()
    web.shared.args.cache_4bit = True
    web.shared.args.ctx_size = 512
    web.shared.model, _ = web.models.load_model(model, "ExLlamav2")
    web.models.unload_model(keep_model_name=True)
    web.shared.args.loader = "Transformers"
    web.shared.args.cache_4bit = False
    web.shared.args.ctx_size = 8192
    in_threads(lambda _: web.models.load_model_if_idle_unloaded(), range(3))
    reservation = web.shared.model.loaded.reservation
    assert (reservation.ctx_size, reservation.cache_type) == (512, "q4")
    assert web.shared.model.loaded is loading.current(), "loaded once, not three times"


@pytest.mark.parametrize("name", ["generate_reply", "encode"])
def test_an_idle_reload_is_guarded_if_every_caller_reloads_itself(webui, model, name):
    """Up to v4.2 no single function reloads, and some callers do not reload at all."""
    web = webui(
        ["--idle-timeout", "1"], models=("load_model_if_idle_unloaded", "reload_by_myself"),
        text_generation=("models.load_model_if_idle_unloaded()", "pass"))
    registration.register()
    text_generation = importlib.import_module("modules.text_generation")
    web.shared.args.cache_4bit = True
    web.shared.model, _ = web.models.load_model(model, "ExLlamav2")
    web.models.unload_model(keep_model_name=True)
    web.shared.args.loader, web.shared.args.cache_4bit = "Transformers", False
    arguments = {"generate_reply": ("a", {}), "encode": ("a",)}[name]
    list(getattr(text_generation, name)(*arguments))
    assert web.shared.model.loaded.reservation.cache_type == "q4"
    # The web UI decides whether to reload another loader's model.
    web.models.unload_model(keep_model_name=True)
    web.shared.model_name = "another"
    with contextlib.suppress(AttributeError):
        list(getattr(text_generation, name)(*arguments))
    assert web.shared.model is None


def test_errors_of_transformers_generation_are_reported_once(webui, capsys):
    web = webui()
    registration.register()
    text_generation = importlib.import_module("modules.text_generation")
    errors = [ValueError("no logits")]
    web.shared.model = SimpleNamespace(take_error=lambda: errors.pop() if errors else None)
    for _ in range(2):
        assert list(text_generation.generate_reply("a", {})) == []
    assert capsys.readouterr().err.count("exl_loader: Unexpected ValueError: no logits") == 1


def test_the_hook_registers_before_the_model_loads(tmp_path, model):
    """In a process of its own: flags, spelling, order of events."""
    import subprocess

    root = write_webui(tmp_path / "webui")
    script = (
        "import sys, runpy\n"
        f"sys.path[:0] = [{str(REPO)!r}, {str(root)!r}]\n"
        "from extension.webui import early\nearly.start()\n"
        f"sys.argv = ['server.py', '--model', {model!r}, '--loader', 'exl2', '--cache-4bit']\n"
        "runpy.run_path('server.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True,
                            text=True, timeout=300)
    assert "loader ExLlamav2 ctx 8192 4bit True model Exllamav3Model" in result.stdout, result
    assert result.stdout.rstrip().endswith("up")
