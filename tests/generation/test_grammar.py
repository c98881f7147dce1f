"""Texts that follow a grammar: allowed tokens, ends, and grammars that are refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from exl_loader.generation.grammar.masks import Grammars
from exl_loader.generation.settings import SamplingSettings
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import InvalidSettings
from support import in_threads, run_python
from support.fake_model import fake_engine
from support.grammar_cases import follows, matcher_of
from support.tokenizer_folders import (
    train_byte_level,
    train_sentencepiece,
    train_unigram_json,
    write_folder,
)

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["größe", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}

# llama.cpp's own example of recursion, groups, classes, escapes, repeats and comments.
JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value){0,3} )? "]" ws
string ::= "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-cA-C] [0-9a-fA-F]{3}) # no surrogates
  ){0,12} "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,5}) ("." [0-9]{1,3})?
ws     ::= | " " | "\n" [ \t]{0,4}
"""


def byte_level(folder: Path) -> Tokenizer:
    write_folder(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    train_byte_level(folder / "tokenizer.json", bos=False)
    return Tokenizer.from_dir(folder)


def sentencepiece(folder: Path) -> Tokenizer:
    """A tokenizer as Llama 2's: byte fallback, and decoding drops the first space."""
    write_folder(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    train_sentencepiece(folder / "tokenizer.model", "bpe")
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def engine_of(tokenizer, **options):
    """A model that prefers one token, another one in each step."""
    def likes(ids):
        return (len(ids) * 7919 + ids[-1]) % tokenizer.vocab_size

    return fake_engine(likes, tokenizer.vocab_size, tokenizer, ctx_size=1024, **options)[0]


def written(engine, prompt="a prompt", **settings):
    """Return the text and the reason why it ended."""
    with engine.generate(prompt, {"temperature": 1.5, "max_new_tokens": 600, **settings}) as run:
        return "".join(run), run.finish_reason


def check_schema(value) -> None:
    assert set(value) == set(SCHEMA["required"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"größe", "b"}
    assert value["next"] is None or isinstance(value["next"], bool)


@pytest.mark.parametrize("form", [dict, json.dumps], ids=["dict", "text"])
def test_texts_that_follow_a_schema_are_valid_json(tokenizer, form):
    engine = engine_of(tokenizer)
    texts = set()
    for seed in range(12):
        text, reason = written(engine, json_schema=form(SCHEMA), seed=seed)
        check_schema(json.loads(text))
        assert reason in ("stop", "eos")
        texts.add(text)
    assert len(texts) == 12


def test_a_recursive_grammar_with_all_syntax(tokenizer):
    engine = engine_of(tokenizer)
    ended = 0
    for seed in range(12):
        text, reason = written(engine, grammar_string=JSON_GBNF, seed=seed)
        if reason != "length":
            assert isinstance(json.loads(text), dict)
            ended += 1
    assert ended >= 6


LARK = """
%ignore / /
start: NAME "(" (argument ("," argument)*)? ")"
argument: NAME | NUMBER | start
NAME: /[a-c]{1,3}/
NUMBER: /[0-9]{1,2}/
"""


def call_ends(text: str, start: int = 0) -> int:
    """Return where the call of LARK that begins at `start` ends; -1 if there is none."""
    name = re.match(r" *[a-c]{1,3} *\( *", text[start:])
    if name is None:
        return -1
    end = start + name.end()
    while not text[end:].startswith(")"):
        inner = call_ends(text, end)
        plain = re.match(r" *([a-c]{1,3}|[0-9]{1,2})", text[end:])
        if inner < 0 and plain is None:
            return -1
        end = inner if inner >= 0 else end + plain.end()
        end += re.match(r" *,? *", text[end:]).end()
    return end + 1


def test_a_grammar_in_lark(tokenizer):
    engine = engine_of(tokenizer)
    ended = set()
    for seed in range(12):
        text, reason = written(engine, grammar_string=LARK, seed=seed)
        if reason != "length":
            assert call_ends(text) == len(text)
            ended.add(text)
    assert len(ended) >= 3


def test_greedy_texts_follow_the_grammar(tokenizer):
    check_schema(json.loads(written(engine_of(tokenizer), json_schema=SCHEMA, temperature=0)[0]))


@pytest.mark.parametrize("settings", [
    {"top_k": 3, "min_p": 0.1}, {"mirostat_mode": 2}, {"repetition_penalty": 1.5, "top_p": 0.5},
    {"dry_multiplier": 2.0, "xtc_probability": 1.0}, {"logit_bias": {"5": 90}},
])
def test_samplers_choose_among_allowed_tokens(tokenizer, settings):
    check_schema(json.loads(written(engine_of(tokenizer), json_schema=SCHEMA, **settings)[0]))


@pytest.mark.parametrize("settings", [
    {"grammar_string": "root ::= root"},
    {"grammar_string": "start: nothing"},
    {"grammar_string": 'root: "a"'},
    {"json_schema": {"type": "strin"}},
    {"json_schema": {"not": {"type": "string"}}},
    {"json_schema": {"type": "string", "pattern": "("}},
    {"json_schema": {"$ref": "#/nowhere"}},
    {"json_schema": {"x-guidance": 3}},
])
def test_invalid_grammars_are_refused(tokenizer, settings):
    (name,) = settings
    with pytest.raises(InvalidSettings, match=f"{name}: expected a ") as caught:
        written(engine_of(tokenizer), **settings)
    assert caught.value.details


def test_two_grammars_are_refused():
    with pytest.raises(InvalidSettings, match="only one of json_schema and grammar_string"):
        SamplingSettings.from_dict({"json_schema": {}, "grammar_string": 'root ::= "a"'})


def test_a_text_ends_where_its_grammar_ends(tokenizer):
    engine = engine_of(tokenizer)
    for extra in ({}, {"ban_eos_token": True}):
        text, reason = written(engine, grammar_string='root ::= "yes" | "größe"', **extra)
        assert text in ("yes", "größe") and reason == "stop"


def test_the_end_token_is_allowed_only_at_the_end_of_the_grammar(single_bytes):
    eos = single_bytes.eos_token_id
    letters = {i for i in range(288) if single_bytes.token_bytes(i) in (b"a", b"b")}
    matcher = matcher_of(single_bytes, grammar_string='root ::= "ab"+')
    assert eos not in matcher.allowed_ids
    for text in ("a", "b"):
        matcher.accept(*single_bytes.encode(text, add_bos=False))
    assert set(matcher.allowed_ids) == {eos, min(letters)}
    matcher.accept(eos)
    assert matcher.complete
    banned = matcher_of(single_bytes, grammar_string='root ::= "ab"*', ban_eos_token=True)
    assert eos not in banned.allowed_ids and len(banned.allowed_ids) == 1


def test_with_a_banned_end_token_the_text_continues_to_the_last_token(tokenizer):
    text, reason = written(engine_of(tokenizer), grammar_string="root ::= [ab]*",
                           ban_eos_token=True, max_new_tokens=40)
    assert reason == "length" and len(text) >= 39 and set(text) <= {"a", "b"}


def test_a_grammar_of_the_empty_text_is_refused_with_a_banned_end_token(single_bytes):
    engine = engine_of(single_bytes)
    nothing = {"grammar_string": 'root ::= ""'}
    assert written(engine, **nothing) == ("", "eos")
    with pytest.raises(InvalidSettings, match="it allows no text"):
        engine.generate("a", {**nothing, "ban_eos_token": True})


def test_special_tokens_are_not_text(tokenizer):
    allowed = set(matcher_of(tokenizer, grammar_string="root ::= .+").allowed_ids)
    assert not allowed & tokenizer.special_ids
    texts = {tokenizer.token_bytes(i) for i in allowed}
    assert b"\xc3" in texts and b" " in texts and b"\xff" not in texts


class TokensOnly:
    """A tokenizer with the given tokens; several may have the same bytes."""

    bytes_known, strips_space, special_ids = True, False, frozenset[int]()

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), *tokens]
        self.vocab_size, self.eos_token_ids = len(self.tokens), ()

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def encode(self, text: str, add_bos: bool, special: bool) -> list[int]:
        return list(text.encode())


def test_equal_tokens_long_tokens_and_models_without_an_end_token():
    tokenizer = TokensOnly(b"a", b"a" * 1000, b"a" * 5000)
    matcher = matcher_of(tokenizer, grammar_string='root ::= "b" | "a"* "c"')
    assert matcher.allowed_ids.tolist() == [*b"abc", 256, 257]
    matcher.accept(257)
    assert matcher.allowed_ids.tolist() == [*b"ac", 256, 257] and not matcher.complete
    matcher.accept(ord("c"))
    assert matcher.complete


def test_a_hidden_first_space_is_optional(tmp_path):
    tokenizer = sentencepiece(tmp_path / "spm")
    allowed = matcher_of(tokenizer, grammar_string='root ::= "the " "end"').allowed_ids
    assert {b"t", b" t"} <= {tokenizer.token_bytes(i) for i in allowed}
    engine = engine_of(tokenizer)
    texts = {written(engine, grammar_string='root ::= "the " "end"', seed=i)[0] for i in range(8)}
    assert texts == {"the end"}
    # After a text prompt the space is shown, so a grammar without a space gets none.
    allowed = Grammars(tokenizer, tokenizer.vocab_size, ()).matcher(
        SamplingSettings(grammar_string='root ::= "the " "end"'), continues_text=True).allowed_ids
    assert {token[:1] for token in map(tokenizer.token_bytes, allowed)} == {b"t"}


def test_tokens_without_known_bytes_are_refused(tmp_path):
    train_unigram_json(write_folder(tmp_path / "unigram", {}) / "tokenizer.json")
    unigram = Tokenizer.from_dir(tmp_path / "unigram")
    for tokenizer, found in ((unigram, "another kind"), (None, "no tokenizer")):
        engine = fake_engine(lambda ids: 1, 800, tokenizer)[0]
        with pytest.raises(InvalidSettings, match=found):
            engine.generate_ids([5], {"json_schema": {}})


def test_without_the_package_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = engine_of(tokenizer)
    with pytest.raises(InvalidSettings, match="grammar_string.*pip install llguidance"):
        engine.generate("a", {"grammar_string": 'root ::= "a"'})
    assert written(engine, seed=1, max_new_tokens=5)[0]


def test_requests_without_a_grammar_do_not_import_the_package(tiny_model_dir):
    script = (
        "import sys, exl_loader\n"
        f"with exl_loader.load({str(tiny_model_dir)!r}, ctx_size=256) as model:\n"
        "    with model.generate('hello', {'max_new_tokens': 4, 'json_schema': None}) as run:\n"
        "        list(run)\n"
        "assert 'llguidance' not in sys.modules\n"
    )
    run_python(script)


def test_concurrent_requests_have_separate_states(tokenizer):
    engine = engine_of(tokenizer, max_batch_size=4, pages=64, chunk_size=64)
    plain = {"seed": 4, "max_new_tokens": 60}
    alone = written(engine, **plain)
    schema = {"json_schema": SCHEMA, "seed": 5}
    constrained_alone = written(engine, **schema)
    results = in_threads(lambda settings: written(engine, **settings), [schema, plain] * 3)
    assert results == [constrained_alone, alone] * 3


def test_prompt_lookup_and_guidance_follow_the_grammar(tokenizer):
    engine = engine_of(tokenizer, chunk_size=64, logits_rows=32, pages=16)
    settings = {"grammar_string": 'root ::= ("abc, " [0-9]){20}', "seed": 3}
    text, reason = written(engine, **settings)
    assert re.fullmatch("(abc, [0-9]){20}", text) and reason == "stop"
    assert written(engine, **settings, prompt_lookup_num_tokens=4) == (text, reason)
    guided, _ = written(engine, **settings, guidance_scale=1.5, negative_prompt="no")
    assert re.fullmatch("(abc, [0-9]){20}", guided)


def test_schemas_may_set_the_whitespace(single_bytes):
    flexible = {"type": "array", "items": {"type": "boolean"}}
    assert follows(single_bytes, "[ true,\n  false ]", json_schema=flexible)
    assert not follows(single_bytes, "[" + " " * 30 + "true]", json_schema=flexible)
    tight = {**flexible, "x-guidance": {"whitespace_flexible": False}}
    assert follows(single_bytes, "[true,false]", json_schema=tight)
    assert not follows(single_bytes, "[ true]", json_schema=tight)


class PanicException(BaseException):
    """The exception of compiled Rust code for an index out of range."""


@pytest.mark.parametrize(
    ("function", "fault", "words"),
    [
        ("LLMatcher", AttributeError("no LLMatcher"), "1.9 or newer.*Upgrade"),
        ("LLMatcher", TypeError("unexpected keyword argument 'limits'"), "1.9 or newer.*limits"),
        ("LLTokenizer", PanicException("index out of bounds"), "found index out of bounds"),
        ("LLMatcher", PanicException(""), "found PanicException"),
        ("LLParserLimits", ValueError("a bad limit"), "found a bad limit"),
    ],
)
def test_a_library_error_is_a_typed_error(single_bytes, monkeypatch, function, fault, words):
    import llguidance

    def fails(*arguments, **options):
        raise fault

    fails.grammar_from_lark = llguidance.LLMatcher.grammar_from_lark
    monkeypatch.setattr(llguidance, function, fails)
    grammars = Grammars(single_bytes, 288, [2])
    with pytest.raises(InvalidSettings, match=f"grammar_string.*{words}"):
        grammars.matcher(SamplingSettings(grammar_string='root ::= "a"'))


def test_an_interrupt_in_the_library_is_raised(single_bytes, monkeypatch):
    import llguidance

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(llguidance, "LLTokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Grammars(single_bytes, 288, [2]).matcher(SamplingSettings(grammar_string='root ::= "a"'))


@pytest.mark.parametrize("call", ["compute_bitmask", "consume_token"])
def test_a_panic_in_the_middle_of_a_text_is_a_typed_error(single_bytes, call):
    matcher = Grammars(single_bytes, 288, [2]).matcher(
        SamplingSettings(grammar_string='root ::= [a-z]+')
    )

    class Panicking:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name == call:
                raise PanicException("explicit panic")
            return getattr(self._inner, name)

    matcher._matcher = Panicking(matcher._matcher)
    with pytest.raises(InvalidSettings, match="explicit panic"):
        matcher.accept(int(matcher.allowed_ids[0]))
