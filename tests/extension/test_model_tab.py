"""The Model tab with the plugin, in the double of the web UI."""

from __future__ import annotations

import importlib
import sys
import threading
from types import SimpleNamespace

import pytest

import exl_loader
from extension.panel import loads
from extension.webui import contract, loading, model_tab, registration
from support import in_threads
from support.tiny import write_tiny_model
from support.webui_double import enter_webui, forget_webui, write_webui

STATE = {"temperature": 0, "max_new_tokens": 8, "truncation_length": 512, "add_bos_token": True,
         "ban_eos_token": True, "stream": True}
PROMPT = "Hello there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def page(tmp_path, monkeypatch, folder):
    """The double of the web UI with its Model tab imported."""
    root = write_webui(tmp_path / "webui")
    enter_webui(monkeypatch, root, "--model-dir", str(folder.parent))
    models = importlib.import_module("modules.models")
    menu = importlib.import_module("modules.ui_model_menu")
    registration.register()
    yield SimpleNamespace(menu=menu, models=models, shared=sys.modules["modules.shared"])
    forget_webui()


def shown(page, **changes):
    """Return the gauge for a page's values."""
    values = {"loader": "ExLlamav2", "model_menu": "tiny", "ctx_size": 512, "cache_type": "fp16",
              "gpu_split": "", "model_draft": "None", "ctx_size_draft": 0, "draft_max": 4,
              "cache_8bit": False, "cache_4bit": False, "alpha_value": 1,
              "compress_pos_emb": 1} | changes
    return model_tab.draw(values)


def test_the_load_button_shows_progress_and_the_gauge_what_was_measured(page):
    said = list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    assert said[0] == "Loading `tiny`..." and "Loaded" in said[-1]
    total = loading.current().reservation.total_bytes
    assert f"{total:,} bytes" in shown(page, ctx_size=loading.current().ctx_size)
    assert "Measured" not in shown(page, cache_type="q4")
    page.models.unload_model()
    assert loading.current() is None and "Measured" not in shown(page)


def test_pages_show_the_progress_of_a_load(page, monkeypatch):
    """Both in the page that started the load and in a page that is opened meanwhile."""
    began, go = threading.Event(), threading.Event()
    load = exl_loader.load

    def slow(*args, progress, **options):
        for name in ("importing PyTorch", "reading weights"):
            progress.start(name, None if "import" in name else 200, "")
            progress.advance(name, 30)
            began.set()
            assert go.wait(300)
            go.clear()
        return load(*args, progress=progress, **options)

    monkeypatch.setattr(exl_loader, "load", slow)
    monkeypatch.setattr(loads, "WATCH_INTERVAL_S", 0.01)
    asked = model_tab._follow_load("ExLlamav2")
    load_thread = threading.Thread(
        target=lambda: list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True)))
    load_thread.start()
    assert began.wait(300)
    opened = model_tab._follow_running_load("llama.cpp")
    for following in (asked, opened):
        assert "Importing PyTorch" in next(following)
    go.set()
    for following in (asked, opened):
        shown = next(html for html in following if "Importing" not in html)
        assert "Reading weights" in shown and "15 %" in shown
    go.set()
    assert [*asked][-1] == [*opened][-1] == ""
    load_thread.join()
    assert list(model_tab._follow_running_load("ExLlamav2")) == [""]
    assert list(model_tab._follow_load("llama.cpp")) == [""]


def test_a_refused_load_is_one_line_in_the_page_and_frees_everything(page, capsys):
    list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    page.shared.args.cache_type = "q5"
    said = list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    assert "Cannot be loaded" in said[-1] and "q5" in said[-1] and "Traceback" not in said[-1]
    assert loading.current() is None and page.shared.model is None
    assert "tiny was not loaded" in capsys.readouterr().err


def test_a_model_that_vanished_is_reported(page):
    said = list(page.menu.load_model_wrapper("gone", "ExLlamav2", autoload=True))
    assert "Cannot be loaded" in said[-1] and "gone" in said[-1]
    assert "Cannot be loaded" in shown(page, model_menu="gone")


def test_the_gauge_is_empty_for_other_loaders_and_without_a_model(page):
    assert "exl-gauge" not in shown(page, loader="llama.cpp")
    assert "exl-gauge" not in shown(page, loader=None)
    assert "Choose a model" in shown(page, model_menu="None")
    assert "8-bit cache" in shown(page, cache_type="q8_0")
    assert "4-bit cache" in shown(page, cache_4bit=True)


def test_other_loaders_keep_their_load_button_and_loras(page):
    assert list(page.menu.load_model_wrapper("tiny", "llama.cpp", autoload=True)) == [
        "the web UI's own"]
    assert list(page.menu.load_lora_wrapper(["x"])) == ["the web UI's own", "applied"]
    assert page.shared.lora_names == ["x"]


def test_a_load_during_a_generation_ends_it_cleanly(page):
    list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    steps = page.shared.model.generate_with_streaming(PROMPT, STATE | {"max_new_tokens": 400})
    next(steps)
    said = list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    assert "Loaded" in said[-1]
    with pytest.raises(exl_loader.utils.errors.ModelUnloaded):
        list(steps)
    assert page.shared.model.generate(PROMPT, STATE)


def test_two_loads_at_once_leave_one_model(page):
    results = in_threads(
        lambda _: list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True)), range(2)
    )
    assert all("Loaded" in said[-1] for said in results)
    assert loading.current().allocated_bytes() == loading.current().reservation.total_bytes


class Wired:
    """What Gradio returns for an event, to which further events can be chained."""

    def __init__(self, log, name):
        self._log, self.name = log, name

    def then(self, fn):
        self._log.append((self.name, fn))
        return Wired(self._log, fn)

    success = then


def test_the_end_of_a_buttons_event_chain_is_found():
    log = []
    click = lambda fn: Wired(log, fn)  # noqa: E731
    button = SimpleNamespace(click=click)
    with model_tab.event_chains({"load": button}, ("load", "absent")) as (chain,):
        button.click("gather").then("load").success("final")
    chain.then("draw")
    assert log == [("gather", "load"), ("load", "final"), ("final", "draw")]
    assert button.click is click
    with model_tab.event_chains({"load": button}, ("load",)) as (unused,):
        pass
    unused.then("draw")
    assert len(log) == 3


def test_a_draft_model_is_planned_drawn_and_loaded(page, folder):
    args = page.shared.args
    page.models.load_model("tiny", "ExLlamav2")
    alone = loading.current().reservation.total_bytes
    args.model_draft, args.ctx_size_draft, args.draft_max = "tiny", 512, 3
    model, _ = page.models.load_model("tiny", "ExLlamav2")
    reservation = loading.current().reservation
    assert reservation.total_bytes > alone and reservation.ctx_size_draft == 512
    drawn = shown(page, ctx_size=8192, model_draft="tiny", ctx_size_draft=512, draft_max=3)
    assert f"{reservation.total_bytes:,} bytes" in drawn and "Measured" in drawn
    assert model.generate(PROMPT, STATE)
    args.draft_max = 1000
    with pytest.raises(exl_loader.utils.errors.InvalidSettings, match="draft_max"):
        page.models.load_model("tiny", "ExLlamav2")
    args.model_draft, args.draft_max = "absent", 3
    with pytest.raises(exl_loader.utils.errors.ModelNotFound, match="absent"):
        page.models.load_model("tiny", "ExLlamav2")
    # The menu's entry for no model is None; a draft model chosen for another loader is ignored.
    args.model_draft = "None"
    page.models.load_model("tiny", "ExLlamav2")
    assert loading.current().reservation.total_bytes == alone


def test_the_samplers_of_transformers_take_no_draft_model(page):
    page.shared.args.model_draft = "absent"
    options = loading.options_for("tiny", "ExLlamav2_HF", vars(page.shared.args))
    assert options.model_draft is None and "model_draft" not in options.for_load()


def test_a_failed_generation_is_shown_in_the_model_tab_until_the_next_load(page):
    list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    with pytest.raises(exl_loader.utils.errors.InvalidSettings):
        page.shared.model.generate(PROMPT, STATE | {"grammar_string": "root ::= missing"})
    assert "Generation failed" in shown(page) and "grammar_string" in shown(page)
    list(page.menu.load_model_wrapper("tiny", "ExLlamav2", autoload=True))
    assert "Generation failed" not in shown(page)


FIELDS = ("loader", "model_menu", "ctx_size", "cache_type", "gpu_split", "model_draft",
          "ctx_size_draft", "draft_max")


@pytest.fixture
def wired(page, monkeypatch):
    """Return a function that makes the double's Model tab with Gradio."""
    import gradio as gr

    class Components(dict):
        """Make the page; return its components by name."""

        slider: dict
        offers_llama: bool

    def make(*absent):
        components = Components()
        monkeypatch.setattr(page.shared, "gradio", components)
        with gr.Blocks() as components["interface"], gr.Tab("Model"), gr.Column():
            for name in FIELDS:
                if name == "ctx_size":
                    components[name] = gr.Slider(0, 1048576, step=1024, label=name)
                elif name not in absent:
                    components[name] = gr.Textbox(label=name)
            for name in ("load_model", "unload_model"):
                components[name] = gr.Button(name)
            page.menu.create_ui()
            page.menu.create_event_handlers()
        return components

    return make


def leaves(block):
    """Yield the components in a block, in the order of the page."""
    for child in getattr(block, "children", ()):
        if hasattr(child, "value"):
            yield child
        else:
            yield from leaves(child)


def drawing(components):
    """Return the page's one event that draws the gauge."""
    (found,) = [event for event in components["interface"].fns.values()
                if components["exl_gauge"] in event.outputs]
    return found


def follow(components, **changes):
    """Return the gauge that the page draws for its fields' values."""
    values = {"loader": "ExLlamav2", "model_menu": "tiny", "ctx_size": 512, "cache_type": "q4",
              "model_draft": "tiny"} | changes
    names = {component: name for name, component in components.items()}
    drawn = drawing(components)
    assert drawn.outputs == [
        components[name] for name in ("ctx_size", "exl_as_llama", "exl_gauge")]
    slider, as_llama, html = drawn.fn(
        *(values.get(names[component]) for component in drawn.inputs))
    components.slider = {name: slider.get(name) for name in ("maximum", "step")}
    components.offers_llama = as_llama["visible"]
    return html


@pytest.mark.parametrize("absent", [(), ("ctx_size_draft",), FIELDS[4:]],
                         ids=["v4.0", "v4.8", "none-that-can-miss"])
def test_the_gauge_works_without_the_optional_fields(wired, page, monkeypatch, absent):
    page.shared.args.model_draft, page.shared.args.ctx_size_draft = "tiny", 1024
    components = wired(*absent)
    placed = [*leaves(components["interface"])]
    for name, expected in (("ctx_size", "exl_progress"), ("exl_progress", "exl_gauge"),
                           ("cache_type", "cache_8bit"), ("cache_8bit", "cache_4bit")):
        assert placed[placed.index(components[name]) + 1] is components[expected]
    rope = components["exl_rope"]
    assert not rope.open
    assert [*leaves(rope)] == [components[name] for name in contract.ROPE_OPTIONS]
    assert placed.index(components["alpha_value"]) > placed.index(components["cache_4bit"])
    memory = components["exl_memory"]
    assert not memory.open
    assert [*leaves(memory)] == [components[name] for name in contract.MEMORY_OPTIONS]
    monkeypatch.setattr(model_tab.panel, "plan_html", repr)
    drawn = follow(components, ctx_size_draft=256, draft_max=2, chunk_size=64,
                   embedding_device="cpu", cache_size=2048, machines="tcp://192.0.2.1:29500")
    assert "ctx_size=512, cache_size=2048, cache_type='q4'" in drawn
    assert "chunk_size=64" in drawn and "embedding_device='cpu'" in drawn
    assert "machines='tcp://192.0.2.1:29500'" in drawn
    # An option without a field has the value of the command line.
    assert f"ctx_size_draft={1024 if absent else 256}" in drawn


def test_the_slider_ends_at_the_models_length_and_is_restored_for_other_loaders(wired, folder):
    components = wired()
    length = exl_loader.plan(folder).own_length
    theirs = {"maximum": 1048576, "step": 1024}
    for changes, expected in (
        ({}, {"maximum": length, "step": 256}),
        ({"alpha_value": 2.5}, {"maximum": int(2.5 * length), "step": 256}),
        ({"compress_pos_emb": 4, "cache_type": "q5"}, {"maximum": 4 * length, "step": 256}),
        ({"loader": "llama.cpp"}, theirs), ({"loader": None}, theirs),
        ({"alpha_value": "abc"}, theirs), ({"compress_pos_emb": -1}, theirs),
        ({"model_menu": "None"}, theirs), ({"model_menu": "absent"}, theirs),
    ):
        follow(components, **changes)
        assert components.slider == expected, changes


@pytest.fixture(scope="module")
def frob(folder):
    """A model of an unknown class, beside the tiny one."""
    return write_tiny_model(folder.parent / "frob", architectures=["FrobForCausalLM"],
                            model_type="frob", max_position_embeddings=1024)


def test_the_toggle_of_an_unknown_architecture_is_shown_where_it_has_a_meaning(wired, page, frob):
    components = wired()
    column = components["exl_as_llama"]
    assert not column.visible and [*leaves(column)] == [components["as_llama"]]
    placed = [*leaves(components["interface"])]
    assert placed.index(components["as_llama"]) < placed.index(components["alpha_value"])
    for changes, expected in (
        ({}, False), ({"as_llama": True}, True), ({"model_menu": "frob"}, True),
        ({"model_menu": "frob", "as_llama": True}, True),
        ({"model_menu": "frob", "loader": "llama.cpp"}, False), ({"model_menu": "None"}, False),
        ({"model_menu": "absent"}, False),
    ):
        follow(components, **{"as_llama": False, "model_draft": ""} | changes)
        assert components.offers_llama is expected, changes
    refused = follow(components, model_menu="frob", model_draft="", as_llama=False)
    assert "FrobForCausalLM" in refused and "--as-architecture" in refused
    drawn = follow(components, model_menu="frob", model_draft="", as_llama=True)
    assert "Cannot be loaded" not in drawn and components.slider["maximum"] == 1024


def test_a_model_of_an_unknown_architecture_is_loaded_as_llama_with_a_warning(page, frob):
    page.shared.args.ctx_size = 512
    said = list(page.menu.load_model_wrapper("frob", "ExLlamav2", autoload=True))
    assert "Cannot be loaded" in said[-1] and loading.current() is None
    page.shared.args.as_llama = True
    said = list(page.menu.load_model_wrapper("frob", "ExLlamav2", autoload=True))
    assert "Loaded" in said[-1] and "may be wrong" in said[-1]
    assert page.shared.persistent_interface_state["as_llama"] is True
    assert "Measured" in shown(page, model_menu="frob", as_llama=True)


def test_a_context_beyond_the_models_length_is_a_warning(wired, folder):
    components, length = wired(), exl_loader.plan(folder).own_length
    assert 'class="exl-warning"' not in follow(components, ctx_size=length)
    drawn = follow(components, ctx_size=2 * length + 2, alpha_value=2)
    assert 'class="exl-warning"' in drawn and "compress_pos_emb" in drawn


def test_the_page_starts_with_the_options_of_the_command_line(wired, page):
    page.shared.args.cache_4bit = True
    components = wired()
    begun = [components[name].value for name in ("cache_type", "cache_8bit", "cache_4bit")]
    assert begun == ["q4", False, True]
    page.shared.args.cache_type, page.shared.args.cache_4bit = "q8_0", False
    components = wired()
    # The web UI sets its own field from the command line.
    begun = [components[name].value for name in ("cache_type", "cache_8bit", "cache_4bit")]
    assert begun == [None, True, False]


def test_the_gauge_explains_values_that_gradio_would_refuse(wired, page):
    components = wired()
    assert not drawing(components).preprocess
    # Load reads these fields through Gradio, which must accept whatever the engine accepts.
    assert all(components[name].preprocess(0.5) == 0.5 for name in contract.ROPE_OPTIONS)
    drawn = follow(components, alpha_value=1e9, model_draft="")
    assert "alpha_value" in drawn and "Cannot be loaded" in drawn


def test_fields_are_kept_in_step_without_the_server(wired, page):
    """A late answer of the server could contradict a newer click."""
    components = wired()
    cache_bits = [components[name] for name in ("cache_8bit", "cache_4bit", "cache_type")]
    for component in (*cache_bits, components["exl_pick"]):
        for event in components["interface"].fns.values():
            if (component._id, "change") in event.targets:
                assert event.fn is None and event.js
    writing = [event for event in components["interface"].fns.values()
               if set(event.outputs) & set(cache_bits)]
    assert len(writing) == 4 and all(event.fn is None for event in writing)


def test_one_event_draws_the_gauge_and_it_does_not_read_the_toggles(wired, page):
    components = wired()
    drawn = drawing(components)
    assert drawn.targets == [(components["exl_ask"]._id, "change")]
    assert components["cache_8bit"] not in drawn.inputs
    asking = [event for event in components["interface"].fns.values()
              if event.outputs == [components["exl_ask"]]]
    asked_by = {target for event in asking for target in event.targets}
    # An address is read when it is complete.
    machines = components["machines"]._id
    assert {(machines, "submit"), (machines, "blur")} <= asked_by
    assert (machines, "change") not in asked_by
    others = {component._id for component in drawn.inputs} - {machines}
    assert {(component, "change") for component in others} <= asked_by
    assert (components["interface"]._id, "load") in asked_by


def test_a_page_without_the_needed_fields_opens_without_our_options(wired, page, capsys):
    components = wired("cache_type")
    assert "exl_gauge" not in components
    tables = sys.modules["modules.loaders"]
    assert "cache_4bit" not in tables.loaders_and_params["ExLlamav2"]
    assert "cache_4bit" not in tables.list_model_elements()
    assert ("the options of ExLlamav2 were not added to the Model tab: KeyError: 'cache_type'"
            in capsys.readouterr().err)
