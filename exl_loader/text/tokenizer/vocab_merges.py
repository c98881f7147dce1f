"""`vocab.json` with `merges.txt`: byte-level BPE vocabularies, as GPT-2 and Qwen2 have them.

These two files hold tokens and merges. Only a `tokenizer.json` defines how text is cut before
merging, so the tokenizer class decides here: Qwen2's rule for Qwen2Tokenizer and model types
`qwen...`, GPT-2's rule for the others. Both rules are those of transformers 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...utils.errors import InvalidTokenizer
from ...utils.json_keys import read_json_object
from ...utils.output import warn
from ...utils.untrusted_files import TOKENIZER_BYTES, is_there, read_text
from .tokenizer_config import MAX_TOKEN_ID, REMEDY, TokenizerConfig, is_id
from .vocabulary import SPACE_MARK

VOCAB, MERGES = "vocab.json", "merges.txt"

# Source: Qwen2's tokenizer.json.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Classes that cut text by GPT-2's rule.
_LIKE_GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer")
# Classes that do not define the rule.
_ANY_CLASS = ("", "PreTrainedTokenizer", "TokenizersBackend")
_BYTE_LEVEL_SPACE = "Ġ"


def has_vocab_and_merges(folder: Path) -> bool:
    """Return whether the folder has both files."""
    return is_there(folder / VOCAB) and is_there(folder / MERGES)


def is_like_qwen2(config: TokenizerConfig) -> bool:
    """Return whether text is cut by Qwen2's rule; otherwise it is cut by GPT-2's."""
    if config.tokenizer_class in _ANY_CLASS:
        return config.model.model_type.startswith("qwen")
    return config.tokenizer_class == "Qwen2Tokenizer"


def default_named_tokens(config: TokenizerConfig) -> dict[str, str]:
    """Return name -> text of the class's tokens, for names that the folder leaves out."""
    names = ["eos_token", "unk_token"]
    if not is_like_qwen2(config):
        names.append("bos_token")
    return dict.fromkeys(names, "<|endoftext|>")


def build(folder: Path, config: TokenizerConfig, placed: dict[str, int]) -> Any:
    """Build a tokenizer of the tokenizers library from the two files.

    Args:
        folder: the model folder.
        config: its settings, which decide the rule that cuts text.
        placed: text -> id of tokens to add to the file's own.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        InvalidTokenizer: a file cannot be read or has other content, or the vocabulary is not
            byte-level.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = _read_vocab(folder / VOCAB) | placed
    merges = _read_merges(folder / MERGES)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    prefix_space = bool(config.add_prefix_space)
    if is_like_qwen2(config):
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ])
    else:
        if config.tokenizer_class not in _LIKE_GPT2:
            warn(
                f"{folder} has {VOCAB} and {MERGES}, which do not say how text is cut before "
                "merging: GPT-2's rule is used. Copy the original model's tokenizer.json into "
                "the folder if it has one"
            )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json_object(
        path, limit=TOKENIZER_BYTES, error=InvalidTokenizer, missing=InvalidTokenizer,
        remedy=REMEDY,
    )
    wrong = next((content for content, i in vocab.items() if not is_id(i)), None)
    if wrong is not None:
        raise InvalidTokenizer(
            f"{wrong!r} in {path}", expected=f"an id from 0 to {MAX_TOKEN_ID - 1}",
            actual=repr(vocab[wrong])[:80], remedy=REMEDY,
        )
    if len(set(vocab.values())) < len(vocab):
        raise InvalidTokenizer(str(path), expected="an id of its own for each token",
                               actual="an id that two tokens have", remedy=REMEDY)
    if any(SPACE_MARK in content for content in vocab) and not any(
        content.startswith(_BYTE_LEVEL_SPACE) for content in vocab
    ):
        raise InvalidTokenizer(
            str(path), expected="a byte-level vocabulary", actual="a sentencepiece one",
            remedy="Copy the original model's tokenizer.json or tokenizer.model into the folder",
        )
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    text = read_text(path, TOKENIZER_BYTES, error=InvalidTokenizer, missing=InvalidTokenizer,
                     remedy=REMEDY)
    merges = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise InvalidTokenizer(
                f"line {number} of {path}", expected="two tokens with a space between them",
                actual=repr(line)[:80], remedy=REMEDY,
            )
        merges.append((pair[0], pair[1]))
    return merges
