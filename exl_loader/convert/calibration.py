"""Calibration text: what the activations are measured on."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

from ..utils.errors import InvalidSettings
from ..utils.untrusted_files import TEXT_BYTES, read_text

# Code with long docstrings, and prose (`topics.py` is Python's own manual as text): what is
# on every machine that runs this. None of them is among the demo model's held-out files.
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
        InvalidSettings: the file is not there, not UTF-8 or larger than 64 MiB.
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
    """Cut rows of ids out of a text, evenly spread over it.

    Args:
        encode: text to ids, with the beginning-of-text id where the model wants one.
        text: the calibration text.
        num_rows: rows wanted; fewer come where the text is short.
        row_len: ids in a row.

    Returns:
        Rows of row_len ids; one shorter row if the text has no more.

    Raises:
        InvalidSettings: the text has fewer than 256 ids.
    """
    ids = encode(text)
    if len(ids) < min(_LEAST_TOKENS, row_len):
        raise InvalidSettings(
            "calibration text",
            expected=f"at least {min(_LEAST_TOKENS, row_len)} tokens",
            actual=f"{len(ids)}",
            remedy="Give a longer file",
        )
    # The model has learnt what follows its first id; a row cut from the middle gets it too.
    prefix = ids[: len(encode(""))]
    body = ids[len(prefix) :]
    body_len = min(row_len - len(prefix), len(body))
    count = min(num_rows, len(body) // body_len)
    spacing = (len(body) - body_len) / max(count - 1, 1)
    starts = [round(i * spacing) for i in range(count)]
    return [prefix + body[start : start + body_len] for start in starts]
