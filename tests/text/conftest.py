"""Folders and tokenizers that several tests of text share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer
from support.tokenizer_folders import (
    COMPARED,
    LLAMA,
    LLAMA_ADDED,
    SPM_CONFIGS,
    unusual_tokenizers,
    with_gaps,
    write,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder of every kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    make.train_sentencepiece(root / "bpe.model", "bpe")
    make.train_sentencepiece(root / "unigram.model", "unigram")
    found = {}
    for name, config in SPM_CONFIGS.items():
        folder = found[f"spm_{name}"] = make.write_folder(root / name, config)
        shutil.copy(root / "bpe.model", folder / "tokenizer.model")
    folder = found["spm_unigram"] = make.write_folder(root / "unigram", SPM_CONFIGS["bos"])
    shutil.copy(root / "unigram.model", folder / "tokenizer.model")
    folder = found["spm_bare"] = make.write_folder(root / "bare", None)
    shutil.copy(root / "bpe.model", folder / "tokenizer.model")
    for name, bos in (("llama3", True), ("qwen", False)):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        config |= {"bos_token": "<s>"} if bos else {"add_bos_token": False}
        model_type = "llama" if bos else "qwen2"
        folder = found[f"json_{name}"] = make.write_folder(root / name, config, model_type)
        make.train_byte_level(folder / "tokenizer.json", bos)
    for name, legacy_form in (("metaspace", False), ("prepend", True)):
        config = LLAMA | {"added_tokens_decoder": LLAMA_ADDED}
        folder = found[f"json_{name}"] = make.write_folder(root / name, config)
        make.write_llama_json(folder / "tokenizer.json", root / "bpe.model", legacy_form)
    for name, wish in (("code_llama", None), ("code_llama_never", False)):
        config = LLAMA | {"tokenizer_class": "CodeLlamaTokenizer", "add_prefix_space": wish}
        folder = found[f"json_{name}"] = make.write_folder(root / name, config)
        make.write_llama_json(folder / "tokenizer.json", root / "bpe.model", legacy_form=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    folder = found["json_as_is"] = make.write_folder(root / "as_is", config)
    make.write_llama_json(folder / "tokenizer.json", root / "bpe.model", legacy_form=True)
    folder = found["json_unigram"] = make.write_folder(root / "unigram_json", config)
    make.train_unigram_json(folder / "tokenizer.json")
    return found


@pytest.fixture(scope="session")
def references(folders):
    transformers = pytest.importorskip("transformers", minversion="5")
    return {
        name: transformers.AutoTokenizer.from_pretrained(str(folders[name])) for name in COMPARED
    }


@pytest.fixture(scope="session")
def tokenizers(folders):
    return {name: Tokenizer.from_dir(folder) for name, folder in folders.items()}


DUMMY_PREFIX = {"dummy": {}, "no_dummy": {"add_dummy_prefix": False}}


@pytest.fixture(scope="session")
def spm_models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in ("bpe", "unigram"):
        for name, options in DUMMY_PREFIX.items():
            make.train_sentencepiece(root / f"{kind}_{name}", kind, **options)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """A `tokenizer.json` with 701 to 706 for special tokens."""
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    make.train_byte_level(path, bos=False)
    return path


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    make.train_sentencepiece(path, "bpe")
    return path


@pytest.fixture(scope="session")
def unusual(tmp_path_factory, byte_level, sentencepiece_model) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("unusual")
    found = unusual_tokenizers(root)
    found["byte_level"] = write(
        root / "byte_level", with_gaps({712: "<|é▁Ġ|>"}), tokenizer__json=byte_level
    )
    for legacy in (True, False):
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy} | with_gaps({705: "<x▁y>"})
        found[f"sentencepiece_{legacy}"] = write(
            root / f"sentencepiece_{legacy}", config, tokenizer__model=sentencepiece_model
        )
    return {name: Tokenizer.from_dir(folder) for name, folder in found.items()}
