"""The panel's rules: toggles in step, old settings read, a gauge for every choice."""

import json
import os
import re
import shutil
import time
from itertools import groupby
from operator import itemgetter

import pytest

import exl_loader
from benchmarks.sparse_models import exl2_tensors
from exl_loader.checkpoint import Checkpoint
from exl_loader.memory.buffers import live_bytes
from exl_loader.utils.errors import InvalidSettings, ModelNotFound, ModelUnloaded, PromptTooLong
from extension.page.session import Session
from extension.panel.loads import WatchedProgress
from extension.panel.panel import ModelChoice, plan_html, reserve, slider_end
from extension.webui import contract
from support import run_python
from support.counting import count
from support.sparse import LLAMA_2_7B, write_sparse_exl2
from support.tiny import CONFIG


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cache_8bit": True}, "q8"),
        ({"cache_4bit": True, "cache_type": "fp16"}, "q4"),
        ({"cache_4bit": True, "cache_8bit": True}, "q8"),
        ({"cache_8bit": True, "cache_type": "q4"}, "q4"),
        ({"cache_type": " Q6 "}, "q6"),
        ({"cache_type": "q8_0"}, "q8"),
        ({"cache_type": "FP8", "cache_4bit": True}, "q8"),
        ({"cache_type": None, "cache_8bit": None}, "fp16"),
        ({}, "fp16"),
    ],
)
def test_saved_values_that_disagree_are_resolved(values, expected):
    assert ModelChoice.from_values(values).cache_type == expected


def test_options_from_a_page_are_the_planners_arguments():
    options = ModelChoice.from_values({
        "model_dir": " /m ", "ctx_size": 4096.0, "cache_type": "q4", "alpha_value": "2.5",
        "compress_pos_emb": None, "gpu_split": "", "loader": "ExLlamav2",
    })
    assert options == ModelChoice("/m", ctx_size=4096, cache_type="q4", alpha_value=2.5)
    assert options.for_plan() == {"ctx_size": 4096, "cache_type": "q4", "alpha_value": 2.5}
    assert ModelChoice.from_values({"model_dir": " ~/m "}).model_dir == os.path.expanduser("~/m")
    empty = ModelChoice.from_values({"ctx_size": 0, "alpha_value": "", "model_dir": None})
    assert empty == ModelChoice("") and empty.for_plan() == {}


def test_options_of_memory_are_read_from_fields():
    options = ModelChoice.from_values(
        {"model_dir": "/m", "chunk_size": 64.0, "embedding_device": " cuda:0 "})
    assert options.for_load() == {"chunk_size": 64, "embedding_device": "cuda:0"}
    empty = ModelChoice.from_values({"chunk_size": "", "embedding_device": None})
    assert empty == ModelChoice()


def test_the_toggle_of_an_unknown_architecture_is_an_option_of_the_engine():
    options = ModelChoice.from_values({"model_dir": "/m", "as_llama": "true"})
    assert options.for_load() == {"as_architecture": "LlamaForCausalLM"}
    named = ModelChoice.from_values({"as_llama": True, "as_architecture": " Qwen2ForCausalLM "})
    assert named.as_architecture == "Qwen2ForCausalLM"
    assert ModelChoice.from_values({"as_llama": False, "as_architecture": ""}) == ModelChoice()


def test_options_of_the_web_ui_have_the_defaults_of_the_engine():
    """The web UI's flags are added where the engine is too slow to import."""
    for name in (*contract.ROPE_OPTIONS, *contract.MEMORY_OPTIONS):
        default = ModelChoice.OPTIONS[name].default
        assert contract.OPTION_DEFAULTS[name] == ("" if default is None else default)


def test_gauge_shows_the_plan_and_follows_every_option(tiny_model_dir):
    seen = set()
    folder = str(tiny_model_dir)
    for options in (ModelChoice(folder), ModelChoice(folder, ctx_size=4096),
                    ModelChoice(folder, ctx_size=4096, cache_type="q4")):
        html = plan_html(options)
        assert f"{reserve(options).ctx_size:,} tokens of context" in html
        seen.add(html)
    assert len(seen) == 3
    length = slider_end(ModelChoice(str(tiny_model_dir)))
    assert slider_end(ModelChoice(str(tiny_model_dir), alpha_value=2.0)) == 2 * length


def test_the_gauge_of_a_7b_model_needs_few_calls_per_tensor(tmp_path):
    folder = write_sparse_exl2(tmp_path / "large", shards=4, **LLAMA_2_7B)
    options = ModelChoice(str(folder), ctx_size=4096, cache_type="q4")

    def work():
        assert "4,096 tokens of context" in plan_html(options)

    work()
    # 82 a tensor when this was written; benchmarks/cpu/planning.py has its time.
    assert count(work).calls < 150 * len(exl2_tensors(CONFIG | LLAMA_2_7B, 4, 6))


def test_the_gauge_reads_no_weight(tiny_model_dir, monkeypatch):
    def read(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "read_rows", read)
    assert "Fits" in plan_html(ModelChoice(str(tiny_model_dir)))


def test_a_failed_plan_is_one_message(tmp_path, tiny_model):
    assert "Choose a model folder" in plan_html(ModelChoice(""))
    assert "Cannot be loaded" in plan_html(ModelChoice(str(tmp_path / "nowhere")))
    folder = tiny_model("broken")
    html = plan_html(ModelChoice(str(folder), cache_type="q5<b>"))
    assert "Cannot be loaded" in html and "q5&lt;b&gt;" in html
    (folder / "config.json").write_text(json.dumps({"architectures": ["<b>X</b>"]}))
    html = plan_html(ModelChoice(str(folder)))
    assert "Cannot be loaded" in html and "<b>X</b>" not in html
    shutil.rmtree(folder)
    with pytest.raises(ModelNotFound):
        reserve(ModelChoice(str(folder)))


def test_a_page_shows_the_draft_model_and_then_the_model(tiny_model):
    """Each task once, and no bar goes back."""
    drawn: list[tuple[str, int]] = []

    class Drawn(WatchedProgress):
        def start(self, task, total, unit):
            super().start(task, total, unit)
            self.note()

        def advance(self, task, n=1):
            super().advance(task, n)
            self.note()

        def note(self):
            html = self.html()
            percent = re.search(r'aria-valuenow="(\d+)"', html)
            if percent:
                drawn.append((re.search("<b>(.*?)</b>", html)[1], int(percent[1])))

    options = {"model_draft": tiny_model("draft", num_hidden_layers=1), "cache_type": "q4"}
    exl_loader.load(tiny_model(), ctx_size=512, progress=Drawn(), **options).unload()
    names = [name for name, _ in groupby(drawn, key=itemgetter(0))]
    assert names[-4:] == [
        "Loading draft weights", "Sampling draft keys", "Loading weights", "Sampling keys"]
    assert len(set(names)) == len(names)
    for name in names[-4:]:
        percents = [percent for shown, percent in drawn if shown == name]
        assert percents == sorted(percents) and (percents[0], percents[-1]) == (0, 100)


def loaded(session, options):
    session.start_load(options)
    shown = []
    while html := session.progress_html():
        shown.append(html)
        time.sleep(0.05)
    return shown, session.wait()


def test_a_session_loads_shows_and_unloads(tiny_model_dir):
    before = live_bytes()
    session = Session()
    shown, problem = loaded(session, ModelChoice(str(tiny_model_dir), ctx_size=512))
    assert problem == "" and all("progressbar" in html for html in shown)
    options = session.options
    gauge = session.gauge(options)
    assert "Measured equals reserved" in gauge
    # With other options the gauge shows what a load with them would take.
    other = session.gauge(ModelChoice(str(tiny_model_dir), ctx_size=1024))
    assert "1,024 tokens of context" in other and "Measured" not in other
    text = "".join(session.continue_text("ab", {"max_new_tokens": 4, "seed": 1}))
    assert text == "".join(session.continue_text("ab", {"max_new_tokens": 4, "seed": 1}))
    session.unload()
    session.unload()
    assert live_bytes() == before and session.options is None
    with pytest.raises(ModelUnloaded):
        session.continue_text("ab", {})


def test_long_conversation_loses_its_oldest_questions_with_their_answers(tiny_model):
    folder = tiny_model("talker")
    config = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    session = Session()
    assert not session.has_template
    loaded(session, ModelChoice(str(folder), ctx_size=256))
    assert session.has_template
    # One token per byte: three of these fit into 256 tokens, seven do not.
    roles = ("user", "assistant") * 3 + ("user",)
    talk = [{"role": role, "content": f"{i}" * 40} for i, role in enumerate(roles)]
    notices = []
    with session.answer(talk, {"max_new_tokens": 2}, notices) as generation:
        prompt = session.model.decode(generation.prompt_ids)
        assert len(list(generation)) <= 2 and generation.finish_reason is not None
    assert "the 2 oldest messages were left out" in notices[0] and len(notices) == 1
    assert prompt.startswith("user: 2222") and prompt.rstrip().endswith("6666")
    with pytest.raises(PromptTooLong):
        session.answer([{"role": "user", "content": "x" * 300}], {})
    session.unload()


def test_a_plan_beside_a_loaded_model_counts_its_memory_as_free(tiny_model_dir, monkeypatch):
    options = ModelChoice(str(tiny_model_dir), ctx_size=2048)
    total = reserve(options).total_bytes + live_bytes()
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(total + 1000))
    with exl_loader.load(options.model_dir, **options.for_plan()):
        assert not exl_loader.plan(options.model_dir, **options.for_plan()).fits
        assert reserve(options).fits
        largest = reserve(options).largest_ctx_size["fp16"]
    assert largest == reserve(options).largest_ctx_size["fp16"] == 2048


def test_a_failed_load_is_one_message_and_frees_everything(tiny_model_dir, monkeypatch):
    before = live_bytes()
    session = Session()
    loaded(session, ModelChoice(str(tiny_model_dir), ctx_size=512))
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", "1MiB")
    _, problem = loaded(session, ModelChoice(str(tiny_model_dir), ctx_size=32768))
    assert "does not fit" in problem and "<details>" in problem
    # The previous model has been unloaded.
    assert session.model is None and live_bytes() == before
    _, problem = loaded(session, ModelChoice(str(tiny_model_dir / "nowhere")))
    assert problem.count("<section") == 1


def test_an_unexpected_error_has_its_traceback_folded(tiny_model_dir, monkeypatch):
    import exl_loader.loader

    def broken(*_, **__):
        raise ZeroDivisionError("our own <mistake>")

    monkeypatch.setattr(exl_loader.loader, "load", broken)
    session = Session()
    _, problem = loaded(session, ModelChoice(str(tiny_model_dir)))
    assert "Unexpected ZeroDivisionError: our own &lt;mistake&gt;" in problem
    assert problem.index("<details>") < problem.index("in broken")


def test_two_loads_at_once_are_refused(tiny_model_dir, monkeypatch):
    import threading

    import exl_loader.loader

    go, real_load = threading.Event(), exl_loader.loader.load

    def slow(*args, **options):
        go.wait(300)
        return real_load(*args, **options)

    monkeypatch.setattr(exl_loader.loader, "load", slow)
    session = Session()
    session.start_load(ModelChoice(str(tiny_model_dir), ctx_size=512))
    with pytest.raises(InvalidSettings, match="one load at a time"):
        session.start_load(ModelChoice(str(tiny_model_dir), ctx_size=1024))
    go.set()
    session.unload()
    assert not session.loading and session.model is None


def test_panel_needs_neither_gradio_nor_pytorch(tiny_model_dir):
    code = (
        "import sys\n"
        "from extension.panel.panel import ModelChoice, plan_html\n"
        f"assert 'Fits' in plan_html(ModelChoice({str(tiny_model_dir)!r}))\n"
        "print({'gradio', 'torch'} & set(sys.modules))\n"
    )
    assert run_python(code) == "set()\n"
