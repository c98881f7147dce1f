"""The demo model's tokenizer: a sentencepiece BPE that keeps source text exactly."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> bytes:
    """Train the tokenizer.

    Nothing is normalised, no space is added or dropped, and runs of spaces become pieces of
    their own, because in Python white space is syntax. A line break is its byte piece, as in
    Llama's tokenizer.

    Args:
        texts: training documents.
        vocab_size: number of pieces, byte and control pieces included.

    Returns:
        The contents of `tokenizer.model`.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentencepiece_length=24,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        # Threads would make ties between equally frequent merges depend on timing.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def save_tokenizer(model: bytes, folder: Path, model_max_length: int) -> None:
    """Write `tokenizer.model` and the settings that transformers keeps beside it."""
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": model_max_length,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def encode_documents(model: bytes, texts: Iterable[str]) -> list[int]:
    """Encode documents into one stream, each as BOS, its pieces, EOS."""
    processor = spm.SentencePieceProcessor(model_proto=model)
    stream: list[int] = []
    for text in texts:
        stream += [BOS_ID, *processor.encode(text), EOS_ID]
    return stream
