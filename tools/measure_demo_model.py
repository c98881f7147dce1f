"""Measure held-out perplexity and tokens of model folders with the project's own engine.

    python tools/measure_demo_model.py DIR [DIR ...]

Every folder is measured on the same text, the held-out files of `demo_corpus.py`, cut into
windows of `--context` ids, each window on its own. Prints one JSON object a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from demo_corpus import collect
from demo_tokenizer import encode_documents

# A checkout works without being installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

PROMPT = "class Queue:\n    def __init__(self"


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, context: int, cache_type: str, prompt: str) -> dict:
    """Measure one folder.

    Args:
        folder: a model folder with a sentencepiece tokenizer.
        context: ids in a window.
        cache_type: as `exl_loader.load` takes it.
        prompt: what the sample continues.

    Returns:
        Perplexity, tokens predicted, bytes of the folder, seconds and a sample.
    """
    import exl_loader

    tokenizer = (folder / "tokenizer.model").read_bytes()
    ids = encode_documents(tokenizer, (file.text for file in collect().held_out))
    total, count, started = 0.0, 0, time.monotonic()
    with exl_loader.load(folder, ctx_size=context, cache_type=cache_type) as model:
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context + 1]
            logits = model.prompt_logits(window[:-1]).float()
            targets = torch.tensor(window[1:])
            total += F.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
        seconds = time.monotonic() - started
        settings = {"max_new_tokens": 160, "temperature": 0.6, "top_p": 0.9, "seed": 1}
        sample = prompt + "".join(model.generate(prompt, settings))
    return {
        "folder": str(folder),
        "perplexity": round(math.exp(total / count), 4),
        "tokens": count,
        "context": context,
        "cache_type": cache_type,
        "folder_bytes": folder_bytes(folder),
        "seconds": round(seconds, 1),
        "sample": sample,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cache-type", default="fp16")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args()
    for folder in args.folders:
        result = measure(folder, args.context, args.cache_type, args.prompt)
        print(json.dumps(result, indent=2), flush=True)


if __name__ == "__main__":
    main()
