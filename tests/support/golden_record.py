"""Keeps the golden record: what the cases of `golden_cases` gave, in tests/golden/record.json.

A result has three kinds of values:

- `exact`: the same on every machine (plans, error types, token ids of texts). Compared with ==.
- `bits`: hashes of logits and texts. They depend on the processor's instructions, the compiler
  and PyTorch, so the record keeps them for each machine, and they are compared with == where
  the record has this machine's.
- `near`: a few logits. Any machine's are within `bound` of the recorded ones (relative L2 error).
  `robust` holds greedy ids, as far as each leads the next likeliest by more than rounding.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TESTS = next(p for p in Path(__file__).resolve().parents if (p / "conftest.py").is_file())
RECORD = TESTS / "golden" / "record.json"


@dataclass
class Result:
    """What a case gave; see the module's docstring.

    Args:
        near: name -> float32 logits.
        bound: largest relative L2 error of `near` between two machines.
        robust: name -> greedy ids, and how many of them every machine gives.
    """

    exact: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, Any] = field(default_factory=dict)
    near: dict[str, np.ndarray] = field(default_factory=dict)
    bound: float = 0.0
    robust: dict[str, tuple[list[int], int]] = field(default_factory=dict)


def sha256(data: Any) -> str:
    """Hash bytes, an array, or plain JSON."""
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).tobytes()
    elif not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:24]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative L2 error, infinite where the shapes differ."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


@cache
def machine() -> dict[str, str]:
    """Name everything outside of the repository that decides the bits of logits and texts.

    It asks the system and not the engine, so that no change of the engine's makes a machine
    look like one that the record does not know.
    """
    import tokenizers
    import torch

    return {
        "cpu": _cpu(),
        "march": os.environ.get("EXL_LOADER_MARCH", "native"),
        "compiler": _compiler(),
        "libc": " ".join(platform.libc_ver()),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
        "tokenizers": tokenizers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def machine_key() -> str:
    """Return the name under which the record keeps this machine's bits."""
    return sha256(machine())[:12]


def _cpu() -> str:
    """Name the processor by what a compiler makes of `-march=native`: its vector extensions."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = {}
    for name in ("vendor_id", "cpu family", "model", "flags", "Features"):
        match = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
        found[name] = match[1] if match else ""
    vectors = sorted(
        flag for flag in (found["flags"] or found["Features"]).split()
        if flag.startswith(("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "asimd", "sve"))
    )
    family = " ".join(filter(None, (found["vendor_id"], found["cpu family"], found["model"])))
    return f"{platform.machine()} {family}, {' '.join(vectors)}"


def _compiler() -> str:
    """Return the first line of the C++ compiler's `--version`."""
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        names = ("g++", "clang++")
        command = [found for name in names if (found := shutil.which(name))][:1]
    if not command:
        return "none"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.partition("\n")[0]


class Record:
    """The record file.

    Attributes:
        cases: name -> what is the same on every machine.
        bits: machine key -> name -> that machine's bits.
        machines: machine key -> `machine()`.
    """

    def __init__(self, path: Path = RECORD) -> None:
        self.path = path
        read = json.loads(path.read_text()) if path.is_file() else {}
        self.cases: dict[str, Any] = read.get("cases", {})
        self.bits: dict[str, dict[str, Any]] = read.get("bits", {})
        self.machines: dict[str, Any] = read.get("machines", {})

    def has_bits(self, name: str) -> bool:
        """True if a case's bits on this machine are recorded."""
        return name in self.bits.get(machine_key(), {})

    def put(self, name: str, result: Result, changed: bool = False) -> None:
        """Record a case.

        Args:
            changed: its bits change on all machines, so those of other machines are dropped. They
                are in any case where the result differs from the record.
        """
        kept = {
            "exact": result.exact,
            "near": {key: _packed(values) for key, values in result.near.items()},
            "bound": result.bound,
            "robust": {key: ids[:count] for key, (ids, count) in result.robust.items()},
        }
        kept = {key: value for key, value in kept.items() if value}
        if changed or self.differences(name, result):
            for bits in self.bits.values():
                bits.pop(name, None)
        self.cases[name] = json.loads(json.dumps(kept))
        if result.bits:
            key = machine_key()
            self.machines[key] = machine()
            self.bits.setdefault(key, {})[name] = json.loads(json.dumps(result.bits))

    def keep_only(self, names: set[str]) -> None:
        """Drop what no case gives any more."""
        self.cases = {name: kept for name, kept in self.cases.items() if name in names}
        for key, bits in self.bits.items():
            self.bits[key] = {name: kept for name, kept in bits.items() if name in names}

    def write(self) -> None:
        """Write the file, a line a case, so that a change of it can be read."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = [
            _block("cases", self.cases),
            _block("machines", self.machines),
            *(_block(key, bits) for key, bits in sorted(self.bits.items())),
        ]
        first, rest = ",\n".join(parts[:2]), ",\n".join(parts[2:])
        self.path.write_text(f'{{\n{first},\n"bits": {{\n{rest}\n}}\n}}\n')

    def differences(self, name: str, result: Result) -> list[str]:
        """Say how a result differs from the record; bits only where they are this machine's."""
        kept = self.cases.get(name)
        if kept is None:
            return ["not in the record"]
        found = _differing("exact", kept.get("exact", {}), result.exact)
        bits = self.bits.get(machine_key(), {}).get(name)
        if bits is not None:
            found += _differing("bits", bits, result.bits)
        expected = {key: _unpacked(text) for key, text in kept.get("near", {}).items()}
        found += [f"near: {key} is new" for key in result.near.keys() - expected.keys()]
        for key, values in expected.items():
            if key not in result.near:
                found.append(f"near: {key} is gone")
                continue
            error = relative_error(result.near[key].ravel(), values)
            if not error <= kept["bound"]:
                found.append(f"near: {key} has a relative error of {error:.1e} > {kept['bound']}")
        for key, expected_ids in kept.get("robust", {}).items():
            ids = result.robust[key][0] if key in result.robust else []
            if ids[: len(expected_ids)] != expected_ids:
                found.append(f"robust: {key} was {expected_ids} and is {ids}")
        return found


def _block(name: str, values: dict[str, Any]) -> str:
    lines = ",\n".join(
        f"{json.dumps(key)}: {json.dumps(value, sort_keys=True, ensure_ascii=True)}"
        for key, value in sorted(values.items())
    )
    return f'{json.dumps(name)}: {{\n{lines}\n}}'


def _differing(kind: str, expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    actual = json.loads(json.dumps(actual))
    found = []
    for key in sorted(expected.keys() | actual.keys()):
        if key not in actual:
            found.append(f"{kind}: {key} is gone")
        elif key not in expected:
            found.append(f"{kind}: {key} is new")
        elif isinstance(expected[key], dict) and isinstance(actual[key], dict):
            found += _differing(f"{kind}: {key}", expected[key], actual[key])
        elif expected[key] != actual[key]:
            found.append(f"{kind}: {key} was {expected[key]!r} and is {actual[key]!r}")
    return found


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
