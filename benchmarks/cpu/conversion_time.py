"""Measure how long the first layers of a conversion take.

    OMP_NUM_THREADS=1 EXL_LOADER_THREADS=1 python -m benchmarks.cpu.conversion_time FOLDER

FOLDER gets a random model of the 1.1 B geometry of `benchmarks.cpu.speed`, with the layers that are
measured only, unless it has a model already. Reported are seconds by the clock and of processors;
with one thread none waits for another one, which would count as time of processors. Later layers
take more measuring: the texts of two more blocks run through each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

from benchmarks import REPO
from benchmarks.cpu.llama_shapes import layer_linears
from benchmarks.cpu.speed_models import GEOMETRY
from exl_loader.convert import conversion
from exl_loader.convert.activations import LayerRunner
from exl_loader.convert.mixes import Mix
from exl_loader.convert.source import Source
from exl_loader.utils.progress import NullProgress

Result = TypeVar("Result")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# What a conversion to about 4.5 bits a weight chooses most.
MIX = Mix((5, 4), (32, 32), (0.25, 0.75))


def write_model(folder: Path, config: dict) -> None:
    """Write a random unquantised Llama with the shipped model's tokenizer."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).half()

    hidden, vocab_size = config["hidden_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": random(vocab_size, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden).half()
        for part, k, n in layer_linears(config):
            tensors[f"{prefix}{part}.weight"] = random(n, k)
    tensors["model.norm.weight"] = torch.ones(hidden).half()
    tensors["lm_head.weight"] = random(vocab_size, hidden)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(REPO / "exl_loader" / "demo_model" / name, folder / name)


def timed(name: str, function: Callable[[], Result]) -> Result:
    """Call a function, and print its seconds by the clock and of processors."""
    start = time.perf_counter(), time.process_time()
    result = function()
    clock, processors = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"{name}: {clock:.1f} s by the clock, {processors:.1f} s of processors", flush=True)
    return result


def measure(folder: Path, layers: int, rows: int) -> None:
    """Measure and quantise the first layers and the head."""
    source = Source(folder)
    settings = conversion.ConvertSettings(
        bits=4.5, head_bits=6, calibration=None, num_rows=rows, row_len=512
    )
    pipeline = conversion._Pipeline(folder, source, settings, NullProgress())
    runner = LayerRunner(source, len(pipeline.rows[0]))
    states = {conversion._SOURCE: runner.embed(pipeline.measured_rows)}

    def nothing(steps: int) -> None:
        return

    for index in range(layers):
        timed(f"measuring layer {index}", lambda index=index: pipeline._measure_layer(
            runner, index, states, {}, {}, nothing))
    hidden = runner.embed(pipeline.rows)
    chosen = dict.fromkeys(pipeline.specs, MIX)
    for index in range(layers):
        timed(f"quantising layer {index}", lambda index=index: pipeline._quantize_layer(
            runner, index, hidden, chosen, nothing))
    source.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    args = parser.parse_args()
    if not args.folder.exists():
        write_model(args.folder, {**GEOMETRY, "num_hidden_layers": args.layers})
    measure(args.folder, args.layers, args.rows)


if __name__ == "__main__":
    main()
