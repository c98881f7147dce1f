"""Text and token ids, compared with transformers and sentencepiece on the same folder."""

from __future__ import annotations

import re
import shutil

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import InvalidSettings, InvalidTokenizer
from support import in_threads, tiny
from support.tokenizer_folders import (
    COMPARED,
    LLAMA,
    check_against,
    streamed,
)


def is_encoded_alike(name: str, text: str) -> bool:
    """Return whether transformers puts a space before the text where sentencepiece does.

    transformers 5 puts none before a text that begins with a space; sentencepiece does.
    """
    if not name.startswith("spm") or name == "spm_no_space":
        return True
    # With `legacy`, a text begins after each added token, and some take white space with them.
    added = r"(?:^|<s>|</s>|<unk>|<\|user\|>|<\|assistant\|>|<\|end\|>|world)\s*[ ▁]"
    begins = re.search(added, text) if "legacy" in name else text.startswith((" ", "▁"))
    return not begins


@pytest.mark.parametrize("name", COMPARED)
def test_equals_transformers(name, references, tokenizers):
    texts = [text for text in make.TEXTS if is_encoded_alike(name, text)]
    assert len(texts) > len(make.TEXTS) // 2
    for text in texts:
        check_against(references[name], tokenizers[name], text)
    joined = "\n".join(make.TEXTS)
    if is_encoded_alike(name, joined):
        check_against(references[name], tokenizers[name], joined)


@pytest.mark.parametrize("name", COMPARED)
@settings(max_examples=60, deadline=None, derandomize=False,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(
    st.text(max_size=12),
    st.sampled_from([" ", "  ", "\n", "<s>", "</s>", "<|user|>", "<|end|>", "é", "🎉", "def "]),
), max_size=8))
def test_equals_transformers_on_any_text(name, parts, references, tokenizers):
    assume(is_encoded_alike(name, "".join(parts)))
    check_against(references[name], tokenizers[name], "".join(parts))


LEADING_SPACES = [
    " ", "  ", "   ", " Hello", "  Hello", "▁Hello", " ▁ Hello", "Hello", "\n Hello", " \n", "\t x",
    "  two  spaces  inside and after  ", " é", " 🎉", " 你好", "",
]


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "GemmaTokenizer", None])
@pytest.mark.parametrize("kind", ["bpe_dummy", "bpe_no_dummy", "unigram_dummy", "unigram_no_dummy"])
def test_spaces_are_encoded_as_by_sentencepiece(
    kind, tokenizer_class, legacy, spm_models, tmp_path
):
    import sentencepiece

    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": tokenizer_class}
    config |= {} if legacy is None else {"legacy": legacy}
    folder = make.write_folder(tmp_path / "model", config)
    shutil.copy(spm_models[kind], folder / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_models[kind]))
    tokenizer = Tokenizer.from_dir(folder)
    plain_texts = [t for t in make.TEXTS if "<s>" not in t and "</s>" not in t]
    for text in [*LEADING_SPACES, *plain_texts]:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == model.encode(text), text
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert streamed(tokenizer, ids, True) == text.replace("▁", " ")


@pytest.mark.parametrize(("legacy", "expected"), [
    (True, ["▁a", "<s>", "▁b", "<s>", "▁▁", "c", "</s>"]),
    (False, ["▁a", "<s>", "b", "<s>", "▁c", "</s>"]),
])
def test_legacy_puts_a_space_before_every_stretch(legacy, expected, spm_models, tmp_path):
    config = LLAMA | {"legacy": legacy}
    folder = make.write_folder(tmp_path / "model", config)
    shutil.copy(spm_models["bpe_dummy"], folder / "tokenizer.model")
    tokenizer = Tokenizer.from_dir(folder)
    ids = tokenizer.encode("a<s>b<s> c</s>")
    pieces = [tokenizer._vocabulary.content(i) for i in ids]
    assert pieces == expected


def test_add_prefix_space_of_the_folder_wins(spm_models, tmp_path):
    first = {}
    for kind in ("bpe_dummy", "bpe_no_dummy"):
        for wish in (True, False):
            config = LLAMA | {"add_prefix_space": wish}
            folder = make.write_folder(tmp_path / f"{kind}{wish}", config)
            shutil.copy(spm_models[kind], folder / "tokenizer.model")
            tokenizer = Tokenizer.from_dir(folder)
            first[kind, wish] = tokenizer._vocabulary.content(tokenizer.encode("Hello")[0])
            assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"
    assert all(piece.startswith("▁") == wish for (_, wish), piece in first.items())


def test_a_folder_with_only_a_sentencepiece_model_is_a_llama(folders, tokenizers):
    tokenizer = tokenizers["spm_bare"]
    assert tokenizer.add_bos_token
    assert tokenizer.encode("Hello") == [1, *tokenizers["spm_plain"].encode("Hello")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def test_json_wins_over_sentencepiece(folders, tmp_path):
    folder = shutil.copytree(folders["json_qwen"], tmp_path / "both")
    (folder / "tokenizer.model").write_bytes(b"never opened")
    assert Tokenizer.from_dir(folder).encode("hi") == Tokenizer.from_dir(
        folders["json_qwen"]
    ).encode("hi")


@pytest.mark.parametrize("name", ["spm_chat", "json_llama3", "json_metaspace"])
def test_special_tokens_can_be_plain_text(name, tokenizers):
    tokenizer = tokenizers[name]
    text = "a</s>b<|user|>"
    special = tokenizer.special_ids
    assert special & set(tokenizer.encode(text, add_bos=False))
    ids = tokenizer.encode(text, add_bos=False, special=False)
    assert not special & set(ids)
    assert tokenizer.decode(ids, skip_special=True) == text
    assert tokenizer.encode(text, add_bos=False) != ids, "the setting is not kept"


def test_user_defined_symbols_can_be_plain_text(tmp_path):
    """sentencepiece finds these symbols in text by itself."""
    config = LLAMA | {"extra_special_tokens": ["<|user|>"]}
    folder = make.write_folder(tmp_path / "model", config)
    make.train_sentencepiece(
        folder / "tokenizer.model", "bpe", user_defined_symbols=["<|user|>", "<|plain|>"]
    )
    tokenizer = Tokenizer.from_dir(folder)
    text = "<|user|>a <|plain|> b<|user|><|user|>"
    symbol = tokenizer.token_id("<|user|>")
    assert tokenizer.encode(text).count(symbol) == 3
    ids = tokenizer.encode(text, special=False)
    assert symbol not in ids and tokenizer.token_id("<|plain|>") in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a b", special=False) == tokenizer.encode("a b")


def test_ids_beyond_the_vocabulary_are_left_out(tokenizers):
    for name in ("spm_bos", "json_llama3"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("Hello", add_bos=False)
        assert tokenizer.decode([*ids, 10**6]) == "Hello"
        assert streamed(tokenizer, [*ids, 10**6], True) == "Hello"


def test_lone_surrogates_become_replacement_characters(tokenizers):
    for name in ("spm_bos", "json_llama3"):
        tokenizer = tokenizers[name]
        assert tokenizer.encode("a\ud800b\udc00") == tokenizer.encode("a\ufffdb\ufffd")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_bytes_are_not_text(tokenizers):
    with pytest.raises(InvalidSettings, match="expected a string"):
        tokenizers["spm_bos"].encode(b"bytes")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InvalidTokenizer, match="Copy the tokenizer files"):
        Tokenizer.from_dir(make.write_folder(tmp_path / "m", None))


def test_threads_share_a_tokenizer(tokenizers):
    tokenizer = tokenizers["json_llama3"]
    text = "a</s>b " * 50
    expected = {special: tokenizer.encode(text, False, special) for special in (True, False)}

    def encode_often(special: bool) -> list[list[int]]:
        return [tokenizer.encode(text, False, special) for _ in range(50)]

    for special, found in zip([True, False] * 2, in_threads(encode_often, [True, False] * 2),
                              strict=True):
        assert found == [expected[special]] * 50


def test_a_model_without_a_tokenizer_warns_and_refuses_text(tmp_path, caplog):
    import exl_loader

    folder = tiny.write_tiny_model(tmp_path / "model", tokenizer=False)
    with exl_loader.load(folder, ctx_size=256, device="cpu") as model:
        assert "no tokenizer files" in model.tokenizer_warning
        assert [r.levelname for r in caplog.records if model.tokenizer_warning in r.message] == [
            "WARNING"
        ]
        assert str(folder) in caplog.text
        texts = (
            lambda: model.encode("a"), lambda: model.decode([5]), lambda: model.generate("a"),
            lambda: model.generate([5]), lambda: model.generate_ids("a"),
            lambda: model.chat_ids([{"role": "user", "content": "a"}]),
            lambda: model.apply_chat_template([]), lambda: model.tokenizer,
            lambda: model.generate_ids([5], {"stop_strings": ["a"]}),
        )
        for use in texts:
            with pytest.raises(InvalidTokenizer, match="Copy the tokenizer files"):
                use()
        assert len(list(model.generate_ids([5], {"max_new_tokens": 3}))) <= 3
    caplog.clear()
    whole = tiny.write_tiny_model(tmp_path / "whole")
    with exl_loader.load(whole, ctx_size=256, device="cpu") as model:
        assert model.tokenizer_warning == "" and "tokenizer" not in caplog.text
