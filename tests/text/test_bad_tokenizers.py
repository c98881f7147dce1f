"""Damaged tokenizer files and odd arguments are typed errors, or they work."""

from __future__ import annotations

import json
import shutil
from random import Random

import pytest

from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidSettings, InvalidTokenizer
from support.tokenizer_folders import (
    streamed,
    write,
)

BROKEN = {
    "tokenizer.json": [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe\x00"],
    "tokenizer.model": [b"", b"garbage", b"\x00" * 100, b"\x0a\xff\xff\xff\xff\x0f"],
    "tokenizer_config.json": [
        b"{", b"[]", b'{"bos_token": 5}', b'{"add_bos_token": "yes"}',
        b'{"added_tokens_decoder": {"x": "y"}}', b'{"added_tokens_decoder": {"5": {}}}',
        b'{"extra_special_tokens": "a"}',
    ],
    "added_tokens.json": [b"{", b'{"a": "b"}', b'{"a": -1}'],
}


@pytest.mark.parametrize(
    ("file", "data"), [(file, data) for file, values in BROKEN.items() for data in values]
)
def test_broken_files_are_typed_errors(file, data, folders, tmp_path):
    folder = shutil.copytree(folders["spm_plain"], tmp_path / "model")
    if file == "added_tokens.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / file).write_bytes(data)
    with pytest.raises(InvalidTokenizer) as caught:
        Tokenizer.from_dir(folder)
    assert caught.value.remedy


def test_a_merge_without_the_declared_prefix_is_an_error(folders, tmp_path):
    """The tokenizers library aborts the process on such a file."""
    folder = shutil.copytree(folders["json_qwen"], tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "##"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InvalidTokenizer, match="lacks the prefix"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("name", ["spm_chat", "json_llama3", "json_metaspace", "json_unigram"])
def test_damaged_vocabularies_are_typed_errors_or_work(name, folders, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    path = folder / ("tokenizer.model" if name.startswith("spm") else "tokenizer.json")
    whole, random = path.read_bytes(), Random()
    outcomes = {"typed": 0, "works": 0}
    for _ in range(60):
        data = bytearray(whole)
        place, length = random.randrange(len(data)), random.randrange(1, 60)
        kind = random.randrange(3)
        if kind == 0:
            data[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[place : place + length]
        else:
            data[place:place] = data[:length]
        path.write_bytes(data)
        try:
            tokenizer = Tokenizer.from_dir(folder)
            ids = tokenizer.encode("Hello wörld </s> 🎉\n x")
            assert isinstance(tokenizer.decode(ids) + streamed(tokenizer, ids, True), str)
            outcomes["works"] += 1
        except InvalidTokenizer:
            outcomes["typed"] += 1
    assert outcomes["typed"] > 0


@pytest.mark.parametrize("text", [
    "\ud800", "a\udfffb", "\udc80" * 5, "\ud83d\ude00", "\x00\ufffe\uffff", "\U0010ffff",
    "a" * 100_000, "é" * 20_000, " " * 20_000, "<s>" * 5_000,
])
def test_any_text_is_encoded(text, unusual):
    for name, tokenizer in unusual.items():
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids), name
        assert isinstance(tokenizer.decode(ids), str)
        assert tokenizer.prompt_ids(text)[-1:] == ids[-1:] or not ids
        assert tokenizer.token_id(text) is None or text == tokenizer.decode(ids, False)


@pytest.mark.parametrize("ids", [
    [1 << 31], [1 << 32], [1 << 64], [10**4000], [-1], [-(10**30)],
])
def test_ids_outside_of_every_vocabulary_are_left_out(ids, unusual):
    for tokenizer in unusual.values():
        assert tokenizer.decode(ids) == "" == streamed(tokenizer, ids, True)


@pytest.mark.parametrize("ids", [[1.5], ["1"], "12", b"12", [None], None, 5, [[1]], [float("nan")],
                                 [True]])
def test_values_that_are_not_ids_are_errors(ids, unusual):
    for tokenizer in unusual.values():
        with pytest.raises(InvalidSettings, match="token ids"):
            tokenizer.decode(ids)


class PanicException(BaseException):  # noqa: N818
    """The name that pyo3 gives a panic of compiled code."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), ValueError("no"),
                                   OverflowError("too large"), Exception("unk token")])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_panics_of_the_library_are_typed_errors(method, error, byte_level, tmp_path):
    folder = write(tmp_path / "model", {}, tokenizer__json=byte_level)
    tokenizer = Tokenizer.from_dir(folder)

    class Panicking:
        def __getattr__(self, name):
            raise error

        def __setattr__(self, name, value):
            pass

    tokenizer._vocabulary._tokenizer = Panicking()
    with pytest.raises(InvalidTokenizer, match=str(error)):
        tokenizer.encode("a") if method == "encode" else tokenizer.decode([5])


def test_an_interrupt_is_not_turned_into_an_error(byte_level, tmp_path):
    folder = write(tmp_path / "model", {}, tokenizer__json=byte_level)
    tokenizer = Tokenizer.from_dir(folder)

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    tokenizer._vocabulary._tokenizer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([5])


def damaged_values(random: Random, value: object) -> object:
    """Replace one value inside a JSON value by another."""
    odd = [None, True, -1, 1 << 31, 1 << 40, 0.5, "", "\x00", "▁" * 50, [], {}, [[]], "<s>",
           {"type": "BPE"}, [1, 2], ["a", "b", "c"]]
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: damaged_values(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.85:
        place = random.randrange(len(value))
        return [*value[:place], damaged_values(random, value[place]), *value[place + 1 :]]
    return random.choice(odd)


def small_json(kind: str) -> dict:
    """Return a `tokenizer.json` with every part that the library knows."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    words = ["<unk>", "a", "b", "ab", "▁", "▁a", "<0x41>", "<0xFF>", "c", "##c"]
    vocab = {word: i for i, word in enumerate(words)}
    library = Library({
        "bpe": lambda: models.BPE(
            vocab, [("a", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True
        ),
        "unigram": lambda: models.Unigram([(w, -float(i)) for w, i in vocab.items()], unk_id=0,
                                          byte_fallback=True),
        "wordpiece": lambda: models.WordPiece(vocab, unk_token="<unk>"),
        "wordlevel": lambda: models.WordLevel(vocab, unk_token="<unk>"),
    }[kind]())
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("x", "isolated"), pre_tokenizers.Metaspace()
    ])
    library.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    library.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    return json.loads(library.to_str())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
def test_damaged_tokenizer_json_is_a_typed_error_or_works(kind, tmp_path):
    random = Random()
    whole = small_json(kind)
    folder = write(tmp_path / "model", {"bos_token": "<s>"})
    outcomes = {"works": 0, "typed": 0}
    for _ in range(250):
        (folder / "tokenizer.json").write_text(json.dumps(damaged_values(random, whole)))
        try:
            tokenizer = Tokenizer.from_dir(folder)
            ids = tokenizer.encode("ab <s> wörld x \U0001f389")
            assert isinstance(tokenizer.prompt_ids("<s>ab"), list)
            assert tokenizer.decode(ids, False) == streamed(tokenizer, ids, False)
            outcomes["works"] += 1
        except ExlLoaderError as error:
            assert error.remedy
            outcomes["typed"] += 1
    assert all(outcomes.values())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(("data", "found", "remedy"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer",
     "git lfs pull"),
    (b"IQ== 0\nIg== 1\n", "a tiktoken vocabulary", "Copy tokenizer.json"),
])
def test_files_of_another_kind_are_errors(file, data, found, remedy, tmp_path):
    folder = write(tmp_path / "model", {}, **{file.replace(".", "__"): data})
    with pytest.raises(InvalidTokenizer, match=found) as caught:
        Tokenizer.from_dir(folder)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("values", [
    {"bos_token": {"content": 5}}, {"eos_token": []}, {"add_bos_token": 1}, {"legacy": "no"},
    {"clean_up_tokenization_spaces": "yes"}, {"extra_special_tokens": 5},
    {"additional_special_tokens": [None]}, {"added_tokens_decoder": []},
    {"added_tokens_decoder": {"5": None}},
])
def test_wrong_values_of_tokenizer_config_are_errors(values, byte_level, tmp_path):
    folder = write(tmp_path / "model", values, tokenizer__json=byte_level)
    with pytest.raises(InvalidTokenizer) as caught:
        Tokenizer.from_dir(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("content", ["\ud800", "a\udc00", ""])
@pytest.mark.parametrize("name", ["bos_token", "pad_token"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_tokens_without_text_do_no_harm(
    file, name, content, byte_level, sentencepiece_model, tmp_path
):
    """JSON can hold a lone surrogate, which is not text; an empty token is no token."""
    source = byte_level if file == "tokenizer.json" else sentencepiece_model
    folder = write(tmp_path / "model", {name: content}, **{file.replace(".", "__"): source})
    try:
        tokenizer = Tokenizer.from_dir(folder)
    except InvalidTokenizer:
        return
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
