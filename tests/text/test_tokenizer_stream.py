"""Decoding token by token, compared with decoding at once."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exl_loader.text.tokenizer import Tokenizer
from support.tokenizer_folders import (
    streamed,
    write,
)


@pytest.mark.parametrize("name", ["spm_bos", "json_llama3", "json_unigram", "json_metaspace"])
def test_no_piece_ends_in_half_a_character(name, tokenizers):
    tokenizer = tokenizers[name]
    text = "🎉👩‍👩‍👧 naïve 你好 Привет 🇩🇪"
    stream = tokenizer.stream()
    ids = tokenizer.encode(text, add_bos=False)
    pieces = [stream.push(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in tokenizer.decode(ids)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["spm_bos", "json_llama3"])
def test_a_character_is_returned_with_its_last_byte(name, tokenizers):
    tokenizer = tokenizers[name]
    # No token of these vocabularies holds a whole emoji, so its bytes come one by one.
    ids = tokenizer.encode("🎉🎉", add_bos=False)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "🎉🎉"
    assert pieces[-1] == "🎉" and "🎉" in pieces[:-1]


@pytest.mark.parametrize("name", ["spm_bos", "json_unigram", "json_metaspace", "json_llama3"])
def test_a_continued_text_keeps_the_space_between_two_words(name, tokenizers):
    tokenizer = tokenizers[name]
    text = "Hello world and more"
    ids = tokenizer.encode(text, add_bos=False)
    for first in range(1, len(ids)):
        stream = tokenizer.stream(previous_ids=ids[:first])
        said = "".join(map(stream.push, ids[first:])) + stream.flush()
        assert tokenizer.decode(ids[:first]) + said == text


@pytest.mark.parametrize("name", ["spm_bos", "json_llama3"])
def test_bytes_of_the_first_token_that_were_shown_are_left_out(name, tokenizers):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("Hello world and more", add_bos=False)
    for first in range(1, len(ids)):
        rest = b"".join(map(tokenizer.token_bytes, ids[first:]))
        for num_shown in range(len(tokenizer.token_bytes(ids[first])) + 1):
            stream = tokenizer.stream(True, ids[:first], num_shown)
            said = "".join(map(stream.push, ids[first:])) + stream.flush()
            assert said == rest[num_shown:].decode()


@pytest.mark.parametrize("name", ["spm_bos", "json_llama3"])
@pytest.mark.parametrize("text", ["word", " word", "\nA line.\n", "größe 🎉", ""])
def test_text_that_continues_another_has_exactly_its_bytes(name, tokenizers, text):
    tokenizer = tokenizers[name]
    ids = tokenizer.continuation_ids(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_text_that_a_tokenizer_changes_has_no_such_tokens(tokenizers):
    # This one composes characters.
    assert tokenizers["json_llama3"].continuation_ids("e\N{COMBINING ACUTE ACCENT}") is None


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streaming_any_bytes_equals_decoding_at_once(data, tokenizers):
    tokenizer = tokenizers["json_llama3"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert streamed(tokenizer, ids, True) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_becomes_a_replacement_character(tokenizers):
    tokenizer = tokenizers["spm_bos"]
    ids = tokenizer.encode("a🎉", add_bos=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_damaged_text_is_returned_eventually(tokenizers):
    tokenizer = tokenizers["json_unigram"]
    unknown = tokenizer.token_id("<unk>")
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(i) for i in [unknown] * 5]
    assert "".join(pieces) + stream.flush() == tokenizer.decode([unknown] * 5, False)


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizers):
    """The ids that are decoded for each token are counted."""
    from exl_loader.text.tokenizer.stream import StreamDecoder

    class Counting:
        def __init__(self, vocabulary):
            self._vocabulary = vocabulary
            self.longest = 0

        def decode(self, ids, skip_special):
            self.longest = max(self.longest, len(ids))
            return self._vocabulary.decode(ids, skip_special)

        def __getattr__(self, name):
            return getattr(self._vocabulary, name)

    tokenizer = tokenizers["json_unigram"]
    vocabulary = Counting(tokenizer._vocabulary)
    stream = StreamDecoder(vocabulary)
    ids = tokenizer.encode("hello world, this is a text " * 50, add_bos=False)
    text = "".join(stream.push(i) for i in ids) + stream.flush()
    assert text == tokenizer.decode(ids)
    assert vocabulary.longest <= 10


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_streaming_equals_decoding_at_once(data, skip, unusual):
    """The ids may be bytes that are not UTF-8, special tokens inside a character, or unknown."""
    for name, tokenizer in unusual.items():
        size = tokenizer.vocab_size
        ids = data.draw(st.lists(st.one_of(
            st.integers(0, size + 2),
            st.sampled_from([*range(size - 4, size), *range(14, 21), 0, 1, 3, 5, 10, -1, 1 << 70]),
        ), max_size=16), label=name)
        assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip), name


@settings(max_examples=50, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_a_copied_stream_continues_on_its_own(data, skip, unusual):
    """And it says whether text has begun that was not returned."""
    for name, tokenizer in unusual.items():
        ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=8)
        before, one, other = (data.draw(ids, label=name) for _ in range(3))
        stream = tokenizer.stream(skip)
        text = "".join(map(stream.push, before))
        copied = stream.copy()
        assert (stream.num_held > 0) == (stream.copy().flush() != ""), name
        for chosen, rest in ((stream, one), (copied, other)):
            whole = text + "".join(map(chosen.push, rest)) + chosen.flush()
            assert whole == tokenizer.decode([*before, *rest], skip), name


@pytest.mark.parametrize("cut", range(1, 12))
def test_streaming_after_a_prompt_equals_decoding_both_at_once(cut, unusual):
    for name, tokenizer in unusual.items():
        if name.startswith(("sentencepiece", "byte_level")):
            ids = tokenizer.encode("Hello world, 'tis 1 text that goes on.", add_bos=False)
            stream = tokenizer.stream(previous_ids=ids[:cut])
            said = "".join(map(stream.push, ids[cut:])) + stream.flush()
            assert tokenizer.decode(ids[:cut]) + said == tokenizer.decode(ids), name


@pytest.mark.parametrize("model", ["WordLevel", "Unigram", "BPE"])
@pytest.mark.parametrize("clean_up", [True, False, None])
def test_spaces_are_cleaned_up_as_in_transformers(model, clean_up, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<unk>", "▁", *(f"▁{word}" for word in "a b . ? ! , ' n't 'm 's 've 're x".split())]
    vocab = {word: i for i, word in enumerate(words)}
    library = Library({
        "WordLevel": lambda: models.WordLevel(vocab, unk_token="<unk>"),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
        "BPE": lambda: models.BPE(vocab, [], unk_token="<unk>"),
    }[model]())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if clean_up is None else {"clean_up_tokenization_spaces": clean_up}
    folder = write(tmp_path / "model", config, tokenizer__json=library.to_str())
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer = Tokenizer.from_dir(folder)
    random = Random(5)
    changed = 0
    for _ in range(300):
        ids = [random.randrange(1, len(words)) for _ in range(random.randrange(12))]
        expected = reference.decode(ids)
        assert tokenizer.decode(ids, False) == streamed(tokenizer, ids, False) == expected
        changed += expected != library.decode(ids)
    assert (changed > 0) == (clean_up is True and model != "BPE")
