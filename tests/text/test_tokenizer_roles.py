"""Which tokens begin and end texts and prompts, and what a cut prompt keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer
from support import tiny
from support.tokenizer_folders import (
    LLAMA,
)


def test_add_bos_overrides_the_folder(tokenizers):
    for name in ("spm_bos", "spm_plain", "spm_eos", "json_llama3"):
        tokenizer = tokenizers[name]
        plain = tokenizer.encode("Hello", add_bos=False)
        assert tokenizer.encode("Hello", add_bos=True) == [tokenizer.bos_token_id, *plain]
        assert tokenizer.bos_token_id not in plain
    # A model without a BOS token has none to put first.
    assert tokenizers["json_qwen"].bos_token_id is None
    assert tokenizers["json_qwen"].encode("a", add_bos=True) == tokenizers["json_qwen"].encode("a")


@pytest.mark.parametrize("name", ["spm_bos", "spm_plain", "json_llama3", "json_metaspace"])
def test_a_prompt_has_one_bos_token(name, tokenizers):
    tokenizer = tokenizers[name]
    bos, plain = tokenizer.bos_token_id, tokenizer.encode("Hello", add_bos=False)
    for text in ("Hello", "<s>Hello", "<s><s><s>Hello"):
        ids = tokenizer.prompt_ids(text, add_bos=True)
        assert ids == [bos, *tokenizer.prompt_ids(text, add_bos=False)[-len(ids) + 1 :]]
        assert ids.count(bos) == 1
    assert tokenizer.prompt_ids("Hello", add_bos=False) == plain
    assert tokenizer.prompt_ids("<s>Hello", add_bos=False)[0] == bos
    assert (tokenizer.prompt_ids("Hello")[0] == bos) == tokenizer.add_bos_token
    assert tokenizer.prompt_ids("", add_bos=True) == [bos]


def test_a_prompt_ends_without_an_eos_token(tokenizers):
    tokenizer = tokenizers["spm_eos"]
    assert tokenizer.encode("Hello")[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in tokenizer.prompt_ids("Hello")


def test_a_prompt_that_is_cut_keeps_its_end_and_its_bos_token(tokenizers):
    tokenizer = tokenizers["json_llama3"]
    bos, ids = tokenizer.bos_token_id, tokenizer.prompt_ids("one two three four five six seven")
    assert ids[0] == bos
    assert tokenizer.cut_left(ids, len(ids)) == ids
    for length in range(2, len(ids)):
        assert tokenizer.cut_left(ids, length) == [bos, *ids[1 - length :]]
        assert tokenizer.cut_left(ids[1:], length) == ids[-length:]
    assert tokenizer.cut_left(ids, 1) == tokenizer.cut_left(ids, 0) == ids[-1:]


FRAMES = {
    "nothing": "$A", "bos": "<s> $A", "bos_eos": "<s> $A </s>", "eos": "$A </s>",
    "two": "<s> <|user|> $A",
}


def write_framed(folder: Path, source: Path, config: dict, frame: str | None) -> Path:
    """Write a folder whose tokenizer.json has a post-processor of this template."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    make.write_folder(folder, config)
    library = Library.from_file(str(source / "tokenizer.json"))
    if frame is not None:
        tokens = [part for part in frame.split() if part != "$A"]
        template = processors.TemplateProcessing(
            single=frame, pair=f"{frame} $B:1",
            special_tokens=[(token, library.token_to_id(token)) for token in tokens],
        )
        byte_level = processors.ByteLevel(trim_offsets=False)
        library.post_processor = processors.Sequence([byte_level, template])
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("named", ["<s>", None, "silent"])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", None])
@pytest.mark.parametrize("frame", FRAMES)
def test_post_processor_tokens_are_added_as_in_transformers(
    frame, tokenizer_class, named, add_bos, folders, tmp_path
):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    config |= {} if named == "silent" else {"bos_token": named}
    config |= {} if add_bos is None else {"add_bos_token": add_bos}
    folder = write_framed(tmp_path / "model", folders["json_qwen"], config, FRAMES[frame])
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer = Tokenizer.from_dir(folder)
    expected = reference.encode("Hello")
    if add_bos and named == "<s>" and "bos" not in frame and frame != "two":
        # exllamav2 and llama.cpp do what the folder asks for here; transformers does not.
        expected = [tokenizer.bos_token_id, *expected]
    assert tokenizer.encode("Hello") == expected
    prompt = [i for i in expected if i != tokenizer.token_id("</s>")]
    assert tokenizer.prompt_ids("Hello") == prompt
    plain = tokenizer.encode("Hello", add_bos=False)
    assert tokenizer.prompt_ids("Hello", add_bos=False) == plain
    has_bos = named == "<s>" or frame in ("bos", "bos_eos", "two")
    bos = tokenizer.token_id("<s>")
    assert tokenizer.bos_token_id == (bos if has_bos else None)
    assert tokenizer.prompt_ids("Hello", add_bos=True) == ([bos] if has_bos else []) + plain
    assert tokenizer.prompt_ids("<s>Hello").count(bos) == 1


def test_a_cut_prompt_keeps_the_whole_prefix(folders, tmp_path):
    folder = write_framed(tmp_path / "model", folders["json_qwen"], {}, FRAMES["two"])
    tokenizer = Tokenizer.from_dir(folder)
    first = [tokenizer.token_id("<s>"), tokenizer.token_id("<|user|>")]
    ids = tokenizer.prompt_ids("one two three four five six seven")
    assert ids[:2] == first
    for text in ("<s>one", "<s><|user|>one", "<s><s>one", "one"):
        assert tokenizer.prompt_ids(text) == [*first, *tokenizer.encode("one", add_bos=False)]
    for length in range(3, len(ids)):
        assert tokenizer.cut_left(ids, length) == [*first, *ids[2 - length :]]
    assert tokenizer.cut_left(ids, 2) == ids[-2:]
    # Without the second token of the frame the BOS token alone stays.
    assert tokenizer.cut_left([first[0], *ids[2:]], 3) == [first[0], *ids[-2:]]


@pytest.mark.parametrize(("files", "expected"), [
    ({}, "<s>"),
    ({"config.json": {"bos_token_id": 704}}, "<s>"),
    ({"tokenizer_config.json": {}}, None),
    ({"tokenizer_config.json": {}, "config.json": {"bos_token_id": 704}}, "<|assistant|>"),
    ({"tokenizer_config.json": {}, "generation_config.json": {"bos_token_id": 704}},
     "<|assistant|>"),
    ({"tokenizer_config.json": {}, "config.json": {"bos_token_id": 9999}}, None),
    ({"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": 704}}, None),
    ({"tokenizer_config.json": {}, "special_tokens_map.json": {"bos_token": "<|end|>"}}, "<|end|>"),
    ({"config.json": {"vocab_size": 700}}, None),
    ({"config.json": {"text_config": {"vocab_size": 700}}}, None),
    ({"config.json": {"vocab_size": 720, "text_config": {"vocab_size": 700}}}, "<s>"),
    ({"tokenizer_config.json": {}, "config.json": {"text_config": {"bos_token_id": 704}}},
     "<|assistant|>"),
    ({"config.json": {"text_config": 700}}, "<s>"),
])
def test_bos_token_of_a_folder(files, expected, folders, tmp_path):
    folder = shutil.copytree(folders["json_qwen"], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_dir(folder)
    found = tokenizer.bos_token_id
    assert (None if found is None else tokenizer.decode([found], False)) == expected


@pytest.mark.parametrize(("model", "named", "expected"), [
    # What the files name, all of it.
    ({"eos_token_id": 5}, "<|end|>", {5, 705}),
    ({"eos_token_id": [5, 6]}, None, {5, 6}),
    # A class's default is for folders that name none.
    ({}, "<|end|>", {705}),
    ({}, None, {2}),
    ({"eos_token_id": None}, None, set()),
    ({"eos_token_id": None}, "<|end|>", {705}),
])
def test_stop_ids_of_a_folder(model, named, expected, folders, tmp_path):
    from exl_loader.checkpoint.config import ModelConfig

    folder = shutil.copytree(folders["json_qwen"], tmp_path / "model")
    config = {name: value for name, value in tiny.CONFIG.items() if name != "eos_token_id"}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 720} | model))
    named_tokens = {} if named is None else {"eos_token": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(named_tokens))
    ids = ModelConfig.from_dir(folder).eos_token_ids
    assert Tokenizer.from_dir(folder).stop_ids(ids) == expected


def test_generation_config_overrides_the_class_default(folders, tmp_path):
    from exl_loader.checkpoint.config import ModelConfig

    folder = shutil.copytree(folders["spm_plain"], tmp_path / "model")
    config = {name: value for name, value in tiny.CONFIG.items() if name != "eos_token_id"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ModelConfig.from_dir(folder).eos_token_ids == (7, 8)


def test_a_bos_token_of_null_means_none(folders, tmp_path):
    folder = shutil.copytree(folders["spm_plain"], tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"bos_token": None}))
    assert Tokenizer.from_dir(folder).bos_token_id is None
