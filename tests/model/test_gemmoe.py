"""GemMoE, which transformers lacks: Gemma with the experts of Mixtral in place of its MLP.

The definition is transformers' Gemma, whose MLPs are replaced here by a plain loop over experts.
"""

from __future__ import annotations

import json
import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from exl_loader.backends import get_ops  # noqa: E402
from exl_loader.backends.reference.ops import ReferenceOps  # noqa: E402
from support.hf_models import COMMON, expected_logits, relative_error  # noqa: E402
from support.model_builder import build_model, run_chunks  # noqa: E402

EXPERTS, TOP_K = 5, 2


class Mixture(torch.nn.Module):
    """The sum of a row's experts, weighted by the softmax of their logits."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()

        def matrices(*shape: int) -> torch.nn.Parameter:
            values = torch.randn(EXPERTS, *shape) * 1.2 * shape[-1] ** -0.5
            return torch.nn.Parameter(values)

        self.gate = torch.nn.Parameter(torch.randn(EXPERTS, hidden_size) * hidden_size**-0.5)
        self.w1, self.w3 = matrices(size, hidden_size), matrices(size, hidden_size)
        self.w2 = matrices(hidden_size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in x.flatten(0, -2):
            values, chosen = torch.topk(self.gate @ row, TOP_K)
            out = torch.zeros_like(row)
            for weight, expert in zip(values.softmax(0), chosen.tolist(), strict=True):
                gated = torch.nn.functional.gelu(self.w1[expert] @ row, approximate="tanh")
                out += weight * (self.w2[expert] @ (gated * (self.w3[expert] @ row)))
            rows.append(out)
        return torch.stack(rows).view_as(x)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the block's tensors by their names in a folder."""
        found = {f"{prefix}gate.weight": self.gate.data}
        for name in ("w1", "w2", "w3"):
            for expert, weight in enumerate(getattr(self, name).data):
                found[f"{prefix}experts.{expert}.{name}.weight"] = weight.clone()
        return found


def make_gemmoe(folder, seed: int):
    """Write a random model, and return its definition."""
    torch.manual_seed(seed)
    config = transformers.GemmaConfig(**COMMON, head_dim=64, attn_implementation="eager")
    model = transformers.GemmaForCausalLM(config).eval()
    tensors = {}
    with torch.no_grad():
        for value in model.parameters():
            spread = 0.3 if value.dim() == 1 else 1.2 * value.shape[-1] ** -0.5
            value.copy_(torch.randn_like(value) * spread)
        for index, layer in enumerate(model.model.layers):
            layer.mlp = Mixture(config.hidden_size, config.intermediate_size)
            tensors |= layer.mlp.tensors(f"model.layers.{index}.block_sparse_moe.")
    for name, value in model.state_dict().items():
        if ".mlp." not in name and name != "lm_head.weight":
            tensors[name] = value.clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    values = config.to_dict() | {
        "architectures": ["GemmoeForCausalLM"], "model_type": "gemmoe",
        "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return model


@pytest.mark.parametrize("seed", [1, None])
def test_gemmoe_equals_its_definition(seed, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little") if seed is None else seed
    definition = make_gemmoe(tmp_path / "m", seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(331, (30,), generator=generator).tolist()
    expected = expected_logits(definition, ids)
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    whole = run_chunks(model, cache, ids, len(ids))
    assert relative_error(whole, expected) <= 2e-5, seed
    assert relative_error(run_chunks(model, cache, ids, 7), whole) <= 1e-6, seed
    compiled, cache = build_model(tmp_path / "m", get_ops(), cache_type="fp16")
    assert relative_error(run_chunks(compiled, cache, ids, len(ids)), expected) <= 2e-2, seed
