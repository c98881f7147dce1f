"""Measure what conversions to EXL2 change in a model's predictions; docs/conversion.md.

    python tools/smollm2.py build/smollm2-noise --noise 1
    python -m benchmarks.cpu.conversion build/smollm2-noise build/conversions \\
        --text prose=FILE --text code=FILE --text chat=FILE [--update docs/conversion.md]

The model is converted to several sizes from one measurement, and with one width everywhere in
groups of 128 rows. `--ggml` adds the file types of llama.cpp, without an importance matrix and with
one of the same calibration text. The divergence is the Kullback-Leibler divergence of the
predictions from those of the unquantised model, nats a token, on windows of texts that the
conversion has not seen. The unquantised model and the converted ones run in the engine with an
exact cache. Folders that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cpu.cache_quality import markdown, update
from benchmarks.cpu.conversion_plot import write_picture
from benchmarks.cpu.ggml_types import (
    FILE_TYPES,
    IMPORTANCE_FILE_TYPES,
    Ggml,
    Rule,
    stored_type,
)
from exl_loader import load
from exl_loader.convert import convert
from exl_loader.convert.activations import LayerRunner
from exl_loader.convert.calibration import calibration_rows
from exl_loader.convert.measurement import BlockMeasurement, Combination, mean_divergences
from exl_loader.convert.measurement_file import FILE_NAME, as_json
from exl_loader.convert.mixes import Mix
from exl_loader.convert.roles import block_roles, layer_blocks
from exl_loader.convert.source import Source
from exl_loader.model.decoder import DecoderLayer
from exl_loader.model.parts.linear import Linear
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.progress import default_progress, task

SIZES = (3.0, 4.0, 5.0, 6.0)
WIDTHS = (3, 4, 5, 6)
# Group size of one width everywhere.
GROUP_SIZE = 128
WINDOW = 512
# Bits beyond the largest size to which its trend is continued.
_BEYOND = 0.15
WINDOWS = 2


@dataclass(frozen=True)
class Result:
    """A converted folder.

    Args:
        bits: stored bits per weight of the decoder layers.
        divergences: text -> nats a token.
    """

    bits: float
    divergences: Mapping[str, float]

    @property
    def divergence(self) -> float:
        """Mean of the texts, which are of the same length."""
        return sum(self.divergences.values()) / len(self.divergences)


def one_width(source: Source, mix: Mix) -> dict:
    """Return a measurement.json that has nothing to choose from but one mix."""
    measured = {}
    for index, layer in enumerate(source.parts.layers):
        for key, block in layer_blocks(index, layer).items():
            mixes = dict.fromkeys(block_roles(block), mix)
            measured[key] = BlockMeasurement([Combination(0, 1e-3, mixes)], None)
    return as_json(measured)


def stored_bits(source: Source, folder: Path) -> float:
    """Return the stored bits per weight of a converted folder's decoder layers."""
    from safetensors import safe_open

    weights = bits = 0
    with safe_open(folder / "output.safetensors", "pt") as file:
        for layer in source.parts.layers:
            for linear in (one for group in layer.input_groups() for one in group):
                weights += linear.spec.in_features * linear.spec.out_features
                for role in ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm"):
                    tensor = file.get_tensor(f"{linear.name}.{role}")
                    bits += 8 * tensor.numel() * tensor.element_size()
    return bits / weights


def windows(tokenizer, texts: Mapping[str, str]) -> Iterator[tuple[str, list[int]]]:
    """Yield the name of a text and a window of its token ids, WINDOWS of each text."""
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_bos=False)
        if len(ids) < WINDOW * WINDOWS:
            raise SystemExit(f"{name}: {len(ids)} tokens, fewer than {WINDOW * WINDOWS}")
        for first in range(0, WINDOW * WINDOWS, WINDOW):
            yield name, ids[first : first + WINDOW]


def log_probabilities(folder: Path, texts: Mapping[str, str]) -> list[tuple[str, torch.Tensor]]:
    """Return the name of a text and the predictions of each window, float32 [WINDOW, vocab]."""
    with load(folder, ctx_size=WINDOW, cache_type="fp32", device="cpu") as model:
        return [
            (name, torch.log_softmax(model.prompt_logits(ids), dim=-1))
            for name, ids in windows(model, texts)
        ]


def divergences(
    expected: Sequence[tuple[str, torch.Tensor]], actual: Sequence[tuple[str, torch.Tensor]]
) -> dict[str, float]:
    """Return text -> mean Kullback-Leibler divergence of its windows, nats a token."""
    found: dict[str, list[float]] = {}
    for (name, logs), (_, others) in zip(expected, actual, strict=True):
        nats = (logs.exp() * (logs - others)).sum(dim=-1, dtype=torch.float64)
        found.setdefault(name, []).append(nats.mean().item())
    return {name: sum(values) / len(values) for name, values in found.items()}


@dataclass(frozen=True)
class FileType:
    """A file type of llama.cpp.

    Args:
        name: llama.cpp's.
        rule: which type a matrix gets.
        has_importance: whether there is an importance matrix.
    """

    name: str
    rule: Rule
    has_importance: bool


def file_types() -> Iterator[FileType]:
    """Yield every file type without an importance matrix, and then with one."""
    for types, has_importance in ((FILE_TYPES, False), (IMPORTANCE_FILE_TYPES, True)):
        for name, rule in types.items():
            yield FileType(name, rule, has_importance)


def file_type_results(
    source: Source, tokenizer: Tokenizer, texts: Mapping[str, str], ggml: Ggml, num_rows: int
) -> dict[FileType, Result]:
    """Return file type of llama.cpp -> its result, with head and embedding as they are.

    Every type has its hidden states, and all of them run through one layer after the other. The
    importance matrix is of the calibration text of the conversions, in the unquantised model.

    Args:
        num_rows: of calibration text.
    """
    rows = list(windows(tokenizer, texts))
    runner = LayerRunner(source, WINDOW)
    expected = runner.embed([ids for _, ids in rows])
    calibration = runner.embed(calibration_rows(tokenizer, None, num_rows, WINDOW)[1])
    outputs = torch.empty_like(calibration)
    states = {one: expected.clone() for one in file_types()}
    bits, weights, count = dict.fromkeys(states, 0), 0, len(source.parts.layers)
    with task(default_progress(), "types of llama.cpp", count, "layers") as advance:
        for index in range(count):
            loaded = runner.load(index)
            hessians, _ = runner.record(loaded, calibration, outputs=outputs)
            calibration, outputs = outputs, calibration
            importance = {
                linear.name: hessians[group[0].name].mean().diagonal().float().contiguous()
                for group in loaded.layer.input_groups() for linear in group
            }
            matrices = {
                linear.name: source.linear(linear.spec).weight().t().contiguous()
                for linear in _linears(loaded.layer)
            }
            weights += sum(matrix.numel() for matrix in matrices.values())
            # Many file types have the same type of a matrix.
            known: dict[tuple[str, str, bool], tuple[torch.Tensor, int]] = {}
            for file_type in states:
                decoded = {}
                for name, matrix in matrices.items():
                    kind = file_type.rule(name.rpartition(".")[2], index, count)
                    kind = stored_type(kind, matrix.shape[1])
                    key = name, kind, file_type.has_importance
                    if key not in known:
                        own = importance[name] if file_type.has_importance else None
                        known[key] = ggml.round_trip(matrix, kind, own)
                    found, stored = known[key]
                    decoded[name] = found.t()
                    bits[file_type] += stored
                loaded.replace(decoded)
                runner.run(loaded, states[file_type])
                loaded.restore(decoded)
            runner.run(loaded, expected)
            advance(1)
    runner.load_head()
    by_text: dict[FileType, dict[str, float]] = {one: {} for one in states}
    for text in texts:
        mine = [i for i, (name, _) in enumerate(rows) if name == text]
        numbered = dict(enumerate(states.items()))
        nats = mean_divergences(
            runner, expected[mine],
            {str(number): state[mine] for number, (_, state) in numbered.items()},
        )
        for number, (file_type, _) in numbered.items():
            by_text[file_type][text] = nats[str(number)]
    return {one: Result(bits[one] / weights, by_text[one]) for one in states}


def _linears(layer: DecoderLayer) -> list[Linear]:
    return [linear for group in layer.input_groups() for linear in group]


def interpolated(results: Sequence[Result], bits: float) -> float | None:
    """Return the divergence at a size between two of the results, or just beyond the last two.

    The logarithm of the divergence is nearly linear in the bits. None for a size further away.
    """
    ordered = sorted(results, key=lambda result: result.bits)
    if not ordered[0].bits - _BEYOND <= bits <= ordered[-1].bits + _BEYOND:
        return None
    above = next((i for i, one in enumerate(ordered) if one.bits >= bits), len(ordered) - 1)
    one, other = ordered[max(above, 1) - 1], ordered[max(above, 1)]
    share = (bits - one.bits) / (other.bits - one.bits)
    logs = math.log(one.divergence), math.log(other.divergence)
    return math.exp(logs[0] + share * (logs[1] - logs[0]))


def tables(
    chosen: Sequence[Result], uniform: Mapping[str, Result],
    llama_cpp: Mapping[FileType, Result],
) -> dict[str, str]:
    """Write the results as tables.

    Args:
        chosen: with chosen mixes. uniform: width -> one width everywhere. llama_cpp: its file
            types; empty where they were not measured.
    """
    texts = list(chosen[0].divergences)
    rows = [["stored bits a weight", *texts, "together"]]
    rows += [
        [f"{one.bits:.3f}", *(f"{one.divergences[name]:.4f}" for name in texts),
         f"{one.divergence:.4f}"]
        for one in chosen
    ]
    found = {"sizes": markdown(rows)}
    found["one width"] = _compared("width everywhere", chosen, uniform)
    if llama_cpp:
        for key, has_importance in (("llama.cpp", False), ("importance", True)):
            found[key] = _compared("type of llama.cpp", chosen, {
                one.name: result for one, result in llama_cpp.items()
                if one.has_importance == has_importance
            })
    return found


def _compared(what: str, chosen: Sequence[Result], others: Mapping[str, Result]) -> str:
    """Write other results beside those of chosen mixes at the same size."""
    rows = [[what, "stored bits a weight", "divergence", "of chosen mixes at these bits", "ratio"]]
    for name, result in sorted(others.items(), key=lambda item: item[1].bits):
        ours = interpolated(chosen, result.bits)
        compared = ["", ""]
        if ours is not None:
            compared = [f"{ours:.4f}", f"{ours / result.divergence:.2f}"]
        rows.append([name, f"{result.bits:.3f}", f"{result.divergence:.4f}", *compared])
    return markdown(rows)


def main() -> None:
    """Convert, compare and print or update the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the unquantised folder")
    parser.add_argument("work", type=Path, help="where the converted folders are")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--measurement", type=Path, help="of an earlier conversion")
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY",
                        help="libggml-base.so, to compare with llama.cpp's types as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results as SVG")
    parser.add_argument("--update", type=Path, help="the page whose tables are replaced")
    args = parser.parse_args()
    texts = {}
    for item in args.text:
        name, _, path = item.partition("=")
        texts[name] = Path(path).read_text(encoding="utf-8")
    args.work.mkdir(parents=True, exist_ok=True)
    source = Source(args.source)
    expected = log_probabilities(args.source, texts)

    def result(folder: Path, bits: float, measurement: Path | None) -> Result:
        if not folder.exists():
            convert(args.source, folder, bits=bits, measurement=measurement,
                    calibration_rows=args.rows, progress=default_progress())
        found = divergences(expected, log_probabilities(folder, texts))
        one = Result(stored_bits(source, folder), found)
        print(f"{folder.name}: {one.bits:.3f} bits, {one.divergence:.5f}", file=sys.stderr)
        return one

    measurement, chosen = args.measurement, []
    for bits in SIZES:
        folder = args.work / f"{bits:.1f}"
        chosen.append(result(folder, bits, measurement))
        measurement = measurement or folder / FILE_NAME
    uniform = {}
    for width in WIDTHS:
        path = args.work / f"one-width-{width}.json"
        path.write_text(json.dumps(one_width(source, Mix((width,), (GROUP_SIZE,)))))
        uniform[str(width)] = result(args.work / f"one-width-{width}", 8, path)
    llama_cpp = {}
    if args.ggml is not None:
        tokenizer = Tokenizer.from_dir(args.source)
        llama_cpp = file_type_results(source, tokenizer, texts, Ggml(args.ggml), args.rows)
    if args.plot:
        write_picture(chosen, uniform, llama_cpp, args.plot)
    found = tables(chosen, uniform, llama_cpp)
    if args.update:
        update(args.update, found)
    else:
        print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
