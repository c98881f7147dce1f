"""The cases of the golden record: what the engine computes, writes, plans and refuses.

    python tests/support/golden_cases.py --check              # names the cases that differ
    python tests/support/golden_cases.py --check --only plan  # those whose name has `plan` in it
    python tests/support/golden_cases.py --write              # record anew: a deliberate change
    python tests/support/golden_cases.py --write --only error

The record is tests/golden/record.json; `golden_record` says what it keeps. On a machine whose
bits it does not have, `--check` compares within bounds and says so, and `--write` adds its bits.
Before a change is recorded, `--check` has to name no other case than the change is about.

Cases are made of the front doors alone (`exl_loader.load`, `plan`, the loaded model's methods,
the command line), and of small models that are written here from fixed seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The settings of the test run: one thread, no variables of the machine, kernels kept apart.
    sys.path[:0] = [
        str(parent) for parent in Path(__file__).resolve().parents[:3]
        if (parent / "conftest.py").is_file() or (parent / "exl_loader").is_dir()
    ]
    import conftest  # noqa: F401

import numpy as np
import pytest
import torch

import exl_loader
from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.utils.errors import ExlLoaderError
from support.broken import edit_config, edit_header, edit_tensors
from support.golden_record import Record, Result, machine, sha256
from support.makers import (
    make_exl2_layer,
    make_gptq_layer,
    quantization_config,
    write_folder,
    write_quantized_model,
)
from support.sparse import LLAMA_2_7B, write_sparse_exl2
from support.tiny import CONFIG, tensor_shapes, write_tiny_model, write_tokenizer

DEMO = Path(exl_loader.__file__).parent / "demo_model"
SHARED_FIXTURES = DEMO.parents[2] / "shared" / "fixtures"
FIXTURES = ("llama-low", "llama-mid")
CARD = "cuda:0"
EMULATED_DEVICES = {"emulated": CARD, "two-cards": f"{CARD},cuda:1", "cpu-card": f"cpu,{CARD}"}
GIB = 1 << 30

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
          "q4": 4e-2}
REFERENCE_BOUNDS = {"fp32": 1e-4, "fp16": 2e-3}


class NotHere(Exception):
    """A case needs files that this machine does not have."""


class Bench:
    """Where cases find their models: each is written when first asked for.

    Args:
        folder: for files; empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, name: str) -> Path:
        """Return the folder of one of `MODELS`, of the demo model, or of a reference model.

        Raises:
            NotHere: the reference models are not on this machine.
        """
        if name == "demo":
            return DEMO
        if name in FIXTURES:
            named = os.environ.get("EXL_LOADER_FIXTURES")
            folder = (Path(named) if named else SHARED_FIXTURES) / name
            if not folder.is_dir():
                raise NotHere(f"no reference models at {folder.parent}; set EXL_LOADER_FIXTURES")
            return folder
        folder = self.folder / name
        if not folder.exists():
            MODELS[name](folder)
        return folder

    @contextlib.contextmanager
    def backend(self, name: str) -> Iterator[str]:
        """Compute on a backend; yields the names of its devices.

        Args:
            name: `cpu`, `reference`, `emulated` (a card), `two-cards` or `cpu-card`.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("EXL_LOADER_REFERENCE", raising=False)
            if name == "reference":
                patch.setenv("EXL_LOADER_REFERENCE", "1")
            if name in EMULATED_DEVICES:
                from support.emulated_cuda import EmulatedCards

                EmulatedCards(2).install(patch)
            yield EMULATED_DEVICES.get(name, "cpu")


# Models

ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"type": "longrope", "short_factor": [1.0 + i / 160 for i in range(16)],
                 "long_factor": [1.0 + i / 4 for i in range(16)]},
}

# Hidden sizes are no multiples of 128 on purpose.
SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}

# Architecture -> its part of the config.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},
    "Mixtral": {"sliding_window": None, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True,
              "sliding_window": 24, "max_window_layers": 1},
    "Qwen3": {"head_dim": 64, "num_attention_heads": 2},
    "Gemma2": {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 24, "sliding_window": 24,
               "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    "Phi3": {"sliding_window": None},
}

# Format -> per architecture, changes of the config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "exl2": {"Llama": {}, "Qwen2": {"rope_scaling": ROPE["yarn"]}},
    "gptq": {"Llama": {"rope_scaling": ROPE["linear"]},
             "Mistral": {"rope_scaling": ROPE["dynamic"], "max_position_embeddings": 32}},
    "dense": {"Llama": {"rope_scaling": ROPE["llama3"], "attention_bias": True,
                        "mlp_bias": True},
              "Mistral": {"torch_dtype": "float32"},
              "Qwen3": {"torch_dtype": "bfloat16"},
              "Phi3": {"rope_scaling": ROPE["longrope"], "max_position_embeddings": 512,
                       "original_max_position_embeddings": 32}},
}

# GPTQ layouts, spread over the architectures.
GPTQ = {
    "Llama": {"bits": 4, "group_size": 32},
    "Mistral": {"bits": 3, "group_size": 32, "act_order": True},
    "Mixtral": {"bits": 4, "group_size": 32},
    "Qwen2": {"bits": 8, "group_size": 32, "v2": True},
    "Qwen3": {"bits": 2, "group_size": 16},
    "Gemma2": {"bits": 4, "group_size": -1},
    "Phi3": {"bits": 4, "group_size": 32, "act_order": True},
}


def write_model(folder: Path, architecture: str, kind: str, seed: int) -> None:
    """Write a random model of an architecture, `kind` being exl2, gptq or dense."""
    config = CONFIG | SIZES | ARCHITECTURES[architecture]
    config |= VARIANTS[kind].get(architecture, {})
    config |= {"architectures": [f"{architecture}ForCausalLM"],
               "model_type": architecture.lower()}
    rng = np.random.default_rng(seed)
    dtype = getattr(torch, config["torch_dtype"])
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(architecture, config).items():
        layer = name.removesuffix(".weight")
        quantised = "_proj" in name or ".experts." in name or (
            kind == "exl2" and layer == "lm_head")
        has_bias = _has_bias(architecture, config, layer)
        if quantised and kind != "dense":
            if kind == "exl2":
                stored, _ = make_exl2_layer(rng, shape[1], shape[0], bias=has_bias)
            else:
                stored, _ = make_gptq_layer(
                    rng, shape[1], shape[0], bias=has_bias, **GPTQ[architecture])
            tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
            continue
        is_norm = len(shape) == 1
        values = rng.normal(size=shape) * (0.2 if is_norm else shape[-1] ** -0.5)
        if is_norm and architecture != "Gemma2":
            values += 1
        tensors[name] = torch.from_numpy(values).to(dtype)
        if has_bias:
            tensors[f"{layer}.bias"] = torch.from_numpy(rng.normal(size=shape[0])).to(dtype)
    if kind == "gptq":
        options = GPTQ[architecture]
        config["quantization_config"] = quantization_config(
            "gptq", bits=options["bits"], group_size=options["group_size"],
            desc_act=options.get("act_order", False),
            checkpoint_format="gptq_v2" if options.get("v2") else "gptq",
        )
    elif kind == "exl2":
        config["quantization_config"] = quantization_config("exl2")
    write_folder(folder, tensors, config, shards=2 if kind == "dense" else 1)
    write_tokenizer(folder, config["vocab_size"])


def _shapes(architecture: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of an architecture, biases left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for name, shape in tensor_shapes(config).items():
        layer, _, last = name.rpartition(".mlp.")
        prefix, _, projection = name.rpartition(".self_attn.")
        if architecture == "Mixtral" and layer:
            block = f"{layer}.block_sparse_moe"
            shapes.setdefault(f"{block}.gate.weight", (config["num_local_experts"], hidden))
            part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[last.split(".")[0]]
            for expert in range(config["num_local_experts"]):
                shapes[f"{block}.experts.{expert}.{part}.weight"] = shape
        elif architecture == "Phi3" and layer and "down_proj" not in name:
            shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        elif architecture == "Phi3" and prefix and "o_proj" not in name:
            heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (heads * config["head_dim"], hidden)
        else:
            shapes[name] = shape
        if architecture == "Qwen3" and projection in ("q_proj.weight", "k_proj.weight"):
            shapes[f"{prefix}.self_attn.{projection[0]}_norm.weight"] = (config["head_dim"],)
        if architecture == "Gemma2" and name.endswith("post_attention_layernorm.weight"):
            stem = name.removesuffix("post_attention_layernorm.weight")
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                shapes[f"{stem}{norm}.weight"] = shape
    return shapes


def _has_bias(architecture: str, config: dict[str, Any], layer: str) -> bool:
    if architecture == "Qwen2":
        return layer.endswith(("q_proj", "k_proj", "v_proj"))
    if ".self_attn." in layer and layer.endswith("_proj"):
        return bool(config.get("attention_bias"))
    return ".mlp." in layer and bool(config.get("mlp_bias"))


def _model_name(architecture: str, kind: str) -> str:
    return f"{architecture.lower()}-{kind}"


MODELS: dict[str, Callable[[Path], Any]] = {
    _model_name(architecture, kind): partial(
        write_model, architecture=architecture, kind=kind, seed=100 * i + j)
    for i, architecture in enumerate(ARCHITECTURES)
    for j, kind in enumerate(VARIANTS)
}
RANDOM_MODELS = tuple(MODELS)
# Headers alone: it can be planned, not loaded.
MODELS["llama-2-7b"] = partial(write_sparse_exl2, **LLAMA_2_7B)


# Logits

def sample(rows: np.ndarray) -> np.ndarray:
    """Take the first, the middle and the last row at some columns."""
    columns = np.linspace(0, rows.shape[1] - 1, SAMPLE_COLUMNS).astype(int)
    return rows[[0, len(rows) // 2, -1]][:, columns]


def logits_case(bench: Bench, model: str, backend: str, cache_type: str) -> Result:
    """Logits of a prompt, as a whole and in chunks, of steps behind it, and a greedy text."""
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
            behind = loaded.prompt_logits([*ids, *answer]).numpy()[len(ids) - 1 : -1]
            texts = _together(loaded, [ids, ids[5:]], new_tokens)
        with exl_loader.load(folder, **options | {"chunk_size": 29}) as loaded:
            chunks = loaded.prompt_logits(ids).numpy()
    result.bits = {
        "whole": sha256(whole), "chunks": sha256(chunks), "steps": sha256(steps),
        "greedy": answer, "together": texts,
    }
    result.near = {"whole": sample(whole), "chunks": sample(chunks), "steps": sample(steps)}
    result.robust = {"greedy": (answer, _count_robust(behind, result.bound))}
    return result


def _split(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Give options with which the first of two devices has no room for all layers."""
    first, _ = options["device"].split(",")
    alone = exl_loader.plan(folder, **options | {"device": first, "chunk_size": 256})
    return {"chunk_size": 256, "gpu_split": [(alone.total_bytes - 1) / GIB, 1]}


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


CACHE_TYPES = tuple(BOUNDS)

# Every cache type, format and kind of layer on the emulated card, a second each.
EMULATED = (("llama-exl2", "q4"), ("llama-gptq", "q8"), ("qwen2-gptq", "fp16"),
            ("mixtral-exl2", "q8_q4"), ("gemma2-dense", "fp32"), ("qwen3-exl2", "q6"),
            ("phi3-dense", "q4_q8"))
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

def command(*words: str) -> tuple[int, str]:
    """Run `python -m exl_loader` in this process; returns its exit code and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["exl_loader", *words])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_module("exl_loader", run_name="__main__", alter_sys=False)
            except SystemExit as end:
                code = end.code
                return code if isinstance(code, int) else int(code is not None), printed.getvalue()
    return 0, printed.getvalue()


def command_case(bench: Bench) -> Result:
    """What subcommands print, and their exit codes."""
    result = Result()
    text = bench.folder / "text.txt"
    text.write_text(LONG_PROMPT)
    with bench.backend("cpu"):
        code, said = command("plan", str(DEMO), "--ctx-size", "700", "--cache-type", "q6",
                             "--device", "cpu", "--json")
        made = json.loads(said)
        result.exact["plan"] = [code, made["total_bytes"], made["architecture"], sorted(made)]
        code, said = command("generate", str(DEMO), "--ctx-size", "512", "--device", "cpu",
                             "--prompt", PROMPT, "--temperature", "0.8", "--seed", "3",
                             "--max-new-tokens", "30")
        result.exact["generate"] = code
        result.bits["generate"] = said
        code, said = command("eval", str(DEMO), "--text", str(text), "--ctx-size", "256",
                             "--tokens", "300", "--cache-type", "q8,q4", "--json")
        made = json.loads(said)
        result.exact["eval"] = [code, sorted(made)]
        result.bits["eval"] = {
            key: value for key, value in made.items() if key not in ("seconds", "model", "text")
        }
        for words in (["plan", str(bench.folder / "nothing")], ["plan", "--no-such-option"],
                      ["generate", str(DEMO), "--device", "gpu"], ["no-such-command"], []):
            shown = " ".join(words).replace(str(bench.folder), "").replace(str(DEMO), "DEMO")
            result.exact[f"exit code of: {shown}"] = command(*words)[0]
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


# Plans

def plan_options(bench: Bench, model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give options of a plan by name.

    Capacities are pretended and limits are set below them, so that nothing depends on what
    this machine has or has free.
    """
    cpu = {"device": "cpu", "vram": "1000GiB", "memory_limit": "20GiB"}
    card = {"device": CARD, "vram": "1000GiB", "memory_limit": "20GiB"}
    yield "cpu", cpu | {"ctx_size": 2048}
    yield "cpu q4 batch", cpu | {"ctx_size": 700, "cache_type": "q4", "chunk_size": 128,
                                 "max_batch_size": 4}
    yield "cpu default", cpu | {"cache_type": "q8"}
    yield "cpu auto", cpu | {"ctx_size": "auto", "cache_type": "q6", "alpha_value": 2.0}
    yield "card", card | {"ctx_size": 4096, "cache_type": "q8_q4"}
    yield "card fp32", card | {"ctx_size": 300, "cache_type": "fp32", "max_batch_size": 1,
                               "chunk_size": 64}
    for name, first, whole in (("two cards", CARD, card), ("cpu and card", "cpu", cpu)):
        both = exl_loader.plan(
            bench.model(model), ctx_size=1024, cache_type="q4_q8", chunk_size=256, **whole
        )
        yield name, {
            "device": [first, "cuda:1"], "vram": ["1000GiB", "1000GiB"], "chunk_size": 256,
            "gpu_split": [(both.total_bytes - 1) / GIB, 20], "ctx_size": 1024,
            "cache_type": "q4_q8",
        }
    draft = bench.model("llama-gptq" if model != "llama-gptq" else "llama-exl2")
    yield "draft", card | {"ctx_size": 1000, "cache_type": "q6", "model_draft": draft,
                           "ctx_size_draft": 600}


def plan_case(bench: Bench, model: str) -> Result:
    """A model's reservation under several options, and its whole table."""
    result = Result()
    for name, options in plan_options(bench, model):
        result.exact[name] = _plan(bench.model(model), options)
    return result


def _plan(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Plan; the table's hash is given with and without names, so that a rename shows as one."""
    with planned(folder, LoadOptions(**options)) as model:
        reservation = model.reservation
        names, layout = [], []
        for segment in model.segments:
            layout.append([segment.device, segment.name, segment.nbytes])
            for placement in segment.placements:
                spec = placement.spec
                layout.append([spec.dtype, list(spec.shape), spec.nbytes, placement.offset])
                names.append(spec.name)
        by_device = {
            device.device: [device.first_layer, device.end_layer, device.weights_bytes,
                            device.cache_bytes, device.workspace_bytes, device.draft_bytes]
            for device in reservation.devices
        }
        return {
            "devices": by_device, "total": reservation.total_bytes,
            "ctx_size": reservation.ctx_size, "layout": sha256(layout), "names": sha256(names),
            "by cache type": list(reservation.bytes_by_cache_type.values()),
            "largest": list(reservation.largest_ctx_size.values()),
            "fits": reservation.fits,
        }


# Error types

def edited(kind: str, edit: Callable[[Path], Any], **options: Any) -> Callable[[Path], Any]:
    """Load a copy of a model after an edit of its folder."""

    def attempt(scratch: Path) -> None:
        folder = shutil.copytree(scratch.parent / "originals" / kind, scratch / "model")
        edit(folder)
        exl_loader.load(folder, **{"ctx_size": 300, "device": "cpu"} | options).unload()

    return attempt


def loaded_with(**options: Any) -> Callable[[Path], Any]:
    """Load a good model with options that may be bad."""
    return edited("dense", lambda folder: None, **options)


def planned_with(**options: Any) -> Callable[[Path], Any]:
    """Plan a good model with options that may be bad."""

    def attempt(scratch: Path) -> None:
        exl_loader.plan(scratch.parent / "originals" / "dense", **options)

    return attempt


def asked(call: Callable[[Any], Any], unload: bool = False) -> Callable[[Path], Any]:
    """Ask a good model for something that may be bad."""

    def attempt(scratch: Path) -> None:
        folder = scratch.parent / "originals" / "dense"
        with exl_loader.load(folder, ctx_size=300, device="cpu") as loaded:
            if unload:
                loaded.unload()
            call(loaded)

    return attempt


def generated(**settings: Any) -> Callable[[Path], Any]:
    """Generate with settings that may be bad."""
    return asked(lambda loaded: list(loaded.generate([5, 6], settings, max_new_tokens=1)))


DENSE, EXL2 = "model.safetensors", "output.safetensors"
LAYER = "model__layers__0__self_attn__q_proj"


def config_with(**changes: Any) -> Callable[[Path], Any]:
    return edited("dense", lambda folder: edit_config(folder, **changes))


def exl2_with(tensor: str, change: Callable[[Any], Any] | None) -> Callable[[Path], Any]:
    return edited(
        "exl2", lambda folder: edit_tensors(folder, EXL2, **{f"{LAYER}__{tensor}": change}))


def gptq_with(tensor: str, change: Callable[[Any], Any] | None) -> Callable[[Path], Any]:
    return edited(
        "gptq", lambda folder: edit_tensors(folder, DENSE, **{f"{LAYER}__{tensor}": change}))


def header_with(**changes: Any) -> Callable[[Path], Any]:
    return edited("dense", lambda folder: edit_header(
        folder / DENSE, lambda header: header["lm_head.weight"].update(changes)))


def _truncate(folder: Path, name: str, keep: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])


def _pickle(folder: Path) -> None:
    (folder / DENSE).rename(folder / "pytorch_model.bin")


def _first(values: Any, value: int) -> Any:
    values[0] = value
    return values


ERRORS: dict[str, Callable[[Path], Any]] = {
    "no folder": lambda scratch: exl_loader.load(scratch / "nothing"),
    "folder is a number": lambda scratch: exl_loader.load(5),  # type: ignore[arg-type]
    "no config": edited("dense", lambda folder: (folder / "config.json").unlink()),
    "config is no JSON": edited("dense", lambda f: (f / "config.json").write_text("{")),
    "config is a list": edited("dense", lambda f: (f / "config.json").write_text("[1]")),
    "unknown architecture": config_with(architectures=["BertForMaskedLM"], model_type="bert"),
    "hidden_size 0": config_with(hidden_size=0),
    "hidden_size text": config_with(hidden_size="64"),
    "hidden_size missing": config_with(hidden_size=None),
    "hidden_size of another model": config_with(hidden_size=96),
    "layers of another model": config_with(num_hidden_layers=3),
    "key heads do not divide": config_with(num_key_value_heads=7),
    "rope factor negative": config_with(rope_scaling={"rope_type": "linear", "factor": -2}),
    "rope type unknown": config_with(rope_scaling={"rope_type": "spiral", "factor": 2}),
    "activation unknown": config_with(hidden_act="swirl"),
    "quantisation unknown": config_with(quantization_config={"quant_method": "awq", "bits": 4}),
    "quantisation is a list": config_with(quantization_config=[1]),
    "no weights": edited("dense", lambda folder: (folder / DENSE).unlink()),
    "pickle": edited("dense", _pickle),
    "weights cut off": edited("dense", lambda folder: _truncate(folder, DENSE, -1)),
    "header cut off": edited("dense", lambda folder: _truncate(folder, DENSE, 100)),
    "weights empty": edited("dense", lambda folder: _truncate(folder, DENSE, 0)),
    "header offsets too far": header_with(data_offsets=[0, 10**15]),
    "header offsets reversed": header_with(data_offsets=[100, 0]),
    "header shape huge": header_with(shape=[10**9, 10**9, 10**9]),
    "header shape wrong": header_with(shape=[64, 65]),
    "header dtype unknown": header_with(dtype="F7"),
    "tensor missing": edited("dense", lambda folder: edit_tensors(
        folder, DENSE, model__layers__1__mlp__up_proj__weight=None)),
    "tensor shape wrong": edited("dense", lambda folder: edit_tensors(
        folder, DENSE, model__norm__weight=lambda tensor: tensor[:-1])),
    "tensor dtype wrong": edited("dense", lambda folder: edit_tensors(
        folder, DENSE, model__norm__weight=lambda tensor: tensor.int())),
    "tensor not finite": edited("dense", lambda folder: edit_tensors(
        folder, DENSE, model__norm__weight=lambda tensor: tensor * float("nan"))),
    "exl2 bits unknown": exl2_with("q_groups", lambda groups: _first(groups, 7)),
    "exl2 groups reversed": exl2_with("q_groups", lambda groups: groups.flip(0)),
    "exl2 no permutation": exl2_with("q_invperm", lambda order: order * 0),
    "exl2 scales not finite": exl2_with("q_scale_max", lambda scales: scales * float("nan")),
    "exl2 weight cut": exl2_with("q_weight", lambda weight: weight[:-1]),
    "exl2 scale missing": exl2_with("q_scale", None),
    "gptq group index too large": gptq_with("g_idx", lambda index: index + 1000),
    "gptq weight cut": gptq_with("qweight", lambda weight: weight[:-1]),
    "gptq zeros missing": gptq_with("qzeros", None),
    "tokenizer is no JSON": edited("dense", lambda f: (f / "tokenizer.json").write_text("{")),
    "load option unknown": loaded_with(cachetype="q4"),
    "cache type unknown": loaded_with(cache_type="q5"),
    "context 0": loaded_with(ctx_size=0),
    "context huge": loaded_with(ctx_size=10**15),
    "context text": loaded_with(ctx_size="large"),
    "context does not fit": loaded_with(ctx_size=1 << 20, memory_limit="64MiB"),
    "chunk below batch": loaded_with(chunk_size=2, max_batch_size=4),
    "device unknown": loaded_with(device="gpu"),
    "device twice": loaded_with(device="cpu,cpu"),
    "memory limit unreadable": loaded_with(memory_limit="much"),
    "alpha 0": loaded_with(alpha_value=0),
    "draft_max 0": loaded_with(draft_max=0),
    "draft is not there": loaded_with(model_draft="nothing"),
    "plan option unknown": planned_with(ctxsize=5),
    "plan with splits for other devices": planned_with(device=CARD, gpu_split="1,2"),
    "plan with a negative split": planned_with(device=CARD, gpu_split="-1"),
    "plan with unreadable vram": planned_with(device=CARD, vram="big"),
    "prompt too long": asked(lambda loaded: list(loaded.generate([5] * 301))),
    "logits of too much": asked(lambda loaded: loaded.prompt_logits([5] * 301)),
    "logits of nothing": asked(lambda loaded: loaded.prompt_logits([])),
    "token too large": asked(lambda loaded: loaded.prompt_logits([288])),
    "token negative": asked(lambda loaded: list(loaded.generate_ids([-1]))),
    "token is text": asked(lambda loaded: loaded.next_logits(["x"])),
    "decoding text": asked(lambda loaded: loaded.decode("ab")),
    "no chat template": asked(lambda loaded: loaded.apply_chat_template(
        [{"role": "user", "content": "x"}])),
    "setting unknown": generated(temprature=1),
    "setting of another engine": generated(penalty_alpha=0.5),
    "temperature negative": generated(temperature=-1),
    "temperature text": generated(temperature="hot"),
    "top_p over 1": generated(top_p=1.5),
    "top_k negative": generated(top_k=-1),
    "mirostat 1": generated(mirostat_mode=1),
    "seed too large": generated(seed=1 << 63),
    "stop string empty": generated(stop_strings=[""]),
    "sampler unknown": generated(sampler_priority=["luck"]),
    "bias of no token": generated(logit_bias={"x": 1}),
    "two grammars": generated(grammar_string=GBNF, json_schema=SCHEMA),
    "grammar unreadable": generated(grammar_string="root ::= ("),
    "schema unreadable": generated(json_schema="{"),
    "after unload": asked(lambda loaded: loaded.prompt_logits([5]), unload=True),
    "a good load": loaded_with(),
    "a good plan": planned_with(device="cpu"),
    "a good request": generated(temperature=0.5),
}


def errors_case(bench: Bench) -> Result:
    """The type of what is raised for each broken input; none for those that are good."""
    originals = bench.folder / "originals"
    if not originals.exists():
        write_quantized_model(originals / "exl2", "exl2", seed=5, tokenizer=True)
        write_quantized_model(originals / "gptq", "gptq", seed=5, tokenizer=True)
        write_tiny_model(originals / "dense", seed=5)
    result = Result()
    scratch = bench.folder / "scratch"
    with bench.backend("reference"):
        for name, attempt in ERRORS.items():
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                attempt(scratch)
                result.exact[name] = "none"
            except ExlLoaderError as error:
                result.exact[name] = type(error).__name__
            except Exception as error:
                result.exact[name] = f"not this package's own: {type(error).__name__}"
    return result


CASES: dict[str, Callable[[Bench], Result]] = {
    "errors": errors_case,
    "tokens": tokens_case,
    **{f"plan {model}": partial(plan_case, model=model) for model in (*MODELS, "demo", *FIXTURES)},
    **{
        f"logits {model} {backend} {cache_type}": partial(
            logits_case, model=model, backend=backend, cache_type=cache_type)
        for model, backend, cache_type in logits_cases()
    },
    "texts fp16": partial(texts_case, cache_type="fp16"),
    "texts q4": partial(texts_case, cache_type="q4"),
    "draft of itself": partial(draft_case, model="demo", draft="demo"),
    "draft of another": partial(draft_case, model="llama-exl2", draft="mistral-gptq"),
    "command line": command_case,
    "convert": convert_case,
}


def main() -> int:
    """Check or write the record; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Check or write the golden record.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="name the cases that differ")
    action.add_argument("--write", action="store_true", help="record the cases anew")
    action.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their name")
    parser.add_argument("--times", action="store_true", help="print the CPU time of each case")
    parser.add_argument(
        "--march", metavar="NAME", help="compile for this processor, as on another machine")
    args = parser.parse_args()
    names = [name for name in CASES if args.only in name]
    if args.list:
        print("\n".join(names))
        return 0
    torch.set_num_threads(1)
    # As tests/conftest.py does: a failed load looks through everything that may be garbage.
    gc.collect()
    gc.freeze()
    if args.march:
        os.environ["EXL_LOADER_MARCH"] = args.march
    logging.getLogger("exl_loader").setLevel(logging.ERROR)
    record = Record()
    known = record.knows_this_machine
    differing = 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            start = time.process_time()
            try:
                result = CASES[name](bench)
            except NotHere as missing:
                print(f"{name}: left out, {missing}")
                continue
            except Exception as error:
                traceback.print_exc()
                print(f"{name}: failed with {type(error).__name__}: {error}")
                differing += 1
                continue
            if args.times:
                print(f"{time.process_time() - start:6.2f} s  {name}")
            differences = record.differences(name, result)
            differing += bool(differences)
            if args.write:
                record.put(name, result)
            for difference in differences[:8]:
                print(f"{name}: {difference[:300]}")
            if len(differences) > 8:
                print(f"{name}: and {len(differences) - 8} more differences")
    if args.write:
        if not args.only:
            record.keep_only(set(CASES))
        record.write()
    if not known:
        print(f"The record has no bits of this machine, so they were not compared: {machine()}")
    print(f"{len(names)} cases in {time.perf_counter() - began:.1f} s, {differing} differ")
    return int(bool(differing) and not args.write)


if __name__ == "__main__":
    raise SystemExit(main())
