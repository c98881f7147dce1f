"""`as_architecture`: a model of an unknown class runs as the class that the user names."""

from __future__ import annotations

import json
import os
import random

import pytest

import exl_loader
from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.checkpoint.model_class import has_unknown_class
from exl_loader.commands import cli
from exl_loader.utils.errors import InvalidCheckpoint, InvalidSettings, UnsupportedArchitecture
from exl_loader.utils.output import warn_once
from support.tiny import CONFIG, write_tiny_model

CTX = 256
UNKNOWN = {"architectures": ["FrobForCausalLM"], "model_type": "frob"}
LLAMA = "LlamaForCausalLM"


@pytest.fixture(autouse=True)
def _warnings_anew():
    warn_once.cache_clear()


@pytest.fixture(scope="module")
def seed():
    return int.from_bytes(os.urandom(3), "little")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, seed):
    return write_tiny_model(tmp_path_factory.mktemp("as") / "llama", seed=seed)


@pytest.fixture(scope="module")
def frob(tmp_path_factory, seed):
    """The same weights under a class that nobody knows."""
    return write_tiny_model(tmp_path_factory.mktemp("as") / "frob", seed=seed, **UNKNOWN)


def logits_of(folder, **options):
    with exl_loader.load(folder, ctx_size=CTX, **options) as model:
        ids = [random.Random(5).randrange(280) for _ in range(40)]
        return model.prompt_logits(ids)


def test_an_unknown_class_runs_as_llama_with_a_warning_when_asked(llama, frob, caplog):
    expected = logits_of(llama)
    assert not caplog.records
    assert (logits_of(frob, as_architecture=LLAMA) == expected).all()
    (warning,) = {record.getMessage() for record in caplog.records}
    assert "FrobForCausalLM, model_type frob" in warning and f"runs as {LLAMA}" in warning
    assert "may be wrong" in warning


def test_it_never_runs_by_itself_and_the_error_names_the_option(frob):
    for function in (exl_loader.plan, exl_loader.load):
        with pytest.raises(UnsupportedArchitecture) as caught:
            function(frob, ctx_size=CTX)
        assert f"as_architecture (--as-architecture) {LLAMA}" in str(caught.value)


def test_the_plan_is_the_one_of_the_chosen_class(llama, frob):
    ours, theirs = (
        exl_loader.plan(folder, ctx_size=CTX, as_architecture=LLAMA) for folder in (frob, llama)
    )
    assert ours.architecture == LLAMA and ours.total_bytes == theirs.total_bytes
    options = exl_loader.LoadOptions(as_architecture=LLAMA)
    assert options.stretched_length(frob) == CONFIG["max_position_embeddings"]


@pytest.mark.parametrize("name", ["LlamaForCausal", "llama", "", "BertModel", 5, True, ["x"]])
def test_a_name_that_is_no_architecture_is_refused_with_the_list(frob, name):
    with pytest.raises(InvalidSettings, match="as_architecture") as caught:
        exl_loader.plan(frob, as_architecture=name)
    assert not isinstance(name, str) or all(known in str(caught.value) for known in ARCHITECTURES)


def test_a_known_class_takes_its_own_name_alone(llama, caplog):
    for name in (LLAMA, "LLaMAForCausalLM"):
        exl_loader.plan(llama, ctx_size=CTX, as_architecture=name)
    assert not caplog.records
    with pytest.raises(InvalidSettings, match=f"known class {LLAMA}.*Leave as_architecture out"):
        exl_loader.plan(llama, as_architecture="MistralForCausalLM")


@pytest.mark.parametrize("classes", [
    {"architectures": None, "model_type": None}, {"architectures": ["FrobModel"]},
    {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
])
def test_every_class_that_is_refused_can_be_named_another(classes):
    values = CONFIG | UNKNOWN | classes
    assert ModelConfig.from_dict(values, as_architecture="Qwen2ForCausalLM").architecture == (
        "Qwen2ForCausalLM")


def test_keys_that_change_the_forward_pass_still_warn(caplog):
    values = CONFIG | UNKNOWN | {"residual_multiplier": 0.22}
    ModelConfig.from_dict(values, where="a config", as_architecture=LLAMA)
    assert [text for record in caplog.records if "residual_multiplier" in (
        text := record.getMessage())]


def test_tensors_that_the_chosen_class_has_no_use_for_are_judged_as_ever(tmp_path, frob, caplog):
    from safetensors.torch import load_file, save_file

    tensors = load_file(frob / "model.safetensors")
    name = "model.layers.0.self_attn.q_norm.weight"
    tensors[name] = tensors["model.norm.weight"].clone()
    (tmp_path / "config.json").write_text((frob / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="q_norm"):
        exl_loader.plan(tmp_path, as_architecture=LLAMA)
    tensors["model.extra.weight"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    exl_loader.plan(tmp_path, as_architecture=LLAMA)
    assert "model.extra.weight" in caplog.text


def test_a_draft_model_of_an_unknown_class_follows_and_a_known_one_does_not(
    llama, frob, tmp_path, caplog
):
    qwen = write_tiny_model(tmp_path / "qwen", architectures=["Qwen3ForCausalLM"])
    plans = {
        name: exl_loader.plan(folder, ctx_size=CTX, as_architecture=LLAMA, model_draft=draft)
        for name, folder, draft in (
            ("both", frob, frob), ("draft", llama, frob), ("model", frob, llama))
    }
    assert len({found.total_bytes for found in plans.values()}) == 1
    # The tiny Qwen3 lacks the norms of its class, so it is not read as a Llama.
    with pytest.raises(InvalidCheckpoint, match="q_norm"):
        exl_loader.plan(frob, ctx_size=CTX, as_architecture=LLAMA, model_draft=qwen)
    with pytest.raises(UnsupportedArchitecture, match="as_architecture"):
        exl_loader.plan(llama, ctx_size=CTX, model_draft=frob)
    with exl_loader.load(
        frob, ctx_size=CTX, as_architecture=LLAMA, model_draft=frob
    ) as model, exl_loader.load(llama, ctx_size=CTX) as plain:
        settings = {"temperature": 0, "max_new_tokens": 12, "ban_eos_token": True}
        drafted = list(model.generate_ids([5, 6, 7], settings))
        assert drafted == list(plain.generate_ids([5, 6, 7], settings))


def test_the_command_line_has_the_option(llama, frob, tmp_path, capsys):
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 8)
    commands = {
        "plan": ["--json", "--ctx-size", str(CTX)],
        "generate": ["--ctx-size", str(CTX), "--prompt", "Hi", "--temperature", "0", "--json",
                     "--max-new-tokens", "4", "--ban-eos-token"],
        "eval": ["--text", str(tmp_path / "text"), "--cache-type", "q8", "--ctx-size", "64",
                 "--json"],
    }  # fmt: skip

    def shown(folder, *more):
        found = {}
        for command, options in commands.items():
            assert cli.main([command, str(folder), *options, *more]) == 0, command
            found[command] = json.loads(capsys.readouterr().out)
        return (found["plan"]["architecture"], found["plan"]["devices"][0]["total_bytes"],
                found["generate"]["text"], found["eval"]["results"])

    assert shown(frob, "--as-architecture", LLAMA) == shown(llama)
    assert cli.main(["plan", str(frob)]) == 1
    assert "--as-architecture" in capsys.readouterr().err


def test_the_converter_has_the_option(frob, tmp_path, monkeypatch, caplog):
    from exl_loader.convert import conversion, convert, measurement

    monkeypatch.setattr(conversion, "MOST_BITS", 16)
    monkeypatch.setattr(measurement, "MIXES", [measurement.PROBE])
    few = {"bits": 8.5, "calibration_rows": 2, "calibration_row_len": 32}
    with pytest.raises(UnsupportedArchitecture):
        convert(frob, tmp_path / "out", **few)
    convert(frob, tmp_path / "out", as_architecture=LLAMA, **few)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "FrobForCausalLM"]
    with pytest.raises(UnsupportedArchitecture):
        exl_loader.plan(tmp_path / "out")
    assert exl_loader.plan(tmp_path / "out", as_architecture=LLAMA).format == "exl2"


def test_a_folder_of_an_unknown_class_is_recognised(llama, frob, tmp_path):
    assert (has_unknown_class(frob), has_unknown_class(llama)) == (True, False)
    assert not has_unknown_class(tmp_path / "absent") and not has_unknown_class(tmp_path)
    for text in ("{", "[]", "{}", '{"architectures": "x"}', '{"model_type": 5}'):
        (tmp_path / "config.json").write_text(text)
        assert not has_unknown_class(tmp_path), text
    (tmp_path / "config.json").write_text('{"model_type": "frob"}')
    assert has_unknown_class(tmp_path)
