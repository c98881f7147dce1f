"""Write and read measurement.json, with the keys of exllamav2's file.

Per block, `measurement` has a list of ways to store it. Each has `accuracy`, which is 1 minus the
relative error of the block's output; `total_bits`; and role -> mix. exllamav2 can choose from
measurements made here, and its measurements can be used here. What it does not have is in the
object `exl_loader`: `divergence`, what an error of a block is worth, see `BlockMeasurement`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats.exl2 import WIDTHS
from ..formats.layer import BLOCK_ROWS
from ..model.parts.part import Block
from ..utils.errors import InvalidSettings, shown
from ..utils.json_keys import read_json_object
from .measurement import LEAST_ERROR, BlockMeasurement, Combination
from .mixes import SCALE_BITS, Mix
from .roles import block_roles

FILE_NAME = "measurement.json"
# 100 layers of a few hundred combinations.
_FILE_BYTES = 64 << 20
_REMEDY = "Measure this model again, without --measurement"
# exllamav2's modules: the embedding, two for each layer, final norm and head.
_OTHER_MODULES = 2


def as_json(measured: Mapping[str, BlockMeasurement]) -> dict[str, Any]:
    """Return measurements as the contents of the file."""
    entries: dict[str, Any] = {}
    for key, block in measured.items():
        name, slash, part = key.partition("/")
        found = [_as_entry(one) for one in block.combinations]
        if slash:
            entries.setdefault(name, {})[part] = found
        else:
            entries[name] = found
    return {
        "measurement": entries,
        "last_module_idx": len(entries) + _OTHER_MODULES,
        "exl_loader": {
            "version": __version__,
            "divergence": {key: block.divergence for key, block in measured.items()},
        },
    }


def _as_entry(one: Combination) -> dict[str, Any]:
    return {
        "accuracy": 1 - math.sqrt(one.error),
        "total_bits": one.size,
        **{role: mix.as_dict() for role, mix in one.mixes.items()},
    }


def write_measurement(path: Path, measured: Mapping[str, BlockMeasurement]) -> None:
    """Write measurement.json."""
    path.write_text(json.dumps(as_json(measured), indent=1) + "\n", encoding="utf-8")


def read_measurement(path: Path, blocks: Mapping[str, Block]) -> dict[str, BlockMeasurement]:
    """Read measurement.json and check that it is of this model.

    Args:
        path: the file.
        blocks: key -> block of the model, from `layer_blocks`.

    Returns:
        Key -> measurement, for every block. Sizes are computed again.

    Raises:
        InvalidSettings: there is no such file, it is broken, or it is another model's.
    """
    values = read_json_object(
        path, limit=_FILE_BYTES, error=InvalidSettings, missing=InvalidSettings, remedy=_REMEDY
    )
    return from_json(values, blocks, str(path))


def from_json(
    values: Mapping[str, Any], blocks: Mapping[str, Block], where: str
) -> dict[str, BlockMeasurement]:
    """Check the contents of a file; see `read_measurement`."""
    entries = _mapping(values.get("measurement"), "measurement", where)
    own = _mapping(values.get("exl_loader", {}), "exl_loader", where)
    divergences = _mapping(own.get("divergence", {}), "exl_loader.divergence", where)
    found = {}
    for key, block in blocks.items():
        name, slash, part = key.partition("/")
        entry = entries.get(name)
        if slash and isinstance(entry, dict):
            entry = entry.get(part)
        if not isinstance(entry, list) or not entry:
            raise _broken(f"{key} in {where}", "a list of ways to store the block", entry)
        ways = [_combination(one, block, f"{key}[{i}] in {where}") for i, one in enumerate(entry)]
        divergence = divergences.get(key)
        if divergence is not None and not _is_number(divergence, 0, math.inf):
            raise _broken(f"divergence of {key} in {where}", "a number of nats", divergence)
        found[key] = BlockMeasurement(ways, divergence)
    foreign = entries.keys() - {key.partition("/")[0] for key in blocks}
    if foreign:
        raise _broken(where, f"the {len(blocks)} blocks of this model", sorted(foreign)[0])
    return found


def _combination(entry: Any, block: Block, where: str) -> Combination:
    values = _mapping(entry, "entry", where)
    accuracy: Any = values.get("accuracy")
    if not _is_number(accuracy, -math.inf, 1):
        raise _broken(f"accuracy of {where}", "a number up to 1", accuracy)
    size, mixes = 0, {}
    for role, linears in block_roles(block).items():
        mixes[role] = mix = _mix(values.get(role), f"{role} of {where}")
        for linear in linears:
            size += mix.stored_bits(linear.spec.in_features, linear.spec.out_features)
    return Combination(size, max((1 - accuracy) ** 2, LEAST_ERROR), mixes)


def _mix(entry: Any, where: str) -> Mix:
    values = _mapping(entry, "mix", where)
    bits, shares = values.get("bits"), values.get("bits_prop")
    sizes = _mapping(values.get("group_size"), "group_size", where)
    if not isinstance(bits, list) or not bits or any(width not in WIDTHS for width in bits):
        raise _broken(f"bits of {where}", f"a list of widths out of {list(WIDTHS)}", bits)
    if bits != sorted(set(bits), reverse=True):
        raise _broken(f"bits of {where}", "widths in falling order", bits)
    if (
        not isinstance(shares, list) or len(shares) != len(bits)
        or not all(_is_number(share, 0, 1) for share in shares)
        or abs(sum(shares) - 1) > 1e-6
    ):
        raise _broken(f"bits_prop of {where}", "a share of each width, which add up to 1", shares)
    for width in bits:
        size = sizes.get(str(width))
        if type(size) is not int or size < BLOCK_ROWS or size % BLOCK_ROWS:
            raise _broken(
                f"group_size of {where}", f"a multiple of {BLOCK_ROWS} for each width", size
            )
    if values.get("scale_bits") != SCALE_BITS:
        raise _broken(f"scale_bits of {where}", f"{SCALE_BITS}", values.get("scale_bits"))
    return Mix.from_dict(values)


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _mapping(value: Any, what: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _broken(f"{what} of {where}", "an object", value)
    return value


def _broken(what: str, expected: str, actual: Any) -> InvalidSettings:
    return InvalidSettings(what, expected=expected, actual=shown(actual), remedy=_REMEDY)
