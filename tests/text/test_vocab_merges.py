"""`vocab.json` with `merges.txt`."""

from __future__ import annotations

import json

import pytest

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer, has_tokenizer
from exl_loader.utils.errors import InvalidTokenizer
from support.tokenizer_folders import (
    check_against,
    write,
    write_vocab_and_merges,
)


@pytest.mark.parametrize(
    "tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"]
)
@pytest.mark.parametrize("named", [
    {}, {"eos_token": "<|end|>"}, {"bos_token": "<s>", "add_bos_token": True},
    {"add_prefix_space": True},
])
def test_encodes_as_transformers(
    tokenizer_class, named, byte_level, tmp_path
):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = {"tokenizer_class": tokenizer_class} | named
    folder = write_vocab_and_merges(tmp_path / "model", byte_level, config)
    library = getattr(transformers, tokenizer_class.removesuffix("Fast"))
    reference = library.from_pretrained(str(folder))
    tokenizer = Tokenizer.from_dir(folder)
    for text in make.TEXTS:
        check_against(reference, tokenizer, text)
    if named:
        for name in ("bos_token_id", "eos_token_id"):
            if name.removesuffix("_id") in named:
                assert getattr(tokenizer, name) == getattr(reference, name)


def test_without_a_class_the_model_type_decides_the_rule(byte_level, tmp_path, caplog):
    # Qwen2's rule composes characters first.
    texts = "\n".join(make.TEXTS) + "e\u0301"
    split = {}
    for model_type in ("qwen2", "qwen3", "starcoder2"):
        folder = write_vocab_and_merges(
            tmp_path / model_type, byte_level, {}, model_type=model_type
        )
        split[model_type] = Tokenizer.from_dir(folder).encode(texts)
        assert ("GPT-2's rule" in caplog.text) == (model_type == "starcoder2")
    folder = write(tmp_path / "whole", {}, tokenizer__json=byte_level)
    assert split["qwen2"] == split["qwen3"] == Tokenizer.from_dir(folder).encode(texts)
    assert split["starcoder2"] != split["qwen2"]


def test_added_tokens_json_beside_vocab_and_merges(byte_level, tmp_path):
    folder = write_vocab_and_merges(tmp_path / "model", byte_level, None)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 712}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.encode("hi<|im_end|>")[-1] == tokenizer.eos_token_id == 712
    assert tokenizer.vocab_size == 713


BAD_VOCABULARIES = {
    "no_object": {"vocab__json": "[]"},
    "no_json": {"vocab__json": "{"},
    "no_id": {"vocab__json": {"a": "0"}},
    "negative": {"vocab__json": {"a": -1}},
    "huge": {"vocab__json": {"a": 1 << 40}},
    "twice": {"vocab__json": {"a": 1, "b": 1}},
    "sentencepiece": {"vocab__json": {"▁a": 1, "▁b": 0}},
    "merge_of_one": {"merges__txt": "#version: 0.2\na\n"},
    "merge_of_three": {"merges__txt": "a b c\n"},
    "merge_of_nothing": {"merges__txt": "a \n"},
    "merge_that_is_no_token": {"merges__txt": "a zzz\n"},
    "no_utf8": {"merges__txt": b"\xff\xfe\x00\x00"},
}


@pytest.mark.parametrize("name", BAD_VOCABULARIES)
def test_bad_vocabularies_and_merges_are_errors(name, tmp_path):
    files = {"vocab__json": {"a": 0, "b": 1, "ab": 2}, "merges__txt": "a b\n"}
    good = Tokenizer.from_dir(write(tmp_path / "good", {}, **files))
    assert good.encode("ab") == [2]
    with pytest.raises(InvalidTokenizer) as caught:
        Tokenizer.from_dir(write(tmp_path / "bad", {}, **(files | BAD_VOCABULARIES[name])))
    assert caught.value.remedy


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_of_the_two_files_is_not_enough(missing, byte_level, tmp_path):
    folder = write_vocab_and_merges(tmp_path / "model", byte_level, {})
    assert has_tokenizer(folder)
    (folder / missing).unlink()
    assert not has_tokenizer(folder)
    with pytest.raises(InvalidTokenizer, match=r"vocab.json with merges.txt"):
        Tokenizer.from_dir(folder)
