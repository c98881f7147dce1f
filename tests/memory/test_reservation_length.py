"""The warning for a context beyond the model's own length, and its recommended options."""

import json
import random
import re

import pytest

import exl_loader
from exl_loader import plan
from exl_loader.checkpoint.rope import parse_ropes
from exl_loader.commands.cli import main
from exl_loader.memory.reservation.length import alpha_for, length_warning, stretched
from exl_loader.utils.json_keys import Keys
from support.sparse import write_sparse_exl2


def own_length(max_position_embeddings, **scaling):
    values = {"rope_theta": 1e4, "rope_scaling": scaling or None}
    return parse_ropes(Keys(values, "config.json"), 64, max_position_embeddings)[0].own_length


@pytest.mark.parametrize(("length", "scaling", "expected"), [
    (4096, {}, 4096),
    # Both ways in which configs with a factor are written: before scaling, and after it.
    (2048, {"type": "linear", "factor": 4.0}, 8192),
    (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
    (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
    (163840, {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}, 163840),
    (131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 131072),
    (4096, {"type": "linear", "factor": 0.5}, 4096),
])
def test_the_own_length_has_the_scaling_of_the_config(length, scaling, expected):
    assert own_length(length, **scaling) == expected


@pytest.mark.parametrize("ctx_size", [1, 4095, 4096])
def test_there_is_no_warning_within_the_own_length(ctx_size):
    assert length_warning(ctx_size, 4096, 1.0, 1.0) is None


def test_there_is_a_warning_one_token_beyond_the_own_length():
    warning = length_warning(4097, 4096, 1.0, 1.0)
    assert "4,097 tokens is beyond the model's own length of 4,096 tokens" in warning.text


def test_twice_the_length_needs_the_usual_alpha_value():
    assert length_warning(16384, 8192, 1.0, 1.0).remedy == "alpha_value 2.6 or compress_pos_emb 2"


def test_each_option_is_recommended_for_the_value_of_the_other():
    warning = length_warning(16384, 4096, 1.0, 2.0)
    assert (warning.alpha_value, warning.compress_pos_emb) == (2.6, 4.0)
    assert "stretch to 8,192" in warning.text


def test_the_recommended_value_ends_the_warning():
    numbers = random.Random(12)
    for _ in range(2000):
        own = numbers.randint(2, 1 << 18)
        ctx_size = own + numbers.randint(1, 7 * own)
        alpha, compress = (round(numbers.uniform(0.5, 3), 2) for _ in range(2))
        warning = length_warning(ctx_size, own, alpha, compress)
        if warning is None:
            assert stretched(own, alpha, compress) >= ctx_size
            continue
        assert length_warning(ctx_size, own, warning.alpha_value, compress) is None
        assert length_warning(ctx_size, own, alpha, warning.compress_pos_emb) is None


def test_a_length_that_no_value_reaches_has_no_remedy():
    warning = length_warning((1 << 31) - 1, 2, 1.0, 1.0)
    assert warning.remedy == "" and "Choose at most 2 tokens" in warning.text


@pytest.mark.parametrize(("stretch", "recommended"), [(1.5, 1.75), (2, 2.5)])
def test_alpha_is_near_what_the_web_ui_recommends(stretch, recommended):
    assert abs(alpha_for(stretch) - recommended) <= 0.15


def test_a_plan_warns_in_words_and_in_json(tmp_path, capsys):
    folder = write_sparse_exl2(tmp_path / "m", max_position_embeddings=2048)
    assert main(["plan", str(folder), "--ctx-size", "4096"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Warning: a context of 4,096 tokens is beyond .* alpha_value 2\.6", output)
    assert main(["plan", str(folder), "--ctx-size", "4096", "--json"]) == 0
    warning = json.loads(capsys.readouterr().out)["length_warning"]
    assert (warning["own_length"], warning["compress_pos_emb"]) == (2048, 2.0)
    assert main(["plan", str(folder), "--ctx-size", "2048", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length_warning"] is None


def test_a_stretched_model_is_planned_without_a_warning(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", max_position_embeddings=2048)
    found = plan(folder, ctx_size=4096, compress_pos_emb=2)
    assert found.length_warning is None and found.stretched_length == 4096
    assert found.to_dict()["stretched_length"] == 4096


def test_loading_beyond_the_own_length_is_a_warning(tiny_model, caplog):
    folder = tiny_model(max_position_embeddings=512)
    exl_loader.load(folder, ctx_size=512, device="cpu").unload()
    assert "own length" not in caplog.text
    exl_loader.load(folder, ctx_size=768, device="cpu").unload()
    assert "768 tokens is beyond the model's own length of 512 tokens" in caplog.text


def test_every_command_that_loads_has_the_recommended_options(tiny_model, tmp_path, capsys):
    folder = tiny_model(max_position_embeddings=256)
    options = ["--ctx-size", "512", "--compress-pos-emb", "2"]
    assert main(["generate", str(folder), "--max-new-tokens", "2", *options]) == 0
    text = tmp_path / "text"
    text.write_text("some text " * 40)
    assert main(["eval", str(folder), "--text", str(text), "--tokens", "20",
                 "--cache-type", "q4", *options]) == 0
    assert "own length" not in capsys.readouterr().err
