"""Calibration text, on which activations are measured and weights are quantised.

The default is made on the machine that converts, of four kinds of text: code and documentation
from the installed standard library of Python, and prose, several languages and conversations from
`texts/`, which were written for this purpose. Conversations get the model's own template.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import InvalidSettings, InvalidTokenizer
from ..utils.untrusted_files import TEXT_BYTES, read_text

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_TEXTS = Path(__file__).parent / "texts"
# Python's manual as text.
_DOCUMENTATION = "pydoc_data/topics.py"
# None of these files is among the demo model's held-out files.
_CODE = (
    "argparse.py",
    "collections/__init__.py",
    "ast.py",
    "datetime.py",
    "email/message.py",
    "http/client.py",
    "json/decoder.py",
    "logging/__init__.py",
    "random.py",
    "statistics.py",
    "subprocess.py",
    "textwrap.py",
    "threading.py",
    "typing.py",
    "zipfile.py",
)
DEFAULT_NAME = "(default)"
_LEAST_TOKENS = 256
# Characters of a token, at most, but for texts that are cut to fewer rows.
_MOST_CHARACTERS = 10
# Multiples of it, without their whole parts, are spread evenly over 0 to 1, however many there are.
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def calibration_rows(
    tokenizer: Tokenizer, path: Path | None, num_rows: int, row_len: int
) -> tuple[str, list[list[int]]]:
    """Cut rows of token ids from the calibration text.

    Args:
        tokenizer: of the model.
        path: a UTF-8 text file; None for the default text.
        num_rows: number of rows; a short text gives fewer.
        row_len: token ids of a row, the model's prefix such as a BOS token included.

    Returns:
        The name of the text for `config.json`. Rows of row_len token ids, or a single shorter
        row if the text is that short. The first rows are a sample of all of them: of each kind of
        the default text, or from all over a file.

    Raises:
        InvalidSettings: the file does not exist, is not UTF-8, is larger than 64 MiB, or has fewer
            than 256 tokens, or than row_len if that is less.
    """
    prefix = tokenizer.prompt_ids("")
    body_len = row_len - len(prefix)
    if path is None:
        kinds = [
            _cut(tokenizer, text, num_rows, body_len) for text in _default_texts(tokenizer)
        ]
        rows = _interleaved(kinds, num_rows)
        return DEFAULT_NAME, [prefix + row for row in rows]
    text = read_text(
        path, TEXT_BYTES, error=InvalidSettings, missing=InvalidSettings,
        remedy="Give a UTF-8 text file to calibrate on",
    )
    rows = _cut(tokenizer, text, num_rows, body_len)
    if not rows:
        ids = tokenizer.encode(text, add_bos=False)
        least = min(_LEAST_TOKENS, body_len)
        if len(ids) < least:
            raise InvalidSettings(
                "calibration text", expected=f"at least {least} tokens", actual=f"{len(ids)}",
                remedy="Give a longer file",
            )
        rows = [ids[:body_len]]
    return path.name, [prefix + row for row in rows]


def _default_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield each kind of the default text."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    code = "\n".join(
        (stdlib / name).read_text(encoding="utf-8") for name in _CODE if (stdlib / name).is_file()
    )
    prose = _own_text("prose.txt")
    if (stdlib / _DOCUMENTATION).is_file():
        prose += "\n" + (stdlib / _DOCUMENTATION).read_text(encoding="utf-8")
    yield from (prose, code, _own_text("languages.txt"))
    conversations = json.loads(_own_text("chat.json"))
    yield "".join(_rendered(tokenizer, messages) for messages in conversations)


def _own_text(name: str) -> str:
    return (_TEXTS / name).read_text(encoding="utf-8")


def _rendered(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """Write a conversation as the model's template does, or plainly without a usable one."""
    if tokenizer.chat_templates:
        # Some templates refuse system messages.
        without_system = [one for one in messages if one["role"] != "system"]
        for some in (messages, without_system):
            try:
                return tokenizer.apply_chat_template(some, add_generation_prompt=False)
            except InvalidTokenizer:
                continue
    lines = (f"{one['role'].capitalize()}: {one['content']}" for one in messages)
    return "\n\n".join(lines) + "\n\n"


def _cut(tokenizer: Tokenizer, text: str, num_rows: int, row_len: int) -> list[list[int]]:
    """Cut rows of row_len token ids that are evenly spaced and in scattered order.

    Of a long text only excerpts are encoded, because encoding 64 MiB takes minutes.
    """
    excerpt_len = row_len * _MOST_CHARACTERS
    is_long = len(text) > num_rows * excerpt_len
    if is_long:
        starts = _starts(len(text), num_rows, excerpt_len)
        excerpts = (text[start : start + excerpt_len] for start in starts)
        rows = [tokenizer.encode(excerpt, add_bos=False)[:row_len] for excerpt in excerpts]
        return [row for row in rows if len(row) == row_len]
    ids = tokenizer.encode(text, add_bos=False)
    starts = _starts(len(ids), min(num_rows, len(ids) // row_len), row_len)
    return [ids[start : start + row_len] for start in starts]


def _starts(length: int, count: int, piece: int) -> list[int]:
    """Return where `count` evenly spaced pieces begin, in scattered order."""
    spacing = (length - piece) / max(count - 1, 1)
    return [round(i * spacing) for i in sorted(range(count), key=lambda i: i * _GOLDEN_RATIO % 1)]


def _interleaved(kinds: Sequence[Sequence[list[int]]], num_rows: int) -> list[list[int]]:
    """Take a row of each kind in turn, as long as it has some."""
    turns = zip_longest(*kinds)
    rows = [row for turn in turns for row in turn if row is not None]
    return rows[:num_rows]
