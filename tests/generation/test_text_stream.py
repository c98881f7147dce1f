"""The text of a generation: whole characters, stop strings, special tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import support.tokenizer_folders as make
from exl_loader.generation.text_stream import StopStrings
from exl_loader.text.tokenizer import Tokenizer
from support.fake_model import fake_engine, spell

GREEDY = {"temperature": 0, "max_new_tokens": 20}


def talk(tokenizer, answer, vocab_size=600, **options):
    engine, model, cache = fake_engine(spell(tokenizer, answer), vocab_size, tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 200} | options)
    pieces = list(generation)
    assert cache.num_free_pages == cache.num_pages
    assert all(pieces)
    return pieces, generation


ANSWER = "naïve 🎉👩‍👩‍👧 你好\n    return x  "


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
def test_text_streams_in_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    pieces, generation = talk(tokenizer, ANSWER)
    assert "".join(pieces) == ANSWER
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10
    assert generation.finish_reason == "eos"
    assert generation.token_ids == tokenizer.encode(ANSWER, add_bos=False)


def test_half_a_character_at_the_end_is_a_replacement_character(byte_tokenizer):
    pieces, generation = talk(byte_tokenizer, "ab🎉", max_new_tokens=4)
    assert "".join(pieces) == "ab\ufffd"
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
@pytest.mark.parametrize(("stop", "shown"), [
    (["<end>"], "one <e two "),
    ("<end>", "one <e two "),
    (["<end>", "two"], "one <e "),
    (["three"], "one <e two <end> "),
    (["🎉"], "one <e two <end> three "),
    (["never"], "one <e two <end> three 🎉 <en"),
    (["one"], ""),
])
def test_stop_strings(kind, stop, shown, request):
    tokenizer = request.getfixturevalue(kind)
    answer = "one <e two <end> three 🎉 <en"
    pieces, generation = talk(tokenizer, answer, stop_strings=stop)
    assert "".join(pieces) == shown
    assert generation.finish_reason == ("eos" if stop == ["never"] else "stop")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory) -> Tokenizer:
    """Byte-level, with control tokens that are not shown."""
    folder = tmp_path_factory.mktemp("chat")
    make.write_folder(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    make.train_byte_level(folder / "tokenizer.json", bos=True)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def spm_chat_tokenizer(tmp_path_factory) -> Tokenizer:
    """SentencePiece, with control tokens that are not shown."""
    added = {str(500 + i): make.added_token(t) for i, t in enumerate([*make.CHAT_TOKENS, "<a▁b>"])}
    folder = tmp_path_factory.mktemp("spm_chat")
    make.write_folder(folder, {
        "tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False,
        "added_tokens_decoder": added,
    })
    make.train_sentencepiece(folder / "tokenizer.model", "bpe", vocab_size=500)
    return Tokenizer.from_dir(folder)


CONTROL_ANSWER = "one <|user|>two<|end|>\nthree <|assistant|>🎉<|end|><|user|> four"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("stop", "shown"), [
    # One token; one token and text; several control tokens; text and a control token.
    ("<|end|>", "one <|user|>two"),
    ("<|end|>\n", "one <|user|>two"),
    ("<|end|>\nthree", "one <|user|>two"),
    ("<|end|><|user|>", "one <|user|>two<|end|>\nthree <|assistant|>🎉"),
    ("<|end|><|user|> four", "one <|user|>two<|end|>\nthree <|assistant|>🎉"),
    ("two<|end|>", "one <|user|>"),
    ("o<|end|>\nth", "one <|user|>tw"),
    ("<|user|>", "one "),
    ("end|>", "one <|user|>two<|"),
    ("<|end|>never", CONTROL_ANSWER),
    ("two\n", CONTROL_ANSWER),
])
@pytest.mark.parametrize("kind", ["chat_tokenizer", "spm_chat_tokenizer"])
def test_stop_strings_with_control_tokens(kind, stop, shown, skip, request):
    """Stop strings end the text whether or not control tokens are shown."""
    tokenizer = request.getfixturevalue(kind)
    if skip:
        for token in make.CHAT_TOKENS:
            shown = shown.replace(token, "")
        shown = shown.removesuffix("<|")
        # The stop is not in the answer, but it is in what is shown of it.
        shown = shown.partition(stop)[0]
    pieces, generation = talk(
        tokenizer, CONTROL_ANSWER, vocab_size=720, stop_strings=[stop], skip_special_tokens=skip,
    )
    assert "".join(pieces) == shown
    found = stop != "<|end|>never" and (skip or stop != "two\n")
    assert generation.finish_reason == ("stop" if found else "eos")
    if stop == "<|user|>":
        ids = tokenizer.encode(CONTROL_ANSWER.split(stop)[0], add_bos=False)
        assert generation.stats.new_tokens == len(ids) + 1


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", ["<a▁b>", "<a b>", "<a▁b> z"])
def test_a_stop_string_with_the_space_mark_of_a_control_token(stop, skip, spm_chat_tokenizer):
    pieces, generation = talk(
        spm_chat_tokenizer, "x y<a▁b> z", stop_strings=[stop], skip_special_tokens=skip
    )
    assert ("".join(pieces), generation.finish_reason) == ("x y", "stop")


@settings(max_examples=200)
@given(
    segments=st.lists(st.tuples(st.text("ab<>", max_size=4), st.text("ab<>", max_size=4))),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_found_across_hidden_text(segments, stops):
    found, shown, seen, visible, stopped = StopStrings(stops), "", "", "", False
    for hidden, piece in segments:
        before = visible
        more, stopped = found.push(piece, hidden)
        shown, seen, visible = shown + more, seen + hidden + piece, visible + piece
        assert stopped == any(stop in text for stop in stops for text in (seen, visible))
        assert visible.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if stopped:
            assert len(shown) >= len(before) - max(map(len, stops)) + 1
            return
    assert shown + found.flush() == visible


@settings(max_examples=200)
@given(
    text=st.text("ab<>", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=8),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_the_text_where_the_first_one_is_complete(text, cuts, stops):
    """However the text is cut: no part of a stop string is shown, and nothing else is lost."""
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    found, shown, start, stopped = StopStrings(stops), "", 0, False
    for end in ends:
        piece, stopped = found.push(text[start:end])
        shown, start = shown + piece, end
        seen = text[:end]
        assert stopped == any(stop in seen for stop in stops)
        if stopped:
            assert shown == seen[: min(seen.find(s) for s in stops if s in seen)]
            return
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    assert shown + found.flush() == text


def test_stop_token_ids(byte_tokenizer):
    semicolon = byte_tokenizer.encode(";", add_bos=False)
    pieces, generation = talk(byte_tokenizer, "a;b", stop_token_ids=semicolon)
    assert ("".join(pieces), generation.finish_reason) == ("a", "stop")


def test_special_tokens_are_shown_on_request(byte_tokenizer):
    assert "".join(talk(byte_tokenizer, "a<s>b")[0]) == "ab"
    shown = talk(byte_tokenizer, "a<s>b", skip_special_tokens=False)[0]
    assert "".join(shown) == "a<s>b"


def test_generate_ids_gives_the_ids_of_the_text(byte_tokenizer):
    engine, _, _ = fake_engine(spell(byte_tokenizer, "hello; world"), 300, byte_tokenizer)
    ids = list(engine.generate_ids([5], GREEDY))
    assert byte_tokenizer.decode(ids) == "hello; world"
    ids = list(engine.generate_ids([5], GREEDY | {"stop_strings": ["; w"]}))
    assert byte_tokenizer.decode(ids) == "hello; w"


def test_after_a_text_prompt_the_space_between_words_is_kept(spm_tokenizer):
    prompt = spm_tokenizer.encode("two")
    answer = [*spm_tokenizer.encode("words", add_bos=False), spm_tokenizer.eos_token_ids[0]]
    engine, _, _ = fake_engine(lambda ids: answer[len(ids) - len(prompt)], 600, spm_tokenizer)
    assert "".join(engine.generate("two", GREEDY)) == " words"
    assert "".join(engine.generate("two", GREEDY | {"stop_strings": [" words"]})) == ""
    # After ids, as from a chat template, the answer is a text of its own.
    assert "".join(engine.generate(prompt, GREEDY)) == "words"
