"""Folders with small tokenizers of every kind, trained when tests ask for them."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl_loader.text.tokenizer import Tokenizer

LANGUAGES = [
    "Привет, мир! Как дела? Всё хорошо.",
    "你好，世界。今天天气很好，我们去公园吧。",
    "こんにちは世界、元気ですか。",
    "안녕하세요 세계",
    "Voilà un café déjà bu, naïve façade à Zürich, Grüße aus Köln.",
    "مرحبا بالعالم كيف حالك",
]

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "Hello world",
    " Hello",
    "  two  spaces  inside and after  ",
    "a\tb\tc\n\n\nd",
    "<|user|>\x1c\x1f <|end|>",
    "a\u3000\x85 <|end|>\x1e<|user|>\u2003\x85 b",
    "It's 12345 and 3.14159, isn't it? We'll see; they've gone!",
    *LANGUAGES,
    "mixed: Привет 你好 مرحبا hello こんにちは",
    "🎉 👩‍👩‍👧 🇩🇪 👍🏽 é (combining) ﬁ ½",
    "\x00\x01\x7f \ufeff\u200b\ufffd",
    "▁a ▁ b",
    "<0x0A> is text, not a byte",
    "def f(x):\n    if x > 1:\n\t\treturn {'a': [x, 'ü']}\n    # naïve 🎉\n    return None\r\n",
    "for (int i = 0; i < n; ++i) { s += \"</div>\"; }",
    "<s>a</s> b<s> c</s>",
    "<s>",
    "x</s>",
    "<|user|>hi there<|end|>\n<|assistant|> ok<|end|>",
    " <|user|>  hi  <|end|>  ",
    "<|user|><|user|>",
]

CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")
LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")

# Qwen2's way of cutting text before merging bytes; Llama 3's differs in the digits.
SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Lines of code and of several languages."""
    code = inspect.getsource(argparse) + inspect.getsource(textwrap)
    return [*code.splitlines(), *LANGUAGES * 20]


def train_sentencepiece(path: Path, model_type: str, **options: Any) -> None:
    """Train `path` as Llama's was: identity normalisation, byte fallback."""
    import sentencepiece

    settings = {
        "model_type": model_type, "vocab_size": 700, "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "split_digits": True, "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995, "num_threads": 1, "minloglevel": 2, **options,
    }
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=file, **settings
        )


def added_token(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`."""
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False, "special": True, **flags}


def write_folder(folder: Path, config: dict[str, Any] | None, model_type: str = "llama") -> Path:
    """Write the files that a folder has besides its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]
    (folder / "config.json").write_text(
        json.dumps({"model_type": model_type, "architectures": [architecture]})
    )
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_byte_level(path: Path, bos: bool) -> None:
    """Train a `tokenizer.json` as Llama 3 and Qwen have it; `bos` adds Llama 3's framing."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (*LLAMA_SPECIALS, *CHAT_TOKENS)]
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B",
            special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
        )
    tokenizer.save(str(path))


def train_unigram_json(path: Path) -> None:
    """Train a `tokenizer.json` whose tokens are no plain bytes: Unigram with Metaspace."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700, special_tokens=[*LLAMA_SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(path))


def write_llama_json(path: Path, spm_path: Path, legacy_form: bool) -> None:
    """Convert a BPE `tokenizer.model` to `tokenizer.json` as Llama 2 folders have it.

    Args:
        legacy_form: put the space with a normaliser, as files of 2023 do; else with the
            Metaspace pre-tokenizer.
    """
    import sentencepiece
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_path))
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges = [
        (rank, (piece[:i], piece[i:]))
        for piece, rank in vocab.items() if rank > 2 and not piece.startswith("<0x")
        for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab
    ]
    merges.sort(key=lambda item: (item[0], vocab[item[1][0]], vocab[item[1][1]]))
    tokenizer = Tokenizer(models.BPE(
        vocab, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    ))
    if legacy_form:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t in LLAMA_SPECIALS])
    tokenizer.save(str(path))


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>"}


LLAMA_ADDED = {str(i): added_token(token) for i, token in enumerate(LLAMA_SPECIALS)}


CHAT_ADDED = LLAMA_ADDED | {
    "700": added_token("<|user|>", rstrip=True),
    "701": added_token("<|assistant|>"),
    "702": added_token("<|end|>", lstrip=True),
    "703": added_token("world", special=False, single_word=True),
}


SPM_CONFIGS = {
    "plain": LLAMA,
    "bos": LLAMA | {"add_bos_token": True, "add_eos_token": False, "legacy": False},
    "legacy": LLAMA | {"add_bos_token": True, "legacy": True},
    "eos": LLAMA | {"add_bos_token": False, "add_eos_token": True, "legacy": False},
    "no_space": LLAMA | {"add_prefix_space": False, "add_bos_token": True},
    "fast_class": LLAMA | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
    "chat": LLAMA | {"add_bos_token": True, "added_tokens_decoder": CHAT_ADDED,
                     "eos_token": "<|end|>"},
    "chat_legacy": LLAMA | {"add_bos_token": True, "added_tokens_decoder": CHAT_ADDED,
                            "legacy": True},
}


COMPARED = [f"spm_{name}" for name in SPM_CONFIGS] + [
    "json_llama3", "json_qwen", "json_metaspace", "json_prepend", "json_as_is", "json_unigram",
    "json_code_llama", "json_code_llama_never",
]


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    """Decode ids one at a time."""
    stream = tokenizer.stream(skip_special)
    return "".join([stream.push(i) for i in ids]) + stream.flush()


def check_against(reference, tokenizer: Tokenizer, text: str) -> None:
    """Compare a text's ids and their decoded text with a tokenizer of transformers."""
    ids = reference.encode(text)
    assert tokenizer.encode(text) == ids
    plain = reference.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_bos=False) == plain
    for skip_special in (True, False):
        decoded = reference.decode(ids, skip_special_tokens=skip_special)
        assert tokenizer.decode(ids, skip_special) == decoded
        assert streamed(tokenizer, ids, skip_special) == decoded


def write(folder: Path, config: dict | None = None, **files: object) -> Path:
    """Write a folder. A file is given as bytes, text or JSON, or as a path to copy from."""
    write_folder(folder, config)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, Path):
            shutil.copy(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_vocab_and_merges(folder: Path, source: Path, config: dict | None, **model) -> Path:
    """Write `tokenizer.json` as `vocab.json` and `merges.txt`; `config` gets its added tokens."""
    content = json.loads(source.read_text())
    added = {str(t["id"]): added_token(t["content"], special=t["special"])
             for t in content["added_tokens"]}
    if config is not None:
        config = config | {"added_tokens_decoder": added}
    merges = [pair if isinstance(pair, str) else " ".join(pair)
              for pair in content["model"]["merges"]]
    return write(
        folder, config, vocab__json=content["model"]["vocab"],
        merges__txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        config__json={"model_type": "qwen2", "vocab_size": 720} | model,
    )


def with_gaps(ids: dict[int, str]) -> dict:
    """Return a `tokenizer_config.json` with these added tokens."""
    tokens = {str(i): added_token(content) for i, content in ids.items()}
    return {"added_tokens_decoder": tokens}


def unusual_tokenizers(folder: Path) -> dict[str, Path]:
    """Write a folder for each kind of decoder, with and without clean-up of spaces."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    words = ["<unk>", "▁", "▁a", "b", "▁.", "▁'", "'s", "▁n", "n't", "▁é", "?", " ", " .", "\n",
             "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "<0xC3>", "<0xA9>", "<0x41>", "##ing", "x</w>"]
    vocab = {word: i for i, word in enumerate(words)}
    byte_steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    kinds = {
        "bytes": decoders.Sequence(byte_steps),
        "bytes_strip": decoders.Sequence([*byte_steps, decoders.Strip(" ", 1, 0)]),
        "metaspace": decoders.Metaspace(),
        "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
        "wordpiece": decoders.WordPiece(cleanup=True),
        "bpe": decoders.BPEDecoder(),
        "none": None,
        "other": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        "fallback_and_metaspace": decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace()]
        ),
    }
    found = {}
    for kind, decoder in kinds.items():
        for clean_up in (True, False):
            library = Library(models.WordLevel(vocab, unk_token="<unk>"))
            library.pre_tokenizer = pre_tokenizers.Whitespace()
            library.decoder = decoder
            special = [AddedToken(token, special=True) for token in ("<s>", "<é>", " <x>")]
            library.add_special_tokens(special)
            library.add_tokens([AddedToken("<▁plain>", normalized=False)])
            name = f"{kind}_{clean_up}"
            config = {"clean_up_tokenization_spaces": clean_up, "bos_token": "<s>"}
            found[name] = write(folder / name, config, tokenizer__json=library.to_str())
    return found
