"""Read JSON by type: every wrong value becomes a typed error.

The files are untrusted: every value is type-checked. A file may be missing or not be JSON, have
NaN instead of a number, or a string instead of a list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ExlLoaderError, InvalidConfig, ModelNotFound, shown
from .untrusted_files import JSON_BYTES, decode_utf8, is_there, read_bytes

# Deeper than any config, index or schema, and far below Python's recursion limit, so that the
# values can also be copied and written.
MAX_DEPTH = 100
# A float has at most 309 digits before the point. A longer integer is no count and no size.
_MAX_DIGITS = 309
_TEN_DIGITS = re.compile("[0-9]{10}")
_CONTAINERS = (dict, list)


class InvalidJson(ValueError):
    """A text is not JSON, or has an unusable value, which the message names."""


class _Parser:
    """Builds the values of one text, and records the first that cannot be used.

    Args:
        distinct: an object may not have a key twice, even with equal values.
    """

    def __init__(self, distinct: bool) -> None:
        self.distinct = distinct
        self.problem = ""

    def constant(self, text: str) -> float:
        self.problem = self.problem or f"{text} is not a JSON number"
        return math.nan

    def decimal(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self.problem = self.problem or f"{_shortened(text)} is larger than any float"
        return value

    def integer(self, text: str) -> int:
        if len(text) > _MAX_DIGITS:
            self.problem = self.problem or (
                f"{_shortened(text)}, an integer of {len(text.lstrip('-'))} digits"
            )
            return 0
        return int(text)

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs) and not self.problem:
            seen: dict[str, Any] = {}
            for key, value in pairs:
                if key in seen and (self.distinct or seen[key] != value):
                    self.problem = f"the key {shown(key)} occurs twice"
                    break
                seen[key] = value
        return values


def _shortened(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."


def parse_json(data: str | bytes, *, distinct: bool = False) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark.

    Args:
        data: the text.
        distinct: refuse a repeated key in an object also where the values are equal.

    Raises:
        InvalidJson: the text is not JSON (NaN and Infinity are not); a number is larger than any
            float, or an integer has more than 309 digits; an object repeats a key with different
            values; or the nesting is deeper than `MAX_DEPTH`.
    """
    parser = _Parser(distinct)
    try:
        text = decode_utf8(data) if isinstance(data, bytes) else data.removeprefix("\ufeff")
        # A call for each integer would take longer than everything else, so integers are checked
        # only where the text may have one of more than 309 digits. Then ten consecutive
        # characters of text[::31] are digits.
        has_long = _TEN_DIGITS.search(text[::31]) is not None
        value = json.loads(
            text, parse_constant=parser.constant, parse_float=parser.decimal,
            parse_int=parser.integer if has_long else None, object_pairs_hook=parser.object,
        )
    except RecursionError:
        raise InvalidJson("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(parser.problem or str(error)) from None
    except ValueError as error:
        raise InvalidJson(str(error)) from None
    if parser.problem:
        raise InvalidJson(parser.problem)
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise InvalidJson(f"nested more than {MAX_DEPTH} deep")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    # `json.loads` makes exactly these two types. Tokenizers have 10^5 values, for which calls of
    # `isinstance` take noticeable time.
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(limit):
        level = [
            inner for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _CONTAINERS
        ]
    return bool(level)


def read_json_object(
    path: Path,
    *,
    limit: int = JSON_BYTES,
    error: type[ExlLoaderError] = InvalidConfig,
    missing: type[ExlLoaderError] = ModelNotFound,
    remedy: str = "Download this file of the model again",
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: path of the file.
        limit: most bytes that it may have.
        error: type of the exception where it cannot be read, is no regular file, is not JSON as
            `parse_json` reads it, is larger than `limit`, or is not an object.
        missing: type of the exception where there is no such file.
        remedy: what the user can do about it.
    """
    data = read_bytes(path, limit, error=error, missing=missing, remedy=remedy)
    try:
        value = parse_json(data)
    except InvalidJson as problem:
        raise error(
            str(path), expected="valid JSON", actual=str(problem), remedy=remedy
        ) from None
    if not isinstance(value, dict):
        raise error(
            str(path), expected="a JSON object", actual=type(value).__name__, remedy=remedy
        )
    return value


def read_json_object_if_there(
    path: Path,
    *,
    limit: int = JSON_BYTES,
    error: type[ExlLoaderError] = InvalidConfig,
    remedy: str = "Download this file of the model again",
) -> dict[str, Any]:
    """Read a file as `read_json_object` does; return an empty object where it does not exist."""
    if not is_there(path):
        return {}
    return read_json_object(path, limit=limit, error=error, missing=error, remedy=remedy)


class Keys:
    """Typed access to the keys of one JSON object.

    An absent key has its default. A key that is null, or is absent and has no default, reads as
    None. `required_*` refuse None. Every method raises InvalidConfig for a value of another type
    or range.

    Args:
        values: the object.
        where: the name of the object in errors, e.g. the path of the file.
        defaults: values of keys that may be absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str,
                 defaults: Mapping[str, Any] | None = None):
        self.values = values
        self.where = where
        self.defaults = defaults or {}

    def raw(self, key: str) -> Any:
        """Return the unchecked value, or its default, or None."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def fail(self, key: str, expected: str, actual: Any = None) -> InvalidConfig:
        """Make the error for a key. With `actual` None it shows the value."""
        value = self.raw(key) if actual is None else actual
        return InvalidConfig(
            f"{key} in {self.where}",
            expected=expected,
            actual=shown(value),
            remedy="Compare this file with the original model's",
        )

    def integer(self, key: str, low: int, high: int) -> int | None:
        """Read an integer in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def required_integer(self, key: str, low: int, high: int) -> int:
        """Read an integer in [low, high]."""
        value = self.integer(key, low, high)
        if value is None:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        """Read a finite number in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def required_number(self, key: str, low: float, high: float) -> float:
        """Read a finite number in [low, high]."""
        value = self.number(key, low, high)
        if value is None:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...] | None:
        """Read a list of `count` finite numbers in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            found = f"{len(value)} values" if isinstance(value, list) else None
            raise self.fail(key, f"a list of {count} numbers", found)
        if not all(_is_number(item) and low <= item <= high for item in value):
            raise self.fail(key, f"numbers from {low:g} to {high:g}")
        return tuple(float(item) for item in value)

    def boolean(self, key: str) -> bool | None:
        """Read true, false or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Read a string or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Read an object or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # JSON allows integers of hundreds of digits, which are larger than any float.
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)
