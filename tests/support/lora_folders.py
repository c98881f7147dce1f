"""Random LoRA adapters as PEFT saves them, with the weights that merging them gives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# A product of A and B whose effect is as large as that of a weight.
_STRENGTH = 0.7

Shapes = Mapping[str, tuple[int, ...]]


def adapted_shapes(shapes: Shapes, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return module -> [out, in] of the weights in `shapes` whose module ends in a target."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and any(f".{module}".endswith(f".{end}") for end in targets):
            found[module] = (shape[0], shape[1])
    return found


def write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, seed: int = 0, rank: int = 4,
    dtype: torch.dtype = torch.float32, embeddings: Iterable[str] = (), tensors: Any = None,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """Write an adapter of random matrices.

    Args:
        shapes: module -> [out, in] of its weight; [vocab, hidden] for an embedding.
        rank: of every module without an entry in `rank_pattern`.
        embeddings: the modules that are embeddings.
        tensors: changes the tensors by name before they are saved.
        config: values of adapter_config.json besides the usual ones.

    Returns:
        module -> what merging adds to its weight, float64 of the weight's shape.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": "base", "fan_in_fan_out": False, "init_lora_weights": True,
        "lora_alpha": 2 * rank, "lora_dropout": 0.05, "r": rank, "modules_to_save": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False, "use_rslora": False,
    } | config
    saved, deltas = {}, {}
    for name, (rows, columns) in shapes.items():
        own = int(_of_pattern(values["rank_pattern"], name, values["r"]))
        alpha = _of_pattern(values["alpha_pattern"], name, values["lora_alpha"])
        scale = alpha / (math.sqrt(own) if values["use_rslora"] else own)
        size = _STRENGTH / abs(scale or 1) / math.sqrt(columns * own)
        if name in embeddings:
            a = torch.randn(own, rows, generator=generator, dtype=torch.float64)
            b = torch.randn(columns, own, generator=generator, dtype=torch.float64) * size
            a, b = a.to(dtype), b.to(dtype)
            saved |= {f"{PREFIX}{name}.lora_embedding_A": a, f"{PREFIX}{name}.lora_embedding_B": b}
            deltas[name] = scale * (b.double() @ a.double()).t()
            continue
        a = torch.randn(own, columns, generator=generator, dtype=torch.float64).to(dtype)
        b = (torch.randn(rows, own, generator=generator, dtype=torch.float64) * size).to(dtype)
        saved |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        deltas[name] = scale * (b.double() @ a.double())
    if tensors is not None:
        saved = tensors(saved)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({name: value.contiguous() for name, value in saved.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return deltas


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the end of a module's name, after a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def merged(state: Mapping[str, torch.Tensor], *deltas: Mapping[str, torch.Tensor],
           scalings: Iterable[float] = ()) -> dict[str, torch.Tensor]:
    """Return a state dict with adapters merged into its weights, float32."""
    result = {name: value.clone() for name, value in state.items()}
    factors = [*scalings] or [1.0] * len(deltas)
    for delta, factor in zip(deltas, factors, strict=True):
        for module, change in delta.items():
            name = f"{module}.weight"
            result[name] = (result[name].double() + factor * change).float()
    return result
