"""Calibration text, on which the activations are measured."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from ..utils.errors import InvalidSettings
from ..utils.untrusted_files import TEXT_BYTES, read_text

# Code with long docstrings, and prose (`topics.py` is Python's manual as text), which every machine
# has. None of these files is among the demo model's held-out files.
_DEFAULT_FILES = (
    "argparse.py",
    "pydoc_data/topics.py",
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
_LEAST_TOKENS = 256


def calibration_text(path: str | Path | None) -> tuple[str, str]:
    """Read the calibration text.

    Args:
        path: a UTF-8 text file; None takes files of the installed standard library.

    Returns:
        A name for `config.json`, and the text.

    Raises:
        InvalidSettings: the file does not exist, is not UTF-8 or is larger than 64 MiB.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [root / name for name in _DEFAULT_FILES if (root / name).is_file()]
        return "(default)", "\n".join(file.read_text(encoding="utf-8") for file in files)
    path = Path(path)
    return path.name, read_text(
        path, TEXT_BYTES, error=InvalidSettings, missing=InvalidSettings,
        remedy="Give a UTF-8 text file to calibrate on",
    )


def calibration_rows(
    encode: Callable[[str], list[int]], text: str, num_rows: int, row_len: int
) -> list[list[int]]:
    """Cut rows of token ids from a text, evenly spaced.

    Args:
        encode: converts text to token ids, with the model's prefix such as a BOS token.
        text: the calibration text.
        num_rows: number of rows; a short text gives fewer.
        row_len: token ids of a row.

    Returns:
        Rows of row_len token ids, or a single shorter row if the text is that short.

    Raises:
        InvalidSettings: the text has fewer than 256 tokens, or than row_len if that is less.
    """
    ids = encode(text)
    if len(ids) < min(_LEAST_TOKENS, row_len):
        raise InvalidSettings(
            "calibration text",
            expected=f"at least {min(_LEAST_TOKENS, row_len)} tokens",
            actual=f"{len(ids)}",
            remedy="Give a longer file",
        )
    # Every row gets the prefix, because the model was trained on texts that begin with it.
    prefix = ids[: len(encode(""))]
    body = ids[len(prefix) :]
    body_len = min(row_len - len(prefix), len(body))
    count = min(num_rows, len(body) // body_len)
    spacing = (len(body) - body_len) / max(count - 1, 1)
    starts = [round(i * spacing) for i in range(count)]
    return [prefix + body[start : start + body_len] for start in starts]
