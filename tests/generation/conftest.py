"""Tokenizers that several tests of generation share."""

from __future__ import annotations

import pytest

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer
from support.tiny import write_tokenizer


@pytest.fixture(scope="package")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte: every character beyond ASCII takes several tokens."""
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, 300)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="package")
def spm_tokenizer(tmp_path_factory) -> Tokenizer:
    """SentencePiece, which puts a space before every text."""
    folder = make.write_folder(tmp_path_factory.mktemp("spm"), None)
    make.train_sentencepiece(folder / "tokenizer.model", "bpe", vocab_size=500)
    return Tokenizer.from_dir(folder)
