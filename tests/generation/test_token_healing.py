"""Token healing: the last token of a prompt is drawn anew, compared with trying all tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import exl_loader
import support.tokenizer_folders as make
from exl_loader import InvalidSettings
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.text.tokenizer.token_starts import TokenStarts
from support import REPO, in_threads
from support.fake_model import fake_engine
from support.stepped import texts_together
from support.webui_server import DEMO

HEALED = {"token_healing": True, "temperature": 0}
SMOLLM2 = REPO / "build" / "smollm2"


@given(st.lists(st.binary(max_size=3)), st.binary(max_size=3))
def test_the_tokens_that_begin_with_bytes_are_those_of_trying_all(tokens, begin):
    found = TokenStarts(zip(tokens, range(len(tokens)), strict=True)).find(begin)
    assert found == [i for i, token in enumerate(tokens) if token.startswith(begin)]


# Against trying every token of the vocabulary


@pytest.fixture(scope="module", params=[
    pytest.param(DEMO, id="demo"),
    pytest.param(SMOLLM2, id="smollm2", marks=[
        pytest.mark.smollm2,
        pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(),
                           reason="no build/smollm2; python tools/smollm2.py makes it"),
    ]),
])
def model(request):
    """SentencePiece and a byte-level vocabulary."""
    with exl_loader.load(
        request.param, ctx_size=1024, cache_size=4096, cache_type="q8", max_batch_size=4
    ) as model:
        yield model


PROMPTS = [
    "import os\nimport s", "import os\nimport", "def __in", "Hello ", "The capital of Fr",
    "def f(x):\n    retur", "x = [1, 2,\n", "a — ", "wor", "https:",
]


def defined_answer(model, ids, count, **settings):
    """Return the new ids and the text to show, by trying all tokens for the first one."""
    tokenizer = model.tokenizer
    dropped = tokenizer.token_bytes(ids[-1])
    logits = model.next_logits(ids[:-1]).numpy()
    possible = [
        i for i in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(i).startswith(dropped) and i not in tokenizer.special_ids
    ]
    first = max(possible, key=lambda i: (logits[i], -i))
    rest = list(model.generate_ids(
        [*ids[:-1], first], temperature=0, max_new_tokens=count, **settings))
    data = b"".join(map(tokenizer.token_bytes, [first, *rest]))
    return [first, *rest], data[len(dropped):].decode(errors="replace")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_answer_is_that_of_trying_all_tokens(model, prompt):
    ids = model.tokenizer.prompt_ids(prompt)
    expected_ids, expected_text = defined_answer(model, ids, 8)
    generation = model.generate(prompt, HEALED | {"max_new_tokens": 8, "logprobs": 1})
    assert "".join(generation) == expected_text
    assert generation.token_ids == expected_ids
    assert generation.prompt_ids == ids[:-1]
    assert generation.stats.new_tokens in (len(expected_ids), len(expected_ids) + 1)
    assert [entry.token_id for entry in generation.logprobs] == expected_ids
    # Ids are healed as text is, and their answer continues them.
    assert "".join(model.generate(ids, HEALED | {"max_new_tokens": 8})) == expected_text
    stream = model.text_stream(ids, token_healing=True)
    assert "".join(stream.push(i)[0] for i in expected_ids) + stream.flush() == expected_text


def test_some_prompts_are_healed_by_a_longer_token(model):
    """Otherwise the test above says little."""
    longer = 0
    for prompt in PROMPTS:
        ids = model.tokenizer.prompt_ids(prompt)
        (first, *_), _ = defined_answer(model, ids, 1)
        longer += first != ids[-1]
    assert longer >= 3


def test_draws_follow_the_models_distribution_among_the_possible_tokens(model):
    ids = model.tokenizer.prompt_ids("import os\nimport s")
    dropped = model.tokenizer.token_bytes(ids[-1])
    logits = model.next_logits(ids[:-1]).numpy().astype(np.float64)
    possible = [i for i in range(model.tokenizer.vocab_size)
                if model.tokenizer.token_bytes(i).startswith(dropped)]
    weights = np.exp(logits[possible] - logits[possible].max())
    likeliest = {possible[i] for i in np.argsort(-weights)[:5]}
    drawn = [model.generate_ids(ids, token_healing=True, max_new_tokens=1, top_k=5, seed=seed)
             for seed in range(40)]
    firsts = {next(generation) for generation in drawn}
    assert len(firsts) > 1 and firsts <= likeliest


def test_together_and_with_guesses_the_answers_are_those_alone(model):
    options = HEALED | {"max_new_tokens": 24, "ban_eos_token": True}
    alone = ["".join(model.generate(prompt, options)) for prompt in PROMPTS]
    together = in_threads(lambda prompt: "".join(model.generate(prompt, options)), PROMPTS)
    assert together == alone
    guessed = in_threads(lambda prompt: "".join(model.generate(
        prompt, options | {"prompt_lookup_num_tokens": 5})), PROMPTS)
    assert guessed == alone


def test_an_answer_that_gave_its_pages_back_goes_on():
    options = HEALED | {"max_new_tokens": 900, "ban_eos_token": True}
    prompts = ["import os\nimport s", "def __in", "class Parser:\n    def __in"]
    with exl_loader.load(DEMO, ctx_size=1024, max_batch_size=3, cache_size=4096) as model:
        alone = ["".join(model.generate(prompt, options)) for prompt in prompts]
    with exl_loader.load(DEMO, ctx_size=1024, max_batch_size=3, cache_size=1024) as model:
        texts, jobs = texts_together(model, [(prompt, options) for prompt in prompts])
        assert texts == alone
        assert sum(job.stats.preemptions for job in jobs) > 0


def test_guidance_compares_the_same_first_token(model):
    """The negative prompt is not healed; a scale of 1 is no guidance."""
    prompt, options = "import os\nimport s", HEALED | {"max_new_tokens": 6}
    guided = options | {"guidance_scale": 2.0, "negative_prompt": "class Parser:\n"}
    ids, negative_ids = (model.tokenizer.prompt_ids(text)
                         for text in (prompt, guided["negative_prompt"]))
    positive, negative = (model.next_logits(part).numpy().astype(np.float64)
                          for part in (ids[:-1], negative_ids))
    log_softmax = [row - np.log(np.exp(row - row.max()).sum()) - row.max()
                   for row in (positive, negative)]
    combined = log_softmax[1] + 2 * (log_softmax[0] - log_softmax[1])
    dropped = model.tokenizer.token_bytes(ids[-1])
    possible = [i for i in range(model.tokenizer.vocab_size)
                if model.tokenizer.token_bytes(i).startswith(dropped)]
    generation = model.generate(prompt, guided)
    "".join(generation)
    assert generation.token_ids[0] == max(possible, key=lambda i: combined[i])
    assert "".join(model.generate(prompt, options | {"guidance_scale": 1.0})) == "".join(
        model.generate(prompt, options))


# What is shown and counted


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = make.write_folder(tmp_path_factory.mktemp("byte_level"), {}, "qwen2")
    make.train_byte_level(folder / "tokenizer.json", bos=False)
    return Tokenizer.from_dir(folder)


def scripted(tokenizer, prompt: str, answer: list[int]):
    """An engine that answers the prompt, without its last token, with these ids."""
    begin = len(tokenizer.prompt_ids(prompt)) - 1

    def script(text: list[int]) -> int:
        return answer[max(0, min(len(text) - begin, len(answer) - 1))]

    return fake_engine(script, tokenizer.vocab_size, tokenizer)[0]


def only(tokenizer, text: str) -> int:
    (token_id,) = tokenizer.encode(text, add_bos=False)
    return token_id


def longer(tokenizer, prompt: str) -> tuple[int, str]:
    """Return a token that has more than the prompt's last one, and what it adds."""
    last = tokenizer.token_bytes(tokenizer.prompt_ids(prompt)[-1])
    token_id = next(i for i in range(tokenizer.vocab_size)
                    if tokenizer.token_bytes(i).startswith(last)
                    and len(tokenizer.token_bytes(i)) > len(last))
    return token_id, tokenizer.token_bytes(token_id)[len(last):].decode()


def test_the_healed_token_is_one_more_than_max_new_tokens(tokenizer):
    prompt, colon = "import r", only(tokenizer, ":")
    first, added = longer(tokenizer, prompt)
    engine = scripted(tokenizer, prompt, [first, colon])
    for count in (1, 3):
        generation = engine.generate(prompt, HEALED | {"max_new_tokens": count})
        assert "".join(generation) == added + ":" * count
        assert (generation.finish_reason, generation.stats.new_tokens) == ("length", count + 1)
        assert generation.token_ids == [first] + [colon] * count
        whole = tokenizer.prompt_ids(prompt)
        assert generation.stats.prompt_tokens == len(whole) - 1


def test_min_new_tokens_come_after_it(tokenizer):
    prompt, end = "import r", tokenizer.token_id("<|im_end|>") or 0
    engine = scripted(tokenizer, prompt, [longer(tokenizer, prompt)[0], end])
    options = HEALED | {"stop_token_ids": [end], "max_new_tokens": 9}
    assert len(list(engine.generate_ids(prompt, options))) == 1
    assert len(list(engine.generate_ids(prompt, options | {"min_new_tokens": 4}))) == 5


def test_the_same_token_again_shows_nothing(tokenizer):
    prompt, colon = "import r", only(tokenizer, ":")
    engine = scripted(tokenizer, prompt, [tokenizer.prompt_ids(prompt)[-1], colon])
    pieces = list(engine.generate(prompt, HEALED | {"max_new_tokens": 1}))
    assert pieces == [":"]


def test_stop_strings_see_only_what_is_new(tokenizer):
    prompt, colon = "import r", only(tokenizer, ":")
    first, added = longer(tokenizer, prompt)
    engine = scripted(tokenizer, prompt, [first, colon])
    options = HEALED | {"max_new_tokens": 2}
    for stop, text in [(" r" + added, added + "::"), (added, ""), (added + ":", "")]:
        generation = engine.generate(prompt, options | {"stop": stop})
        assert "".join(generation) == text
        assert generation.finish_reason == ("length" if text else "stop")


def test_a_banned_string_is_not_what_the_prompt_has_of_the_token(tokenizer):
    prompt, colon = "import r", only(tokenizer, ":")
    first, added = longer(tokenizer, prompt)
    engine = scripted(tokenizer, prompt, [first, colon])
    options = HEALED | {"max_new_tokens": 2}
    assert "".join(engine.generate(prompt, options | {"banned_strings": ["r" + added]})) == (
        added + "::")
    generation = engine.generate(prompt, options | {"banned_strings": [added + ":"]})
    assert not "".join(generation).startswith(added + ":")
    # Another token that heals the prompt took its place.
    assert generation.token_ids[0] != first
    assert tokenizer.token_bytes(generation.token_ids[0]).startswith(b" r")


def test_bans_and_allowed_tokens_hold(tokenizer):
    prompt, colon = "import r", only(tokenizer, ":")
    (first, _), last = longer(tokenizer, prompt), tokenizer.prompt_ids(prompt)[-1]
    engine = scripted(tokenizer, prompt, [first, colon])
    options = HEALED | {"max_new_tokens": 1, "custom_token_bans": [first]}
    token = next(engine.generate_ids(prompt, options))
    assert token != first and tokenizer.token_bytes(token).startswith(b" r")
    options = HEALED | {"max_new_tokens": 1, "allowed_tokens": [last, colon]}
    assert list(engine.generate_ids(prompt, options)) == [last, colon]
    with pytest.raises(InvalidSettings, match="allowed_tokens: expected a token that may come"):
        list(engine.generate_ids(prompt, options | {"allowed_tokens": [colon]}))


def test_prompts_that_stay_as_they_are(tokenizer):
    special = next(iter(tokenizer.special_ids))
    emoji = tokenizer.encode("\N{GRINNING FACE}", add_bos=False)
    assert len(emoji) > 1
    letter = only(tokenizer, "x")
    for ids in ([letter], [letter, special], [letter, *emoji], [letter, emoji[0]]):
        engine, _, _ = fake_engine(lambda text: len(text), tokenizer.vocab_size, tokenizer)
        generation = engine.generate_ids(ids, HEALED | {"max_new_tokens": 3, "ban_eos_token": True})
        assert list(generation) == [len(ids), len(ids) + 1, len(ids) + 2]
        assert generation.prompt_ids == ids


def test_without_bytes_of_tokens_it_is_refused_by_name(tmp_path):
    unknown = Tokenizer.from_dir(make.unusual_tokenizers(tmp_path)["wordpiece_False"])
    assert not unknown.bytes_known
    for found, tokenizer in (("another kind", unknown), ("no tokenizer", None)):
        engine, _, _ = fake_engine(lambda text: 5, 40, tokenizer)
        with pytest.raises(InvalidSettings, match=f"^token_healing: .* found {found}"):
            engine.generate_ids([1, 2], HEALED)
        assert list(engine.generate_ids([1, 2], temperature=0, max_new_tokens=1)) == [5]


# Grammars


@pytest.mark.parametrize(("settings", "shape"), [
    ({"regex_pattern": "[a-z]{3} = [0-9]{2};"}, "[a-z]{3} = [0-9]{2};"),
    ({"grammar_string": 'root ::= [a-z]{1,6} " = " ("1" | "22") ";"'}, "[a-z]+ = (1|22);"),
    ({"grammar_string": 'start: /[a-z]{1,6}/ " = " ("1" | "22") ";"'}, "[a-z]+ = (1|22);"),
    ({"json_schema": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2,
                      "maxItems": 2}}, r'\[\s*"[ab]"\s*,\s*"[ab]"\s*\]'),
    # Where the grammar leaves no choice.
    ({"regex_pattern": "ys, os"}, "ys, os"),
    ({"grammar_string": 'root ::= "ys, os"'}, "ys, os"),
])
@pytest.mark.parametrize("prompt", ["import os\nimport s", 'x = "', "def f():\n    ", "a\\"])
def test_a_grammar_is_about_what_follows_the_prompt(model, prompt, settings, shape):
    pytest.importorskip("llguidance")
    generation = model.generate(prompt, HEALED | settings | {"max_new_tokens": 60})
    text = "".join(generation)
    assert re.fullmatch(shape, text), text
    tokenizer = model.tokenizer
    dropped = tokenizer.token_bytes(tokenizer.prompt_ids(prompt)[-1])
    data = b"".join(map(tokenizer.token_bytes, generation.token_ids))
    assert data == dropped + text.encode()


def test_a_grammar_after_a_trigger_does_not_know_of_the_prompt(tokenizer):
    pytest.importorskip("llguidance")
    prompt, trigger = "import r", only(tokenizer, ":")
    engine = scripted(tokenizer, prompt, [longer(tokenizer, prompt)[0], trigger, 0])
    text = "".join(engine.generate(prompt, HEALED | {
        "regex_pattern": "xy", "grammar_trigger": ":", "max_new_tokens": 20}))
    assert text.endswith(":xy")
