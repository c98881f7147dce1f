"""The settings of a tokenizer in a model folder, without the vocabulary itself.

Sources, in the order in which transformers reads them: `tokenizer_config.json`; where that
has no `added_tokens_decoder`, the older `special_tokens_map.json` and `added_tokens.json`;
`config.json` and `generation_config.json` for the model type, the size of its vocabulary and the
ids that begin and end a text. `roles` defines what each of them decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ...utils.errors import InvalidTokenizer, is_text, shown
from ...utils.json_keys import read_json_object_if_there
from ...utils.untrusted_files import read_bytes

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)
# The libraries store ids in 32 bits.
MAX_TOKEN_ID = 1 << 31
# A token in base64 and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n")
REMEDY = "Download the tokenizer files of the original model again"


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched for in the text before the vocabulary's own rules run.

    Args:
        content: its text.
        special: left out of decoded text where special tokens are skipped.
        lstrip, rstrip: the token includes the white space on that side.
        single_word: matches only where no word character is next to it.
        normalized: matches the normalised text.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    def __post_init__(self) -> None:
        if not is_text(self.content):
            raise InvalidTokenizer(
                f"token {shown(self.content)}", expected="text", actual="a lone surrogate in it",
                remedy=REMEDY,
            )

    @classmethod
    def parse(cls, value: Any, where: str, special: bool | None = None) -> AddedToken:
        """Read a token from JSON: a string or an object with `content`.

        Args:
            value: the JSON value.
            where: the name of the value in errors.
            special: the flag; None to read it from the value.

        Raises:
            InvalidTokenizer: the value is something else.
        """
        fields = {"content": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
            raise InvalidTokenizer(
                where, expected="a string or an object with `content`",
                actual=shown(value), remedy=REMEDY,
            )
        is_special = bool(fields.get("special", False)) if special is None else special
        flags = {key: bool(fields.get(key)) for key in ("lstrip", "rstrip", "single_word")}
        normalized = bool(fields.get("normalized", not is_special))
        return cls(fields["content"], is_special, normalized=normalized, **flags)


@dataclass(frozen=True)
class ModelTokens:
    """The settings of `config.json` and `generation_config.json` about tokens.

    Args:
        model_type: empty where unknown.
        vocab_size: None where unknown.
        bos_ids, eos_ids: ids that either file names, of which there may be none.
        silent_on_eos: True where there is a `config.json`, and neither file has an
            `eos_token_id`.
    """

    model_type: str = ""
    vocab_size: int | None = None
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    silent_on_eos: bool = False

    def has_id(self, token_id: int) -> bool:
        """Return whether the model has an embedding for an id, or no file has their number."""
        return self.vocab_size is None or token_id < self.vocab_size


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer settings of a folder.

    Args:
        folder: the model folder.
        tokenizer_class: as declared, without `Fast`; empty where the folder declares none.
        model: settings of the model's own files.
        named_tokens: `bos_token`, `eos_token`, ... -> token.
        extra_special_tokens: further special tokens, whose ids are in no file.
        added_tokens: id -> token.
        add_bos_token, add_eos_token, add_prefix_space: None where they are missing.
        legacy: put a space before every piece of text between special tokens.
        values: all of `tokenizer_config.json`.
    """

    folder: Path
    tokenizer_class: str
    model: ModelTokens
    named_tokens: dict[str, AddedToken]
    extra_special_tokens: tuple[AddedToken, ...]
    added_tokens: dict[int, AddedToken]
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    legacy: bool
    values: dict[str, Any]

    @property
    def declared(self) -> bool:
        """True where the folder has a `tokenizer_config.json`."""
        return bool(self.values)

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """True where spaces before punctuation are removed from decoded text."""
        return _flag(self.values, "clean_up_tokenization_spaces") is True

    def is_null(self, name: str) -> bool:
        """Return whether `tokenizer_config.json` declares that there is no token of this name."""
        return name in self.values and self.values[name] is None


def read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one where the file does not exist."""
    return read_json_object_if_there(path, error=InvalidTokenizer, remedy=REMEDY)


def read_vocabulary(path: Path, limit: int) -> bytes:
    """Read `tokenizer.json` or `tokenizer.model`.

    Raises:
        InvalidTokenizer: the file cannot be read, has more than `limit` bytes, or is of another
            kind that often has this name.
    """
    data = read_bytes(path, limit, error=InvalidTokenizer, missing=InvalidTokenizer, remedy=REMEDY)
    if data.startswith(b"version https://git-lfs"):
        raise InvalidTokenizer(
            str(path), expected="the tokenizer", actual="a Git LFS pointer in its place",
            remedy="Run git lfs pull in the folder, or download the file itself",
        )
    if _TIKTOKEN_LINE.match(data):
        raise InvalidTokenizer(
            str(path), expected="a sentencepiece model", actual="a tiktoken vocabulary",
            remedy="Copy tokenizer.json of the original model into the folder",
        )
    return data


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read the folder's tokenizer settings.

    Raises:
        InvalidTokenizer: a file is not a JSON object, or has an invalid token in it.
    """
    values = read_optional(folder / "tokenizer_config.json")
    tokens_of = dict(values)
    if "added_tokens_decoder" in values:
        added = _added_by_id(values["added_tokens_decoder"], folder / "tokenizer_config.json")
    else:
        tokens_of.update(read_optional(folder / "special_tokens_map.json"))
        added = {}
    where = f"special tokens of {folder}"
    named = {
        name: AddedToken.parse(tokens_of[name], f"{name} of {folder}", special=True)
        for name in NAMED_TOKENS
        if tokens_of.get(name) is not None
    }
    extra_values = tokens_of.get("extra_special_tokens") or tokens_of.get(
        "additional_special_tokens"
    ) or []
    if isinstance(extra_values, dict):
        extra_values = list(extra_values.values())
    if not isinstance(extra_values, list):
        raise InvalidTokenizer(where, expected="a list", actual=shown(extra_values),
                               remedy=REMEDY)
    # Tokens that only some model types have, such as `image_token`.
    own_values = [
        value for key, value in values.items()
        if key.endswith("_token") and key not in NAMED_TOKENS and isinstance(value, str)
    ]
    extra = tuple(
        AddedToken.parse(value, where, special=True) for value in [*extra_values, *own_values]
    )
    if "added_tokens_decoder" not in values:
        special = {token.content for token in (*named.values(), *extra)}
        added = _added_by_content(read_optional(folder / "added_tokens.json"), special, folder)
    return TokenizerConfig(
        folder=folder,
        tokenizer_class=str(values.get("tokenizer_class") or "").removesuffix("Fast"),
        model=_model_tokens(folder),
        named_tokens=named,
        extra_special_tokens=extra,
        added_tokens=added,
        add_bos_token=_flag(values, "add_bos_token"),
        add_eos_token=_flag(values, "add_eos_token"),
        add_prefix_space=_flag(values, "add_prefix_space"),
        legacy=bool(_flag(values, "legacy")),
        values=values,
    )


def _model_tokens(folder: Path) -> ModelTokens:
    # checkpoint/config.py refuses these files where they are invalid; a tokenizer works without.
    files = []
    for name in ("generation_config.json", "config.json"):
        try:
            files.append(read_optional(folder / name))
        except InvalidTokenizer:
            files.append({})
    config = files[-1]
    # A model that reads images too has the language part's settings there.
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else {}
    files.append(text)
    vocab_size = config.get("vocab_size", text.get("vocab_size"))
    return ModelTokens(
        model_type=str(config.get("model_type") or ""),
        vocab_size=vocab_size if is_id(vocab_size) else None,
        bos_ids=_ids(files, "bos_token_id"),
        eos_ids=_ids(files, "eos_token_id"),
        silent_on_eos=bool(config) and not any("eos_token_id" in values for values in files),
    )


def _ids(files: list[dict[str, Any]], key: str) -> tuple[int, ...]:
    found: list[int] = []
    for values in files:
        value = values.get(key)
        found += [i for i in (value if isinstance(value, list) else [value]) if is_id(i)]
    return tuple(dict.fromkeys(found))


def is_id(value: Any) -> TypeGuard[int]:
    """Return whether a value of JSON can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TOKEN_ID


def _flag(values: dict[str, Any], key: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidTokenizer(
            f"{key} in tokenizer_config.json", expected="true or false",
            actual=shown(value), remedy=REMEDY,
        )
    return value


def _added_by_id(value: Any, path: Path) -> dict[int, AddedToken]:
    where = f"added_tokens_decoder in {path}"
    # Every id has at most ten digits, and int() refuses thousands of digits.
    if not isinstance(value, dict) or not all(
        key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < MAX_TOKEN_ID
        for key in value
    ):
        raise InvalidTokenizer(where, expected="an object from token ids to tokens",
                               actual=shown(value), remedy=REMEDY)
    return {int(key): AddedToken.parse(token, where) for key, token in value.items()}


def _added_by_content(
    values: dict[str, Any], special: set[str], folder: Path
) -> dict[int, AddedToken]:
    added = {}
    for content, token_id in values.items():
        if not is_id(token_id):
            raise InvalidTokenizer(
                f"{shown(content)} in {folder / 'added_tokens.json'}", expected="a token id",
                actual=shown(token_id), remedy=REMEDY,
            )
        is_special = content in special
        added[token_id] = AddedToken(content, is_special, normalized=not is_special)
    return added
