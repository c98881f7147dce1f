"""Added tokens: where folders declare them, and the ids that they have."""

from __future__ import annotations

import json
import shutil

import pytest

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import InvalidTokenizer
from support.tokenizer_folders import (
    check_against,
    streamed,
    with_gaps,
    write,
    write_vocab_and_merges,
)


def test_added_tokens_of_older_folders(folders, tmp_path):
    folder = shutil.copytree(folders["spm_plain"], tmp_path / "model")
    (folder / "added_tokens.json").write_text('{"<|user|>": 700, "<plain>": 701}')
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|user|>"}, "additional_special_tokens": ["<x>"]})
    )
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.eos_token_ids == (700,)
    assert tokenizer.token_id("<plain>") == 701 and tokenizer.token_id("<x>") == 702
    assert tokenizer.vocab_size == 703
    ids = tokenizer.encode("<|user|><plain><x>")
    assert ids == [700, 701, 702]
    assert tokenizer.decode(ids) == "<plain>"


DECLARED = {
    "other_flags": {"added_tokens_decoder": {
        "703": make.added_token("<|user|>", lstrip=True, rstrip=True)}},
    "made_special": {"added_tokens_decoder": {"706": make.added_token("<tool>")}},
    "new": {"added_tokens_decoder": {
        "707": make.added_token("<new>", special=False, normalized=True),
        "708": make.added_token("<new2>")}},
    "plain_token_named": {"eos_token": "<tool>"},
    "vocabulary_token_named": {"eos_token": "def"},
    "new_token_named": {"pad_token": "<new>"},
    "extra": {"extra_special_tokens": ["<tool>", "<new>"]},
    "extra_by_name": {"extra_special_tokens": {"image_token": "<new>"}},
    "the_models_own": {"image_token": "<new>"},
}


@pytest.mark.parametrize("name", DECLARED)
def test_tokens_declared_beside_tokenizer_json(name, folders, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    folder = shutil.copytree(folders["json_llama3"], tmp_path / "model")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | DECLARED[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    text = "a <|user|> b <tool> c def x <new><new2>  z </s>"
    check_against(reference, Tokenizer.from_dir(folder), text)


def test_an_added_token_with_an_id_far_away_is_an_error(folders, tmp_path):
    folder = shutil.copytree(folders["json_qwen"], tmp_path / "model")
    config = {"added_tokens_decoder": {"100000": make.added_token("<far>")}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidTokenizer, match="expected id 100000"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("ids", [
    {710: "<new>"},
    {708: "<new>", 719: "<far>"},
    {719: "<far>", 708: "<new>", 714: "<mid>"},
])
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "vocab.json"])
@pytest.mark.parametrize("vocab_size", [720, None])
def test_added_tokens_keep_their_ids(ids, kind, vocab_size, byte_level, sentencepiece_model,
                                     tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ids[max(ids)],
              "add_bos_token": False} | with_gaps(ids)
    model = {} if vocab_size is None else {"vocab_size": vocab_size}
    if kind == "vocab.json":
        folder = write_vocab_and_merges(tmp_path / "model", byte_level, config)
        tokens = json.loads((folder / "tokenizer_config.json").read_text())
        tokens["added_tokens_decoder"] |= config["added_tokens_decoder"]
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    else:
        source = byte_level if kind == "tokenizer.json" else sentencepiece_model
        folder = write(tmp_path / "model", config, **{kind.replace(".", "__"): source})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | model))
    plain = write(tmp_path / "plain", {"add_bos_token": False}, **{
        "tokenizer__json" if kind != "tokenizer.model" else "tokenizer__model":
            byte_level if kind != "tokenizer.model" else sentencepiece_model})
    tokenizer, without = Tokenizer.from_dir(folder), Tokenizer.from_dir(plain)
    assert tokenizer.eos_token_id == max(ids) and tokenizer.vocab_size == max(ids) + 1
    for i, content in ids.items():
        assert tokenizer.token_id(content) == i
        assert i in tokenizer.special_ids
        assert tokenizer.encode(f"{content}") == [i]
        assert tokenizer.decode([i], skip_special=False) == content
        assert streamed(tokenizer, [i], False) == content
    if kind != "vocab.json":
        for text in make.TEXTS:
            assert tokenizer.encode(text) == without.encode(text)
    # Ids in the gaps have no token.
    gaps = [i for i in range(708, max(ids)) if i not in ids]
    assert tokenizer.decode(gaps, skip_special=False) == ""
    word = tokenizer.encode("Hello")
    assert streamed(tokenizer, [*word, *gaps], False) == "Hello"


def test_ids_in_tokenizer_json_are_kept(byte_level, tmp_path):
    """The library numbers added tokens itself and ignores the ids of the file."""
    content = json.loads(byte_level.read_text())
    ids = {}
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = ids[token["content"]] = token["id"] + 3 * number
    folder = write(tmp_path / "model", {}, tokenizer__json=content)
    tokenizer = Tokenizer.from_dir(folder)
    assert {content: tokenizer.token_id(content) for content in ids} == ids
    assert tokenizer.encode("<s>a<|end|>")[::2] == [ids["<s>"], ids["<|end|>"]]
    assert tokenizer.decode(list(ids.values()), False) == "".join(ids)


def test_a_vocabulary_with_gaps_keeps_its_tokens(byte_level, tmp_path):
    """The library gives the first added token an id that another token has."""
    content = json.loads(byte_level.read_text())
    vocab = content["model"]["vocab"]
    moved = max(vocab, key=lambda token: vocab[token])
    vocab[moved] = 700
    for token in content["added_tokens"]:
        token["id"] += 1
    folder = write(tmp_path / "model", {}, tokenizer__json=content)
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.token_id(moved) == 700
    first = content["added_tokens"][0]
    assert tokenizer.token_id(first["content"]) == first["id"] != 700
    assert tokenizer.decode([first["id"]], False) == first["content"]


@pytest.mark.parametrize("tokens", [
    {"5": "<new>"}, {"707": "<new>", "708": "<s>"}, {"720": "<beyond>"}, {"710": "Hello"},
])
def test_impossible_ids_are_errors(tokens, byte_level, tmp_path):
    config = with_gaps({int(i): content for i, content in tokens.items()})
    folder = write(tmp_path / "model", config, tokenizer__json=byte_level,
                   config__json={"vocab_size": 720})
    if "Hello" in tokens.values():
        # A piece of text becomes a token of its own.
        assert Tokenizer.from_dir(folder).encode("Hello") == [710]
        return
    with pytest.raises(InvalidTokenizer, match="expected id"):
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("key", [
    "-1", "1.5", "²", "٣", "", " 5", "9" * 5000, str(1 << 31), "99999999999",
])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_keys_that_are_not_ids_are_errors(key, file, byte_level, sentencepiece_model, tmp_path):
    source = byte_level if file == "tokenizer.json" else sentencepiece_model
    config = {"added_tokens_decoder": {key: make.added_token("<new>")}}
    folder = write(tmp_path / "model", config, **{file.replace(".", "__"): source})
    with pytest.raises(InvalidTokenizer, match="token ids"):
        Tokenizer.from_dir(folder)
