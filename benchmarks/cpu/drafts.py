"""Measure drafts: `python -m benchmarks.cpu.drafts build/smollm2 [--json]`.

Three sides take turns on the same texts: no drafts, drafts of full length in every pass, and
drafts as long as pays, which is how the engine runs. The texts differ in how often guesses are
right: code that repeats itself and prose with prompt lookup, one and eight at once; and a model
with a draft model that is four times as small, at rising temperatures. Reported are the tokens a
second of each side, the ratio of the last side to the better one of the others (the median of
rounds), and the share of drafted tokens that were right. Verified as well: each text is the same
on all sides.

The model with a draft model is the given one with further layers that add nothing, so the given
one guesses its tokens rightly where the likeliest token is drawn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import REPO

sys.path.insert(0, str(REPO / "tests"))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import exl_loader  # noqa: E402
from exl_loader.generation.draft_pacing import DraftPacing, PassSeconds  # noqa: E402
from support.full_drafts import FullDrafts  # noqa: E402

CODE = """
    def read_{0}(self, path):
        \"\"\"Read the {0} of a file.\"\"\"
        with open(path, encoding="utf-8") as file:
            values = [line.strip() for line in file if line.strip()]
        self.{0} = values
        return values
"""
CODE_PROMPT = "class Reader:\n" + "".join(
    CODE.format(name) for name in ("names", "lines", "words", "titles", "labels")
)
PROSE_PROMPT = (
    "The harbour was empty when the ship came in, and nobody on the quay could say why. "
)
LOOKUP = 4
DRAFT_MAX = 4


class NoDrafts(DraftPacing):
    """Drafts nothing."""

    def lengths(self, offers, num_jobs, num_rows, rows_left):
        return [0] * len(offers)

    def better(self, first, second, num_jobs, num_rows):
        return first


SIDES: dict[str, Callable[..., DraftPacing]] = {
    "none": NoDrafts, "always": FullDrafts, "paced": DraftPacing,
}


@dataclass
class Side:
    """What one side has measured of passes, which the others do not see."""

    passes: PassSeconds
    steps: PassSeconds
    pacing: DraftPacing

    @classmethod
    def new(cls, name: str) -> Side:
        passes, steps = PassSeconds(), PassSeconds()
        return cls(passes, steps, SIDES[name](passes, steps))

    def use(self, model: Any) -> None:
        drafts = model._generator._scheduler.drafts
        drafts.passes, drafts.pacing = self.passes, self.pacing
        if drafts.draft_model is not None:
            drafts.draft_model.seconds = self.steps


def run(model: Any, prompts: list[str], settings: dict[str, Any]) -> tuple[float, list[Any]]:
    """Return tokens a second, and the generations."""
    generations = [
        model.generate_ids(prompt, settings | {"seed": seed})
        for seed, prompt in enumerate(prompts)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(list, generations))
    seconds = time.perf_counter() - began
    return sum(one.stats.new_tokens for one in generations) / seconds, generations


def measure(
    model: Any, name: str, prompts: list[str], settings: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Measure one kind of text; the sides' order turns from round to round."""
    sides = {side: Side.new(side) for side in SIDES}
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    right = drafted = 0
    order = list(SIDES)
    for turn in range(rounds + 1):
        texts = []
        for side in order:
            sides[side].use(model)
            rate, generations = run(model, prompts, settings)
            texts.append([one.token_ids for one in generations])
            if turn:
                rates[side].append(rate)
            if turn and side == "always":
                right += sum(one.stats.accepted_tokens for one in generations)
                drafted += sum(one.stats.drafted_tokens for one in generations)
        assert texts[0] == texts[1] == texts[2], "drafts changed a text"
        order = order[1:] + order[:1]
    ratios = [
        paced / max(none, always)
        for none, always, paced in zip(*(rates[side] for side in SIDES), strict=True)
    ]
    medians = {side: statistics.median(found) for side, found in rates.items()}
    return {
        "text": name, "requests": len(prompts), **medians,
        "ratio_of_medians": medians["paced"] / max(medians["none"], medians["always"]),
        "ratio": statistics.median(ratios), "right": right / max(drafted, 1),
    }


def write_deeper(source: Path, folder: Path, times: int) -> Path:
    """Write a Llama with `times` as many layers as the source, whose further ones add nothing."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    layers = config["num_hidden_layers"]
    for layer in range(layers, times * layers):
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensor = tensors[name]
            copied = torch.zeros_like(tensor) if adds else tensor.clone()
            tensors[name.replace("layers.0.", f"layers.{layer}.")] = copied
    folder.mkdir()
    config["num_hidden_layers"] = times * layers
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an unquantised Llama in one file")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=4, help="layers of the model by the draft's")
    parser.add_argument("--cache-type", default="fp16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = {"max_new_tokens": args.tokens, "ban_eos_token": True}
    found = []

    def note(*case: Any) -> None:
        found.append(measure(*case, args.rounds))
        if not args.json:
            print("{text}, {requests} at once: {none:.1f} tokens/s without drafts, {always:.1f} "
                  "with full ones, {paced:.1f} paced; paced {ratio:.2f} times the better one "
                  "({ratio_of_medians:.2f} of medians); {right:.0%} right".format(**found[-1]),
                  flush=True)

    options = {"ctx_size": 1024, "cache_size": 8192, "cache_type": args.cache_type,
               "max_batch_size": 8}
    with exl_loader.load(args.model, **options) as model:
        lookup = base | {"prompt_lookup_num_tokens": LOOKUP}
        for count in (1, 8):
            note(model, "code, prompt lookup", [CODE_PROMPT] * count,
                 lookup | {"temperature": 0})
            note(model, "prose, prompt lookup", [PROSE_PROMPT] * count,
                 lookup | {"temperature": 1.2})
    with tempfile.TemporaryDirectory() as directory:
        deeper = write_deeper(args.model, Path(directory) / "model", args.times)
        with exl_loader.load(
            deeper, model_draft=args.model, draft_max=DRAFT_MAX, **options
        ) as model:
            for count, temperatures in ((1, (0, 0.7, 3)), (8, (0, 3))):
                for temperature in temperatures:
                    note(model, f"prose, draft model, temperature {temperature}",
                         [PROSE_PROMPT] * count, base | {"temperature": temperature})
    if args.json:
        print(json.dumps({"tokens": args.tokens, "rounds": args.rounds, "runs": found}))


if __name__ == "__main__":
    main()
