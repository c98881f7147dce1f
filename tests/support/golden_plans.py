"""Cases of the golden record about what the engine plans and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exl_loader
from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.utils.errors import ExlLoaderError
from support.broken import edit_config, edit_header, edit_tensors
from support.golden_models import CARD, GIB, Bench
from support.golden_outputs import GBNF, SCHEMA
from support.golden_record import Result, sha256
from support.makers import write_quantized_model
from support.tiny import write_tiny_model

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
    yield "cpu q3", cpu | {"ctx_size": 700, "cache_type": "q3"}
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
            "gpu_split": [(both.devices[0].total_bytes - 1) / GIB, 20], "ctx_size": 1024,
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
            for tensor in segment.offsets:
                spec = tensor.spec
                layout.append([spec.dtype, list(spec.shape), spec.nbytes, tensor.offset])
                names.append(spec.name)
        by_device = {
            device.device: [device.first_layer, device.end_layer, device.weights_bytes,
                            device.cache_bytes, device.workspace_bytes, device.draft_bytes,
                            *([device.embedding_bytes] if device.embedding_bytes else [])]
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
    "rope differs by layer type": config_with(rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "activation unknown": config_with(hidden_act="swirl"),
    "quantisation unknown": config_with(quantization_config={"quant_method": "awq", "bits": 4}),
    "quantisation is a list": config_with(quantization_config=[1]),
    "quantisation file is a list": edited(
        "gptq", lambda folder: (folder / "quantize_config.json").write_text("[1]")),
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
