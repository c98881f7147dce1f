"""Odd values for every setting and option: a typed error that can be printed, or a result."""

from __future__ import annotations

import dataclasses
import inspect
import random
import shutil
import unicodedata

import numpy as np
import pytest
import torch

import exl_loader
from exl_loader.backends.cpu.threads import default_threads
from exl_loader.convert import convert
from exl_loader.generation.settings import SamplingSettings
from exl_loader.memory.buffers import environment_limit
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidSettings
from support.odd_values import odd_values
from support.tiny import write_tiny_model

VOCAB_SIZE = 288
CTX = 300

FIELDS = [field.name for field in dataclasses.fields(SamplingSettings)]
SETTINGS = [*FIELDS, "stop", "penalty_alpha", "auto_max_new_tokens", "no_such_setting"]
OPTIONS = [
    name for name, parameter in inspect.signature(exl_loader.plan).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("error")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("odd") / "model")


@pytest.fixture(scope="module")
def model(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_REFERENCE", "1")
        loaded = exl_loader.load(folder, ctx_size=CTX)
    yield loaded
    loaded.unload()


def check_error(error: ExlLoaderError) -> None:
    line = str(error)
    line.encode("utf-8", "strict")
    assert 0 < len(line) < 3000
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in line)


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    random.seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_odd_setting_is_refused_or_read(name):
    known = {field.name for field in dataclasses.fields(SamplingSettings)}
    for value in odd_values():
        try:
            settings = SamplingSettings.from_dict({name: value})
        except InvalidSettings as error:
            check_error(error)
            assert ("stop" if name.startswith("stop") else name) in str(error)
            continue
        # The result has Python's own types, is bounded, and reading it again changes nothing.
        values = dataclasses.asdict(settings)
        assert set(values) == known
        assert all(type(v) in (bool, int, float, str, tuple) for v in values.values())
        assert SamplingSettings(**values) == settings


def test_odd_settings_together_give_tokens_or_a_typed_error(model, rng):
    answered = 0
    for _ in range(150):
        names = rng.sample(SETTINGS, rng.randint(1, 3))
        chosen = {name: rng.choice(odd_values()) for name in names}
        good = {}
        for name, value in chosen.items():
            try:
                SamplingSettings.from_dict({name: value})
                good[name] = value
            except InvalidSettings:
                pass
        for settings in (chosen, good):
            if "max_new_tokens" in settings:
                continue
            try:
                ids = list(model.generate_ids([1, 5, 77], settings, max_new_tokens=2))
            except ExlLoaderError as error:
                check_error(error)
            else:
                answered += 1
                assert len(ids) <= 2 and all(0 <= i < VOCAB_SIZE for i in ids)
    assert answered


@pytest.mark.parametrize("name", OPTIONS)
def test_an_odd_option_of_a_plan_is_refused_or_planned(folder, name):
    for value in odd_values():
        options = {"model_dir": folder, name: value}
        try:
            reservation = exl_loader.plan(**options)
        except ExlLoaderError as error:
            check_error(error)
        else:
            assert reservation.total_bytes > 0


@pytest.mark.parametrize("name", ["draft_max", "progress"])
def test_an_odd_option_of_a_load_is_refused(folder, name):
    for value in odd_values():
        if (name, value is None) == ("progress", True):
            continue
        with pytest.raises(InvalidSettings, match=name) as caught:
            exl_loader.load(folder, ctx_size=-1, **{name: value})
            pytest.fail("ctx_size of -1 was taken")
        check_error(caught.value)


@pytest.mark.parametrize("name", ["prompt", "ids", "count", "rope_len", "progress", "text"])
def test_odd_arguments_of_a_loaded_model(model, name):
    calls = {
        "prompt": (lambda v: list(model.generate(v, max_new_tokens=1)),
                   lambda v: list(model.generate_ids(v, max_new_tokens=1))),
        "ids": (model.prompt_logits, model.next_logits, model.prompt_logprobs, model.decode),
        "count": (lambda v: model.prompt_logprobs([1, 2], v),),
        "rope_len": (lambda v: model.next_logits([1, 2], v),),
        "progress": (lambda v: list(model.generate([1], progress=v, max_new_tokens=1)),),
        "text": (model.encode, model.apply_chat_template, model.chat_ids),
    }
    for call in calls[name]:
        for value in odd_values():
            try:
                call(value)
            except ExlLoaderError as error:
                check_error(error)


@pytest.mark.parametrize("name", [
    "messages", "message", "role", "content", "reasoning_content", "tools", "template",
    "add_generation_prompt", "continue_final_message", "a_variable",
])
def test_odd_arguments_of_a_chat_template(tmp_path, folder, name):
    chat_folder = shutil.copytree(folder, tmp_path / "chat")
    (chat_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{{ tools }}{{ a_variable }}"
    )
    tokenizer = Tokenizer.from_dir(chat_folder)
    good = {"role": "user", "content": "Hi"}
    answered = 0
    for value in odd_values():
        messages = {"messages": value, "message": [value]}.get(name, [good | {name: value}])
        options = {} if name in ("messages", "message", *good) else {name: value}
        try:
            text = tokenizer.apply_chat_template(messages, **options)
        except ExlLoaderError as error:
            check_error(error)
        else:
            assert isinstance(text, str) and tokenizer.encode(text)
            answered += 1
    assert answered or name in ("messages", "message")


@pytest.mark.parametrize("name", ["add_bos", "special", "skip_special"])
def test_odd_flags_of_a_tokenizer(folder, name):
    tokenizer = Tokenizer.from_dir(folder)
    for value in odd_values():
        try:
            if name == "skip_special":
                tokenizer.decode([1, 5], skip_special=value)
            else:
                tokenizer.encode("Hi", **{name: value})
        except InvalidSettings as error:
            assert name in str(error)


@pytest.mark.parametrize("name", [
    "model_dir", "out_dir", "bits", "head_bits", "calibration", "calibration_rows",
    "calibration_row_len", "progress",
])
def test_odd_options_of_a_conversion_are_refused(tmp_path, name):
    for value in odd_values():
        if value is None and name in ("calibration", "progress"):
            continue
        # There is no model, so a conversion with valid options fails before any work.
        options = {"model_dir": tmp_path / "none", "out_dir": tmp_path / "out", name: value}
        with pytest.raises(ExlLoaderError) as caught:
            convert(**options)
        check_error(caught.value)
    assert not (tmp_path / "out").exists()


# Settings by name


def generated(model, *arguments, **keywords):
    text = "".join(model.generate(*arguments, **keywords))
    ids = list(model.generate_ids(*arguments, **keywords))
    assert model.decode(ids) == text or not keywords.get("skip_special_tokens", True)
    return ids


def test_settings_may_be_given_by_name(model):
    as_dict = {"max_new_tokens": 5, "do_sample": False, "ban_eos_token": True}
    expected = generated(model, [1, 5, 77], as_dict)
    assert len(expected) == 5
    assert generated(model, [1, 5, 77], **as_dict) == expected
    assert generated(model, prompt=[1, 5, 77], settings=None, **as_dict) == expected


@pytest.mark.parametrize("kind", [dict, lambda **v: SamplingSettings(**v)])
def test_settings_by_name_win_over_those_of_the_dict(model, kind):
    settings = kind(max_new_tokens=9, do_sample=False, ban_eos_token=True)
    assert len(generated(model, [1, 5, 77], settings, max_new_tokens=4)) == 4
    with pytest.raises(InvalidSettings, match="max_new_tokens"):
        model.generate([1], settings, max_new_tokens="many")


@pytest.mark.parametrize(
    ("name", "similar"),
    [("max_new_token", "max_new_tokens"), ("temprature", "temperature"), ("topk", "top_k")],
)
def test_an_unknown_setting_names_a_similar_one(model, name, similar):
    for call in (model.generate, model.generate_ids):
        with pytest.raises(InvalidSettings, match=f"'{name}'.*Did you mean {similar}"):
            call([1], **{name: 5})
        with pytest.raises(InvalidSettings, match=f"'{name}'.*Did you mean {similar}"):
            call([1], {name: 5})
        with pytest.raises(InvalidSettings, match="settings: expected .* a dict.*by name"):
            call([1], 5)


def test_stop_and_stop_strings_are_one_setting():
    assert SamplingSettings.from_dict({"stop": "x"}) == SamplingSettings(stop_strings=("x",))
    with pytest.raises(InvalidSettings, match="stop_strings"):
        SamplingSettings.from_dict({"stop": ["x"], "stop_strings": ["y"]})


@pytest.mark.parametrize("function", [exl_loader.plan, exl_loader.load])
def test_an_unknown_option_names_a_similar_one(folder, function):
    with pytest.raises(InvalidSettings, match=r"'ctx_len'.*of ctx_size.*Did you mean ctx_size\?"):
        function(folder, ctx_len=512)
    with pytest.raises(InvalidSettings, match="Leave it out"):
        function(folder, zzzzzz=512)


def test_numbers_of_other_libraries_are_numbers():
    settings = SamplingSettings.from_dict({
        "temperature": np.float32(0.5), "top_k": torch.tensor(7), "do_sample": np.bool_(False),
        "custom_token_bans": np.array([3, 1]), "stop_token_ids": torch.tensor([4]),
        "logit_bias": {np.int64(5): np.float32(0.25)}, "seed": np.int64(11),
    })
    assert settings == SamplingSettings(
        temperature=0.5, top_k=7, do_sample=False, custom_token_bans=(3, 1), stop_token_ids=(4,),
        logit_bias=((5, 0.25),), seed=11,
    )


# Environment variables


@pytest.mark.parametrize("value", [
    "0", "-1", "1025", "4.5", "9" * 5000, "²", "٣x", "two", "1e999", "\udcff", "nan",
])
def test_an_odd_number_of_threads(monkeypatch, value):
    monkeypatch.setenv("EXL_LOADER_THREADS", value)
    with pytest.raises(InvalidSettings, match="EXL_LOADER_THREADS") as caught:
        default_threads()
    check_error(caught.value)


@pytest.mark.parametrize("value", [
    "0", "-1", "24", "much", "9" * 5000, "1e999GiB", "nan", "\udcff", "999999999999999999T",
])
def test_an_odd_memory_limit(monkeypatch, value):
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", value)
    with pytest.raises(InvalidSettings, match="EXL_LOADER_MEMORY_LIMIT") as caught:
        environment_limit("cpu")
    check_error(caught.value)
