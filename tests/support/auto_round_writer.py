"""Quantise a small random Llama with auto-round, in several of its formats.

    python auto_round_writer.py FOLDER

Each variant gets a folder of its own name with the model, `dequantised.pt` (the weights that
auto-round itself measured, bfloat16) and `logits.pt` (of these weights, float32, for `IDS`).
It runs in a process of its own because auto-round patches transformers on import.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

IDS = [1, 5, 9, 200, 17, 3, 44, 250]
MIXED = {
    "model.layers.1.mlp.down_proj": {"bits": 8},
    "model.layers.0.self_attn.k_proj": {"bits": 16},
}


class Variant(NamedTuple):
    bits: int
    sym: bool
    group_size: int
    format: str  # as auto-round's option is called
    layers: dict | None = None
    zero_points_of_0: bool = False


# The layouts that subtract 1 cannot hold a zero point of 0: auto-round 0.16 writes 1 instead.
VARIANTS = {
    "less-1": Variant(4, False, 32, "auto_round:auto_gptq"),
    "symmetric-mixed": Variant(4, True, 128, "auto_round", MIXED),
    "as-they-are": Variant(2, False, 64, "auto_round:gptqmodel", MIXED, True),
    "autogptq-3-bits": Variant(3, False, 32, "auto_gptq", MIXED),
    "along-columns": Variant(4, False, 32, "auto_round", None, True),
    "own-packing": Variant(4, False, 16, "auto_round", MIXED, True),
    "symmetric-8-bits": Variant(8, True, 128, "auto_round"),
}


def main(root: Path) -> None:
    import copy
    import gc

    import torch
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # auto-round collects garbage a hundred times, and each time would go through all objects of
    # the imported modules.
    gc.collect()
    gc.freeze()
    vocabulary = models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="t0")
    llama = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=256,
    )
    for name, variant in VARIANTS.items():
        model = LlamaForCausalLM(llama).eval()
        if variant.zero_points_of_0:
            with torch.no_grad():
                for layer in model.model.layers:
                    rows = layer.mlp.up_proj.weight
                    rows[::5] = rows[::5].abs()

        def rounding(model, variant=variant):
            return AutoRound(
                model, tokenizer, bits=variant.bits, sym=variant.sym,
                group_size=variant.group_size, layer_config=variant.layers, iters=0,
                disable_opt_rtn=True, device_map="cpu",
            )

        # Rounding to the nearest has the same result twice. Saving after `quantize` would not
        # do: auto-round 0.16 then fails to pack along the columns.
        rounding(copy.deepcopy(model)).quantize_and_save(str(root / "made"), format=variant.format)
        (config_path,) = (root / "made").rglob("config.json")
        config_path.parent.rename(root / name)
        shutil.rmtree(root / "made", ignore_errors=True)
        dequantised, _ = rounding(model).quantize()
        weights = {key: value.clone() for key, value in dequantised.state_dict().items()}
        with torch.no_grad():
            logits = dequantised.float()(torch.tensor([IDS])).logits[0]
        torch.save(weights, root / name / "dequantised.pt")
        torch.save(logits, root / name / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
