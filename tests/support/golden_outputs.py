"""Cases of the golden record about what the engine computes and writes.

Logits, texts, token ids, what the command line prints, and converted files.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exl_loader
from support.full_drafts import draft_fully
from support.golden_models import DEMO, FIXTURES, GIB, RANDOM_MODELS, Bench
from support.golden_record import Result, sha256
from support.tiny import write_tiny_model

# Over a page of the cache (256 tokens) and any window (24) and original length (32).
IDS = [3 + (7 * i * i + 11 * i) % 280 for i in range(262)]
SHORT_IDS = IDS[:35]
STEPS = 4
EOS = 2
SAMPLE_COLUMNS = 32

# Largest relative error between two machines. Compiled kernels round activations to integers, at
# places that another order of summation moves; a code of a quantised cache that flips is one
# step of so many bits. The reference computes in float32. Measured between kernels for AVX2 and
# for AVX-512 with VNNI: 0. Attention scores scaled by 2 % too much: 0.02 to 0.06.
BOUNDS = {"fp32": 5e-3, "fp16": 5e-3, "q8": 1e-2, "q6": 2e-2, "q8_q4": 4e-2, "q4_q8": 4e-2,
          "q4": 4e-2, "q3": 8e-2}
REFERENCE_BOUNDS = {"fp32": 1e-4, "fp16": 2e-3}


def sample(rows: np.ndarray) -> np.ndarray:
    """Take the first, the middle and the last row at some columns."""
    columns = np.linspace(0, rows.shape[1] - 1, SAMPLE_COLUMNS).astype(int)
    return rows[[0, len(rows) // 2, -1]][:, columns]


def logits_case(bench: Bench, model: str, backend: str, cache_type: str) -> Result:
    """Record logits of a prompt, in one pass and in chunks, of decode steps, and a greedy text."""
    folder = bench.model(model)
    ids, new_tokens = (IDS, 12) if backend == "cpu" else (SHORT_IDS, 6)
    bounds = {**BOUNDS, **REFERENCE_BOUNDS} if backend == "reference" else BOUNDS
    result = Result(bound=bounds[cache_type])
    with bench.backend(backend) as device:
        options = {"ctx_size": 512, "cache_type": cache_type, "device": device,
                   "max_batch_size": 2}
        if "," in device:
            options |= _split(folder, options)
        with exl_loader.load(folder, **options) as loaded:
            result.exact["bytes"] = {
                used.device: used.total_bytes for used in loaded.reservation.devices}
            result.exact["allocated"] = loaded.allocated_bytes()
            whole = loaded.prompt_logits(ids).numpy()
            steps = np.stack([
                loaded.next_logits(ids[:count]).numpy()
                for count in range(len(ids) - STEPS, len(ids) + 1)
            ])
            answer = list(loaded.generate_ids(
                ids, temperature=0, max_new_tokens=new_tokens, ban_eos_token=True))
            answer_logits = loaded.prompt_logits([*ids, *answer]).numpy()[len(ids) - 1 : -1]
            texts = _together(loaded, [ids, ids[5:]], new_tokens)
        with exl_loader.load(folder, **options | {"chunk_size": 29}) as loaded:
            chunks = loaded.prompt_logits(ids).numpy()
    result.bits = {
        "whole": sha256(whole), "chunks": sha256(chunks), "steps": sha256(steps),
        "greedy": answer, "together": texts,
    }
    result.near = {"whole": sample(whole), "chunks": sample(chunks), "steps": sample(steps)}
    result.robust = {"greedy": (answer, _count_robust(answer_logits, result.bound))}
    return result


def _split(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Give options with which the first of two devices has no room for all layers."""
    first, _ = options["device"].split(",")
    alone = exl_loader.plan(folder, **options | {"device": first, "chunk_size": 256})
    return {"chunk_size": 256, "gpu_split": [(alone.devices[0].total_bytes - 1) / GIB, 1]}


def _together(loaded: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Generate at the same time: one greedy text, and one sampled."""
    settings = [{"temperature": 0}, {"temperature": 0.8, "seed": 5}]
    more = {"max_new_tokens": new_tokens, "ban_eos_token": True}
    generations = [
        loaded.generate_ids(prompt, chosen, **more)
        for prompt, chosen in zip(prompts, settings, strict=True)
    ]
    with ThreadPoolExecutor(len(generations)) as threads:
        return list(threads.map(list, generations))


def _count_robust(rows: np.ndarray, bound: float) -> int:
    """Count the greedy tokens up to the first that leads by no more than machines differ."""
    rows = rows.copy()
    size = rows.std(axis=1)
    rows[:, EOS] = -np.inf
    first, second = np.sort(rows, axis=1)[:, :-3:-1].T
    leads = first - second > 6 * bound * size
    return len(leads) if leads.all() else int(np.argmin(leads))


# q3 has cases of its own below.
CACHE_TYPES = tuple(name for name in BOUNDS if name != "q3")

# Every cache type, format and kind of layer on the emulated card, a second each.
EMULATED = (("llama-exl2", "q4"), ("llama-gptq", "q8"), ("qwen2-gptq", "fp16"),
            ("mixtral-exl2", "q8_q4"), ("gemma2-dense", "fp32"), ("qwen3-exl2", "q6"),
            ("phi3-dense", "q4_q8"), ("llama-gptq", "q3"))
SPLIT = (("mistral-dense", "two-cards", "q8"), ("llama-exl2", "cpu-card", "fp16"))


def logits_cases() -> Iterator[tuple[str, str, str]]:
    """Give (model, backend, cache type): all models, all cache types on CPU and reference."""
    for i, model in enumerate(RANDOM_MODELS):
        yield model, "cpu", CACHE_TYPES[i % len(CACHE_TYPES)]
        yield model, "cpu", CACHE_TYPES[(i + 1 + i // 7) % len(CACHE_TYPES)]
        # Its codec of quantised caches takes seconds: every type once.
        plain = ("fp32", "fp16")[i % 2]
        yield model, "reference", plain if i % 3 else CACHE_TYPES[i // 3 % len(CACHE_TYPES)]
    yield "demo", "cpu", "fp16"
    yield "demo", "cpu", "q4"
    yield "demo", "cpu", "q3"
    yield "llama-exl2", "cpu", "q3"
    yield "llama-exl2", "reference", "q3"
    for model, cache_type in EMULATED:
        yield model, "emulated", cache_type
    yield from SPLIT
    for model in FIXTURES:
        yield model, "cpu", "fp16"
        yield model, "cpu", "q6"


# Texts

PROMPT = "import os\n\n\ndef read_lines(path):\n"
LONG_PROMPT = "".join(f"value_{i} = read_lines(path_{i})[{i}]\n" for i in range(24))
GBNF = 'root ::= "x = " [0-9]+ (" + " [0-9]+)* "\\n"'
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
                                           "count": {"type": "integer"}},
          "required": ["name", "count"], "additionalProperties": False}

# Every sampler at least once, alone and among others.
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "temperature": {"temperature": 1.4},
    "top": {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "typical": {"typical_p": 0.7, "tfs": 0.95, "top_a": 0.1},
    "cutoffs": {"epsilon_cutoff": 9, "eta_cutoff": 20, "top_n_sigma": 2.5},
    "dynamic temperature": {"dynamic_temperature": True, "dynatemp_low": 0.5,
                            "dynatemp_high": 1.8, "dynatemp_exponent": 1.2},
    "smoothing": {"smoothing_factor": 0.4, "smoothing_curve": 1.5},
    "temperature last": {"temperature": 1.6, "min_p": 0.1, "temperature_last": True},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2,
                  "repetition_penalty_range": 64},
    "encoder penalty": {"encoder_repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "dry": {"dry_multiplier": 0.8, "dry_allowed_length": 1, "temperature": 0.7},
    "xtc": {"xtc_probability": 0.6, "xtc_threshold": 0.08},
    "mirostat": {"mirostat_mode": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2},
    "adaptive": {"adaptive_target": 0.3, "adaptive_decay": 0.8},
    "order": {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "repetition_penalty": 1.1,
              "sampler_priority": ["top_k", "top_p", "temperature", "repetition_penalty"]},
    "bans": {"custom_token_bans": [13, 29], "logit_bias": {15: 2.5, 31: -4}},
    "guidance": {"guidance_scale": 1.6, "negative_prompt": "class A:\n    pass\n"},
    "logprobs": {"logprobs": 3, "top_k": 50},
    "stop string": {"stop_strings": ["\n\n", "return"]},
    "stop id": {"stop_token_ids": [13]},
    "lookup": {"prompt_lookup_num_tokens": 4, "temperature": 0},
    "sampled lookup": {"prompt_lookup_num_tokens": 4, "temperature": 0.8},
    "grammar": {"grammar_string": GBNF},
    "schema": {"json_schema": SCHEMA},
}


def texts_case(bench: Bench, cache_type: str) -> Result:
    """Texts of the demo model: every sampler, and what generations share."""
    result = Result()
    with bench.backend("cpu") as device, exl_loader.load(
        DEMO, ctx_size=768, cache_type=cache_type, device=device
    ) as loaded:
        draft_fully(loaded)
        for name, settings in SAMPLERS.items():
            result.bits[name] = _text(loaded, PROMPT, settings)
        result.bits["long"] = _text(loaded, LONG_PROMPT, {"top_p": 0.9})
        result.bits["long again"] = _text(loaded, LONG_PROMPT, {"top_p": 0.9})
        result.bits["longer"] = _text(loaded, LONG_PROMPT + "print(", {"top_p": 0.9})
        ids = loaded.encode(LONG_PROMPT)
        rows = loaded.prompt_logprobs(ids, 2)
        result.bits["prompt logprobs"] = sha256([repr(row) for row in rows])
        result.bits["context ends"] = _text(
            loaded, loaded.encode(PROMPT) * 46, {"temperature": 0, "max_new_tokens": 400})
    return result


def draft_case(bench: Bench, model: str, draft: str) -> Result:
    """Texts with a draft model."""
    result = Result()
    with bench.backend("cpu") as device, exl_loader.load(
        bench.model(model), ctx_size=512, model_draft=bench.model(draft), draft_max=3,
        device=device,
    ) as loaded:
        draft_fully(loaded)
        result.exact["bytes"] = loaded.allocated_bytes()
        for name in ("greedy", "top", "penalties", "logprobs"):
            result.bits[name] = _text(loaded, PROMPT, SAMPLERS[name])
    return result


def _text(loaded: Any, prompt: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Generate, and return what a host sees of it."""
    chosen = {"seed": 7, "max_new_tokens": 40} | settings
    with loaded.generate(prompt, chosen) as generation:
        text = "".join(generation)
    stats = generation.stats
    found = {
        "text": text, "ids": sha256(generation.token_ids), "reason": generation.finish_reason,
        "tokens": [stats.prompt_tokens, stats.new_tokens, stats.reused_tokens,
                   stats.accepted_tokens],
    }
    if generation.logprobs:
        found["logprobs"] = sha256([repr(row) for row in generation.logprobs])
    return found


def tokens_case(bench: Bench) -> Result:
    """Ids of texts, texts of ids, and conversations as prompts."""
    texts = [PROMPT, "", " ", "  two  spaces\t\n", "\u00e9\u4e2d\u6587 \U0001f600", "<s>x</s>",
             "a" * 300]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "{{ 1 }} <s>"}]
    folder = bench.folder / "templated"
    if not folder.exists():
        shutil.copytree(bench.model("llama-exl2"), folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    result = Result()
    with bench.backend("reference"):
        for name, path in (("spm", DEMO), ("hf", folder)):
            with exl_loader.load(path, ctx_size=512, device="cpu") as loaded:
                ids = [loaded.encode(text) for text in texts]
                raw = [loaded.encode(text, add_bos=False, special=False) for text in texts]
                result.exact[f"{name} ids"] = sha256(ids)
                result.exact[f"{name} raw ids"] = sha256(raw)
                result.exact[f"{name} texts"] = [loaded.decode(one) for one in ids]
                if name == "hf":
                    result.exact["chat"] = loaded.apply_chat_template(chat)
                    result.exact["chat ids"] = sha256(loaded.chat_ids(chat))
                    result.exact["continued"] = loaded.apply_chat_template(
                        chat[:3], add_generation_prompt=False)
    return result


# The command line

def command(*arguments: str) -> tuple[int, str]:
    """Run `python -m exl_loader` in this process; returns its exit code and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["exl_loader", *arguments])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_module("exl_loader", run_name="__main__", alter_sys=False)
            except SystemExit as end:
                code = end.code
                return code if isinstance(code, int) else int(code is not None), printed.getvalue()
    return 0, printed.getvalue()


def command_case(bench: Bench) -> Result:
    """Record what subcommands print, and their exit codes."""
    result = Result()
    text = bench.folder / "text.txt"
    text.write_text(LONG_PROMPT)
    with bench.backend("cpu"):
        code, output = command("plan", str(DEMO), "--ctx-size", "700", "--cache-type", "q6",
                             "--device", "cpu", "--json")
        made = json.loads(output)
        result.exact["plan"] = [code, made["total_bytes"], made["architecture"], sorted(made)]
        code, output = command("generate", str(DEMO), "--ctx-size", "512", "--device", "cpu",
                             "--prompt", PROMPT, "--temperature", "0.8", "--seed", "3",
                             "--max-new-tokens", "30")
        result.exact["generate"] = code
        result.bits["generate"] = output
        code, output = command("eval", str(DEMO), "--text", str(text), "--ctx-size", "256",
                             "--tokens", "300", "--cache-type", "q8,q4", "--json")
        made = json.loads(output)
        result.exact["eval"] = [code, sorted(made)]
        result.bits["eval"] = {
            key: value for key, value in made.items() if key not in ("seconds", "model", "texts")
        }
        for arguments in (["plan", str(bench.folder / "nothing")], ["plan", "--no-such-option"],
                          ["generate", str(DEMO), "--device", "gpu"], ["no-such-command"], []):
            shown = " ".join(arguments).replace(str(bench.folder), "").replace(str(DEMO), "DEMO")
            result.exact[f"exit code of: {shown}"] = command(*arguments)[0]
    return result


def convert_case(bench: Bench) -> Result:
    """The bytes of a converted model."""
    source, target = bench.folder / "source", bench.folder / "converted"
    shutil.rmtree(target, ignore_errors=True)
    if not source.exists():
        write_tiny_model(source, seed=77, num_hidden_layers=1)
    text = bench.folder / "calibration.txt"
    text.write_text(LONG_PROMPT * 4)
    result = Result()
    with bench.backend("cpu"):
        code, _ = command(
            "convert", str(source), str(target), "--bits", "4", "--calibration", str(text),
            "--calibration-rows", "2", "--calibration-row-len", "64", "--json")
    result.exact = {"exit code": code, "files": sorted(path.name for path in target.iterdir())}
    for path in target.glob("*.safetensors"):
        result.bits[path.name] = sha256(path.read_bytes())
    return result
