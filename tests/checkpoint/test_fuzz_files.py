"""Every file of a model folder, damaged in every way: a typed error, or what the file means.

Special files in place of each, JSON values that no reader expects at any place of each, bytes
of any kind. Nothing else is ever raised, and nothing waits without end.
"""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from exl_loader.checkpoint import Checkpoint, is_quantised
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.checkpoint.safetensors_header import read_header
from exl_loader.commands.model_options import read_text
from exl_loader.convert.calibration import calibration_rows
from exl_loader.memory.reservation import plan
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidTokenizer, ModelNotFound
from support.host_server import DEMO
from support.makers import write_quantized_model
from support.special_files import SPECIAL_FILES
from support.tiny import write_tiny_model
from support.tokenizer_folders import train_sentencepiece

pytestmark = pytest.mark.timeout(600)

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}]
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

JSON_FILES = (
    "config.json", "generation_config.json", "quantize_config.json", INDEX, "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "vocab.json",
)
OTHER_FILES = (
    SHARD, "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    "merges.txt",
)

# Replacements of a value, as JSON text: Python's json module could not write many of them.
ODD_JSON = (
    "null", "true", "-1", "0", "0.5", "1e999", "-1e999", "NaN", "9" * 400, "9" * 5000, "1e300",
    str(1 << 31), str(1 << 63), str(-(1 << 70)), '""', '"x"', '"\\ud800"', '"\\u0000"',
    '"' + "x" * 5000 + '"', '"9999999999999999999999"', "[]", "{}", "[[[[1]]]]", "[null]",
    '["\\udfff"]', "[-1]", '{"\\ud800": 1}', '{"a": 1, "a": 2}', "[" * 99 + "]" * 99,
    "[" * 3000 + "]" * 3000, '{"content": 5}', '{"9999999999999999999": "x"}',
)


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory) -> Path:
    """A folder with every file that any reader knows, all of them correct."""
    folder = write_tiny_model(tmp_path_factory.mktemp("full") / "model", shards=2)
    tensors = {
        header.name: path.name
        for path in sorted(folder.glob("*.safetensors")) for header in read_header(path)[0]
    }
    values = {
        INDEX: {"metadata": {"total_size": 1}, "weight_map": tensors},
        "generation_config.json": {"eos_token_id": [2], "temperature": 0.7},
        "quantize_config.json": {},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "added_tokens.json": {"<unk>": 0},
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text(TEMPLATE)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    vocab["th"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    train_sentencepiece(folder / "tokenizer.model", "bpe", vocab_size=700)
    return folder


@pytest.fixture
def folder(full_folder, tmp_path):
    return shutil.copytree(full_folder, tmp_path / "model")


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)


def readers(folder: Path):
    """Everything that reads a model folder."""
    yield lambda: plan(folder, ctx_size=256)
    yield lambda: ModelConfig.from_dir(folder)
    yield lambda: read_weights(folder)
    yield lambda: use_tokenizer(folder)
    yield lambda: is_quantised(folder)


def read_weights(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        for name in list(checkpoint.headers)[:3]:
            checkpoint.read(name)


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.decode(tokenizer.encode("Hi <s>"), skip_special=False)
    if tokenizer.chat_templates:
        tokenizer.apply_chat_template(MESSAGES)


def errors_of(folder: Path) -> list[ExlLoaderError]:
    """Call every reader; each may raise only a typed error that can be printed."""
    found = []
    for reader in readers(folder):
        try:
            reader()
        except ExlLoaderError as error:
            line = str(error)
            assert 0 < len(line) < 3000
            assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in line), ascii(line)
            found.append(error)
    return found


def files_for(folder: Path, name: str) -> Path:
    """Remove the files that are read instead of a file, and return its path."""
    hides = {
        "tokenizer.model": ["tokenizer.json"],
        "vocab.json": ["tokenizer.json", "tokenizer.model"],
        "merges.txt": ["tokenizer.json", "tokenizer.model"],
        "chat_template.json": ["chat_template.jinja", "additional_chat_templates"],
    }
    for other in hides.get(name, []):
        path = folder / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / name


def test_the_undamaged_folder_loads(folder):
    assert errors_of(folder) == []
    for name in ("tokenizer.model", "chat_template.json"):
        files_for(folder, name)
        assert errors_of(folder) == []
    (folder / "tokenizer.model").unlink()
    assert errors_of(folder) == []


@pytest.mark.parametrize("name", [*JSON_FILES, *OTHER_FILES])
@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_a_special_file_is_refused_with_its_name(folder, name, kind):
    path = files_for(folder, name)
    path.unlink()
    SPECIAL_FILES[kind](path)
    errors = errors_of(folder)
    # Without its index the folder is still complete: the shards' names have their number.
    assert name == INDEX or any(Path(name).name in str(error) for error in errors), errors


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_a_special_file_in_place_of_the_folder(tmp_path, kind):
    SPECIAL_FILES[kind](tmp_path / "model")
    if kind == "folder":
        assert all(isinstance(e, (ModelNotFound, InvalidTokenizer))
                   for e in errors_of(tmp_path / "model"))
    else:
        assert len(errors_of(tmp_path / "model")) >= 4


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL_FILES if kind != "folder"])
def test_a_special_file_in_place_of_the_folder_of_templates(folder, kind):
    shutil.rmtree(folder / "additional_chat_templates")
    SPECIAL_FILES[kind](folder / "additional_chat_templates")
    assert "additional_chat_templates" in str(errors_of(folder))


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_special_files_named_by_a_user(tmp_path, kind):
    path = tmp_path / "text"
    SPECIAL_FILES[kind](path)
    tokenizer = Tokenizer.from_dir(DEMO)
    for read in (
        lambda: calibration_rows(tokenizer, path, 1, 64), lambda: read_text(str(path), "--text"),
    ):
        with pytest.raises(ExlLoaderError, match="text: expected a"):
            read()


@pytest.mark.parametrize("name", JSON_FILES)
def test_odd_values_in_json(folder, name, rng):
    path = files_for(folder, name)
    text = path.read_text()
    for odd in ODD_JSON:
        path.write_text(odd)
        errors_of(folder)
        for _ in range(2):
            path.write_text(with_odd_value(json.loads(text), odd, rng))
            errors_of(folder)
    path.write_text(text)
    assert errors_of(folder) == []


def with_odd_value(value, odd: str, rng: random.Random) -> str:
    """Write a value with `odd` in place of one of its parts, or beside it under a new key."""
    mark = "odd value 1f0c"
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys or ["quant_method", "bits", "sym"])
        if keys and isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if isinstance(at, dict) and rng.random() < 0.3:
            at[rng.choice(["9" * 5000, "\ud800", "", "9" * 20, "²", "new", "rope_scaling"])] = mark
        else:
            at[key] = mark
        return json.dumps(value).replace(f'"{mark}"', odd)


@pytest.mark.parametrize("name", [*JSON_FILES, *OTHER_FILES])
def test_damaged_bytes(folder, name, rng):
    path = files_for(folder, name)
    content = path.read_bytes()
    damages = [
        b"", b"\0", content[: len(content) // 2], b"\xff\xfe" + content, b"\xef\xbb\xbf" + content,
        content.decode("latin-1").encode("utf-16"), content + b"\0", content * 2, bytes(1000),
        rng.randbytes(300), b"[" * 100_000, b"{" * 100_000, b'{"a":' * 50_000,
    ]
    for _ in range(12):
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            flipped[rng.randrange(min(len(flipped), 2000))] = rng.randrange(256)
        damages.append(bytes(flipped))
    for damage in damages:
        path.write_bytes(damage)
        errors_of(folder)


@pytest.mark.parametrize("format", ["gptq", "exl2"])
def test_odd_values_in_the_config_of_a_quantised_model(tmp_path, format, rng):
    folder = tmp_path / "model"
    write_quantized_model(folder, format)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for odd in ODD_JSON:
        for _ in range(2):
            changed = json.loads(json.dumps(values))
            inner = changed["quantization_config"]
            key = rng.choice([*inner, "dynamic", "meta", "sym", "desc_act", "checkpoint_format",
                              "format", "extra_config", "lm_head", "modules_in_block_to_quantize"])
            inner[key] = "odd value 1f0c"
            path.write_text(json.dumps(changed).replace('"odd value 1f0c"', odd))
            errors_of(folder)
