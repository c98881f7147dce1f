"""Tokenizer folders of every kind: what is in the files, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import support.tokenizer_folders as make
from exl_loader.text.tokenizer import Tokenizer, has_tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidSettings, InvalidTokenizer
from support import tiny


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


def write(folder: Path, config: dict | None = None, **files: object) -> Path:
    """Write a folder; a file is given as its bytes, its text, or its JSON, or copied."""
    make.write_folder(folder, config)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, Path):
            shutil.copy(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> str:
    stream = tokenizer.stream(skip_special)
    return "".join([stream.push(i) for i in ids]) + stream.flush()


def check_against(reference, tokenizer: Tokenizer, texts=tuple(make.TEXTS)) -> None:
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        for skip in (True, False):
            decoded = reference.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip) == decoded
            assert streamed(tokenizer, ids, skip) == decoded


# vocab.json with merges.txt


def write_vocab_and_merges(folder: Path, source: Path, config: dict | None, **model) -> Path:
    """Write what `tokenizer.json` holds as the two files, its added tokens apart."""
    content = json.loads(source.read_text())
    added = {str(t["id"]): make.added_token(t["content"], special=t["special"])
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


@pytest.mark.parametrize(
    "tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"]
)
@pytest.mark.parametrize("named", [
    {}, {"eos_token": "<|end|>"}, {"bos_token": "<s>", "add_bos_token": True},
    {"add_prefix_space": True},
])
def test_vocab_and_merges_are_read_as_transformers_reads_them(
    tokenizer_class, named, byte_level, tmp_path
):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = {"tokenizer_class": tokenizer_class} | named
    folder = write_vocab_and_merges(tmp_path / "model", byte_level, config)
    library = getattr(transformers, tokenizer_class.removesuffix("Fast"))
    reference = library.from_pretrained(str(folder))
    tokenizer = Tokenizer.from_dir(folder)
    check_against(reference, tokenizer)
    if named:
        for name in ("bos_token_id", "eos_token_id"):
            if name.removesuffix("_id") in named:
                assert getattr(tokenizer, name) == getattr(reference, name)


def test_vocab_and_merges_without_a_class_follow_the_kind_of_model(byte_level, tmp_path, caplog):
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
def test_bad_vocabularies_and_merges_are_named(name, tmp_path):
    files = {"vocab__json": {"a": 0, "b": 1, "ab": 2}, "merges__txt": "a b\n"}
    good = Tokenizer.from_dir(write(tmp_path / "good", {}, **files))
    assert good.encode("ab") == [2]
    with pytest.raises(InvalidTokenizer) as caught:
        Tokenizer.from_dir(write(tmp_path / "bad", {}, **(files | BAD_VOCABULARIES[name])))
    assert caught.value.remedy


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_of_the_two_files_is_no_tokenizer(missing, byte_level, tmp_path):
    folder = write_vocab_and_merges(tmp_path / "model", byte_level, {})
    assert has_tokenizer(folder)
    (folder / missing).unlink()
    assert not has_tokenizer(folder)
    with pytest.raises(InvalidTokenizer, match=r"vocab.json with merges.txt"):
        Tokenizer.from_dir(folder)


# Ids with gaps


def with_gaps(ids: dict[int, str]) -> dict:
    tokens = {str(i): make.added_token(content) for i, content in ids.items()}
    return {"added_tokens_decoder": tokens}


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
    # Ids in the gaps stand for nothing.
    gaps = [i for i in range(708, max(ids)) if i not in ids]
    assert tokenizer.decode(gaps, skip_special=False) == ""
    word = tokenizer.encode("Hello")
    assert streamed(tokenizer, [*word, *gaps], False) == "Hello"


def test_ids_that_tokenizer_json_itself_gives_are_kept(byte_level, tmp_path):
    """The library numbers added tokens itself, whatever the file says."""
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
    """The library gives the first added token the id of one that is there."""
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
def test_ids_that_cannot_be_are_named(tokens, byte_level, tmp_path):
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
def test_keys_that_are_no_ids_are_named(key, file, byte_level, sentencepiece_model, tmp_path):
    source = byte_level if file == "tokenizer.json" else sentencepiece_model
    config = {"added_tokens_decoder": {key: make.added_token("<new>")}}
    folder = write(tmp_path / "model", config, **{file.replace(".", "__"): source})
    with pytest.raises(InvalidTokenizer, match="token ids"):
        Tokenizer.from_dir(folder)


# Decoding and streaming show the same


def unusual_tokenizers(folder: Path) -> dict[str, Path]:
    """One folder for each kind of decoder, special tokens and clean-ups included."""
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


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_streaming_shows_what_decode_shows(data, skip, unusual):
    """Of any ids: bytes that are no UTF-8, special tokens amid a character, ids that are none."""
    for name, tokenizer in unusual.items():
        size = tokenizer.vocab_size
        ids = data.draw(st.lists(st.one_of(
            st.integers(0, size + 2),
            st.sampled_from([*range(size - 4, size), *range(14, 21), 0, 1, 3, 5, 10, -1, 1 << 70]),
        ), max_size=16), label=name)
        assert streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip), name


@pytest.mark.parametrize("cut", range(1, 12))
def test_streaming_goes_on_from_a_prompt_as_decode_does(cut, unusual):
    for name, tokenizer in unusual.items():
        if name.startswith(("sentencepiece", "byte_level")):
            ids = tokenizer.encode("Hello world, 'tis 1 text that goes on.", add_bos=False)
            stream = tokenizer.stream(previous_ids=ids[:cut])
            said = "".join(map(stream.push, ids[cut:])) + stream.flush()
            assert tokenizer.decode(ids[:cut]) + said == tokenizer.decode(ids), name


@pytest.mark.parametrize("model", ["WordLevel", "Unigram", "BPE"])
@pytest.mark.parametrize("clean_up", [True, False, None])
def test_spaces_are_cleaned_up_as_transformers_does(model, clean_up, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<unk>", "▁", *(f"▁{word}" for word in "a b . ? ! , ' n't 'm 's 've 're x".split())]
    vocab = {word: i for i, word in enumerate(words)}
    library = Library({
        "WordLevel": lambda: models.WordLevel(vocab, unk_token="<unk>"),
        "Unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
        "BPE": lambda: models.BPE(vocab, [], unk_token="<unk>"),
    }[model]())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if clean_up is None else {"clean_up_tokenization_spaces": clean_up}
    folder = write(tmp_path / "model", config, tokenizer__json=library.to_str())
    reference = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer = Tokenizer.from_dir(folder)
    random = Random(5)
    changed = 0
    for _ in range(300):
        ids = [random.randrange(1, len(words)) for _ in range(random.randrange(12))]
        expected = reference.decode(ids)
        assert tokenizer.decode(ids, False) == streamed(tokenizer, ids, False) == expected
        changed += expected != library.decode(ids)
    assert (changed > 0) == (clean_up is True and model != "BPE")


# What is damaged or odd


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
def test_ids_that_are_none_are_left_out(ids, unusual):
    for tokenizer in unusual.values():
        assert tokenizer.decode(ids) == "" == streamed(tokenizer, ids, True)


@pytest.mark.parametrize("ids", [[1.5], ["1"], "12", b"12", [None], None, 5, [[1]], [float("nan")],
                                 [True]])
def test_what_is_no_id_is_named(ids, unusual):
    for tokenizer in unusual.values():
        with pytest.raises(InvalidSettings, match="token ids"):
            tokenizer.decode(ids)


class PanicException(BaseException):  # noqa: N818
    """Named as pyo3 names what a panic of compiled code becomes."""


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


def test_an_interrupt_is_no_damaged_tokenizer(byte_level, tmp_path):
    folder = write(tmp_path / "model", {}, tokenizer__json=byte_level)
    tokenizer = Tokenizer.from_dir(folder)

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    tokenizer._vocabulary._tokenizer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([5])


def damaged_values(random: Random, value: object) -> object:
    """Put something else in the place of one value inside a JSON value."""
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
    """A `tokenizer.json` with every part that the library knows."""
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
def test_files_of_another_kind_are_named(file, data, found, remedy, tmp_path):
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
def test_wrong_values_of_tokenizer_config_are_named(values, byte_level, tmp_path):
    folder = write(tmp_path / "model", values, tokenizer__json=byte_level)
    with pytest.raises(InvalidTokenizer) as caught:
        Tokenizer.from_dir(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("content", ["\ud800", "a\udc00", ""])
@pytest.mark.parametrize("name", ["bos_token", "pad_token"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_tokens_that_are_no_text(file, name, content, byte_level, sentencepiece_model, tmp_path):
    """JSON can spell a lone surrogate, which is no text; an empty token is none."""
    source = byte_level if file == "tokenizer.json" else sentencepiece_model
    folder = write(tmp_path / "model", {name: content}, **{file.replace(".", "__"): source})
    try:
        tokenizer = Tokenizer.from_dir(folder)
    except InvalidTokenizer:
        return
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


# A folder without a tokenizer


def test_a_model_without_a_tokenizer_says_so(tmp_path, caplog):
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
