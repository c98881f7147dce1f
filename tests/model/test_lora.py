"""Adapters on models of every shape, against the same models with the adapters merged.

Bounds: the reference computes W and B @ A with one rounding each, so that what is left is the
rounding of float32 sums (measured: 4e-6). The issue asks for 1e-3.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint.adapter import Adapter
from exl_loader.utils.errors import InvalidCheckpoint
from support.defined_models import Definition
from support.emulated_cuda import emulated_ops, install
from support.hf_models import MODELS, expected_logits, make_model, relative_error
from support.lora_folders import (
    ATTENTION,
    MLP,
    adapted_shapes,
    merged,
    write_adapter,
)
from support.makers import write_folder, write_quantized_model
from support.model_builder import build_model, run_chunks, split, together
from support.tiny import CONFIG

BOUND = 1e-5
# Activations of 8 bits in front of quantised matrices, here and in the model without adapters.
COMPILED_BOUND = 2e-2
ROOM_BYTES = 4 << 20
EVERYTHING = (*ATTENTION, *MLP, "qkv_proj", "gate_up_proj", "c_attn", "c_fc", "c_proj",
              "lm_head", "embed_tokens")
# Parts of the names of modules that are not of the language model.
OF_IMAGES = ("vision", "visual", "multi_modal")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def card(monkeypatch):
    """The operations of an emulated `cuda:0`."""
    ops = emulated_ops()
    install(monkeypatch, ops)
    return ops


def random_ids(count=20, vocab_size=280):
    return [random.randrange(vocab_size) for _ in range(count)]


def with_room(folder, ops, device="cpu", **options):
    devices = [device] if isinstance(device, str) else device.devices
    rooms = {name: torch.empty(ROOM_BYTES, dtype=torch.uint8) for name in devices}
    return build_model(folder, ops, device=device, rooms=rooms, **options)


def load_lora(model, folder, scaling=1.0):
    with Adapter.open(folder) as adapter:
        model.load_lora(adapter, scaling)


def weights_of(folder):
    """Return name -> tensor of all of a folder's files."""
    return {name: tensor for path in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def turned(name, by_module):
    """Turn what there is of each module from [out, in] to [in, out] where a model stores that."""
    if name != "gpt2":
        return by_module
    return {
        module: value if module == "lm_head"
        else value.t() if isinstance(value, torch.Tensor) else value[::-1]
        for module, value in by_module.items()
    }


def embeddings_in(shapes):
    return [name for name in shapes if name.endswith("embed_tokens")]


def untied(hf):
    """Untie a model's head: an adapter changes the head or the embedding, as in PEFT's forward.

    Returns:
        its weights, copied.
    """
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings()
    if head.weight is embedding:
        head.weight = torch.nn.Parameter(embedding.detach().clone())
    return {key: value.clone() for key, value in hf.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name, tmp_path):
    """An adapter on every linear layer that the model's own names have."""
    seed = int.from_bytes(os.urandom(3), "little")
    hf = make_model(name, seed, tmp_path / "m")
    if isinstance(hf, Definition):
        delta = adapt_definition(hf, tmp_path / "a", seed)
        hf.tensors = merged(hf.tensors, delta)
    else:
        adapt(hf, tmp_path / "a", seed)
    model, cache = with_room(tmp_path / "m", ReferenceOps())
    load_lora(model, tmp_path / "a")
    ids = random_ids()
    error = relative_error(run_chunks(model, cache, ids, 7), expected_logits(hf, ids))
    assert error <= BOUND, seed


def adapt_definition(definition, folder, seed):
    """Write an adapter of a model of `defined_models`, and return what it adds to the weights."""
    shapes = {key.removesuffix(".weight"): tuple(value.shape)
              for key, value in definition.tensors.items() if value.dim() == 2}
    embeddings = [definition.embedding]
    if definition.head not in shapes:
        # The definition has one matrix for both.
        del shapes[embeddings.pop()]
    if definition.config.get("norm_head"):
        del shapes[definition.head]  # no linear layer, because its rows are divided by their length
    return write_adapter(folder, shapes, seed=seed, embeddings=embeddings)


def adapt(hf, folder, seed):
    """Write an adapter of a model of transformers, and merge it into the model."""
    state, embedding, conv1d, shapes = untied(hf), hf.get_input_embeddings(), [], {}
    for module_name, module in hf.named_modules():
        if any(word in module_name for word in OF_IMAGES):
            continue
        if isinstance(module, torch.nn.Linear) or module is embedding:
            shapes[module_name] = tuple(module.weight.shape)
        elif type(module).__name__ == "Conv1D":
            # Its weight is [in, out].
            shapes[module_name] = tuple(module.weight.t().shape)
            conv1d.append(module_name)
    embeddings = [key for key, module in hf.named_modules() if module is embedding]
    delta = write_adapter(folder, shapes, seed=seed, embeddings=embeddings)
    for module_name in conv1d:
        delta[module_name] = delta[module_name].t()
    hf.load_state_dict(merged(state, delta))


@pytest.mark.parametrize("name", [
    "llama", "llama-biases", "llama-tied", "mistral-full", "qwen2", "qwen3", "gemma2", "phi3",
    "gpt2", "bigcode", "starcoder2",
])
def test_logits_equal_merged_weights(name, tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    rng = random.Random(seed)
    hf = make_model(name, seed, tmp_path / "m")
    state = untied(hf)
    every = adapted_shapes({key: value.shape for key, value in state.items()}, EVERYTHING)
    every = turned(name, every)
    model, cache = with_room(tmp_path / "m", ReferenceOps())
    ids = random_ids()
    before = run_chunks(model, cache, ids, len(ids))
    deltas, scalings = [], []
    for index in range(3):
        shapes = {key: every[key] for key in rng.sample(sorted(every), rng.randint(1, len(every)))}
        scalings.append(rng.choice([1.0, 0.5, -0.7, 1.3]))
        deltas.append(turned(name, write_adapter(
            tmp_path / str(index), shapes, seed=seed + index, rank=rng.randint(1, 20),
            dtype=rng.choice(DTYPES), lora_alpha=rng.choice([1, 16, 7.5]),
            use_rslora=rng.random() < 0.5, embeddings=embeddings_in(shapes),
        )))
        load_lora(model, tmp_path / str(index), scalings[-1])
        hf.load_state_dict(merged(state, *deltas, scalings=scalings))
        expected = expected_logits(hf, ids)
        assert relative_error(run_chunks(model, cache, ids, 7), expected) <= BOUND, seed
    assert relative_error(before, expected) > 0.01, seed
    model.unload_loras()
    assert torch.equal(run_chunks(model, cache, ids, len(ids)), before)


def write_merged(folder, state, *deltas, **options):
    write_folder(folder, merged(state, *deltas, **options), CONFIG | {"torch_dtype": "float32"})


@pytest.mark.parametrize("format", ["exl2", "gptq", "gptq with act-order"])
def test_quantised_models(format, tmp_path, card):
    order = {"act_order": True} if format.endswith("order") else {}
    state = write_quantized_model(tmp_path / "m", format[:4], seed=4, **order)
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, EVERYTHING)
    embeddings = embeddings_in(shapes)
    one = write_adapter(tmp_path / "one", shapes, seed=1, rank=8, embeddings=embeddings)
    two = write_adapter(tmp_path / "two", shapes, seed=2, rank=1, embeddings=embeddings,
                        dtype=torch.float16)
    write_merged(tmp_path / "merged", state, one, two, scalings=[1.0, 0.4])
    ids = random_ids()
    whole, cache = build_model(tmp_path / "merged", ReferenceOps())
    expected = run_chunks(whole, cache, ids, len(ids))
    for ops, bound in ((ReferenceOps(), BOUND), (get_ops(), COMPILED_BOUND),
                       (card, COMPILED_BOUND)):
        device = "cuda:0" if ops.name == "cuda" else "cpu"
        model, cache = with_room(tmp_path / "m", ops, device, sequences=2)
        before = run_chunks(model, cache, ids, len(ids))
        load_lora(model, tmp_path / "one")
        load_lora(model, tmp_path / "two", 0.4)
        actual = run_chunks(model, cache, ids, len(ids))
        assert relative_error(actual, expected) <= bound, ops.name
        assert relative_error(before, expected) > 0.1
        # The bits of a row depend neither on its chunk nor on rows beside it.
        alone = together(model, cache, [ids], steps=3)[:, 0]
        assert torch.equal(together(model, cache, [ids, random_ids()], steps=3)[:, 0], alone)
        model.unload_loras()
        assert torch.equal(run_chunks(model, cache, ids, len(ids)), before)


def test_a_fused_adapter_on_a_folder_that_has_the_parts(tmp_path):
    """EXL2 folders of Phi-3 have q_proj, k_proj and v_proj, and adapters have qkv_proj."""
    hf = make_model("phi3-longrope", 3, tmp_path / "m")
    state = weights_of(tmp_path / "m")
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, EVERYTHING[7:9])
    assert len(shapes) == 2 * hf.config.num_hidden_layers
    delta = write_adapter(tmp_path / "a", shapes, rank=6)
    hf.load_state_dict(merged(hf.state_dict(), delta))
    ids = random_ids()
    model, cache = with_room(tmp_path / "m", ReferenceOps())
    load_lora(model, tmp_path / "a")
    actual = run_chunks(model, cache, ids, len(ids))
    assert relative_error(actual, expected_logits(hf, ids)) <= BOUND

    config = hf.config
    head_dim = config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    apart = {}
    for name, tensor in state.items():
        if name.endswith("qkv_proj.weight"):
            q, k, v = tensor.split([config.hidden_size, kv, kv])
            parts = {"q_proj": q, "k_proj": k, "v_proj": v}
        elif name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up}
        else:
            apart[name] = tensor
            continue
        prefix = name.removesuffix(".weight").rpartition(".")[0]
        apart |= {f"{prefix}.{key}.weight": part.contiguous() for key, part in parts.items()}
    for path in (tmp_path / "m").glob("*.safetensors"):
        path.unlink()
    save_file(apart, tmp_path / "m" / "model.safetensors")
    model, cache = with_room(tmp_path / "m", ReferenceOps())
    load_lora(model, tmp_path / "a")
    assert torch.equal(run_chunks(model, cache, ids, len(ids)), actual)


@pytest.mark.parametrize("kind", ["reference", "cpu", "card"])
def test_experts(kind, tmp_path, card):
    """Adapters on experts and their router, where a card otherwise chooses experts by itself."""
    make_model("mixtral", 3, tmp_path / "m")
    state = weights_of(tmp_path / "m")
    shapes = {key: value.shape for key, value in state.items()}
    chosen = adapted_shapes(shapes, ["experts.1.w1", "experts.3.w2", "experts.0.w3",
                                     "experts.4.w1", "block_sparse_moe.gate", "o_proj"])
    assert len(chosen) == 6 * 3
    delta = write_adapter(tmp_path / "a", chosen, rank=5)
    save = tmp_path / "merged"
    save.mkdir()
    (save / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    save_file(merged(state, delta), save / "model.safetensors")
    ops = {"reference": ReferenceOps, "cpu": get_ops, "card": lambda: card}[kind]()
    device = "cuda:0" if kind == "card" else "cpu"
    ids = random_ids()
    whole, cache = build_model(save, ops, device=device)
    expected = run_chunks(whole, cache, ids, 3)
    model, cache = with_room(tmp_path / "m", ops, device)
    before = run_chunks(model, cache, ids, 3)
    load_lora(model, tmp_path / "a")
    assert relative_error(run_chunks(model, cache, ids, 3), expected) <= 1e-3
    assert relative_error(before, expected) > 0.01
    model.unload_loras()
    assert torch.equal(run_chunks(model, cache, ids, 3), before)


@pytest.mark.parametrize("targets", [("k_proj", "up_proj"), (*ATTENTION, *MLP)])
def test_launches_that_a_card_joins(targets, tmp_path, card):
    """A card joins norms, gates and products of one row of a wide model."""
    config = CONFIG | {"hidden_size": 544, "num_hidden_layers": 1}
    state = write_quantized_model(tmp_path / "m", "exl2", seed=6, config=config)
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, targets)
    delta = write_adapter(tmp_path / "a", shapes, rank=5)
    write_folder(tmp_path / "merged", merged(state, delta), config | {"torch_dtype": "float32"})
    ids = random_ids(6)
    whole, cache = build_model(tmp_path / "merged", ReferenceOps())
    expected = run_chunks(whole, cache, ids, len(ids))
    model, cache = with_room(tmp_path / "m", card, "cuda:0")
    load_lora(model, tmp_path / "a")
    in_chunks = run_chunks(model, cache, ids, len(ids))
    assert relative_error(in_chunks, expected) <= COMPILED_BOUND
    assert relative_error(run_chunks(model, cache, ids, 1), in_chunks) <= 1e-4


def test_a_model_without_adapters_records_no_more_calls(tmp_path, card):
    state = write_quantized_model(tmp_path / "m", "exl2", seed=5)
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, ["q_proj"])
    write_adapter(tmp_path / "a", shapes)
    ids = random_ids(8)

    def calls(model, cache):
        run_chunks(model, cache, ids, 1)
        return [len(stage.calls) for step in model._local.steps.values() for stage in step.stages]

    bare = calls(*build_model(tmp_path / "m", card, device="cuda:0"))
    model, cache = with_room(tmp_path / "m", card, "cuda:0")
    assert calls(model, cache) == bare
    load_lora(model, tmp_path / "a")
    assert all(more > few for more, few in zip(calls(model, cache), bare, strict=True))
    model.unload_loras()
    assert calls(model, cache) == bare


def test_layers_on_several_devices(tmp_path):
    state = write_quantized_model(tmp_path / "m", "exl2", seed=5)
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, EVERYTHING)
    write_adapter(tmp_path / "a", shapes, embeddings=embeddings_in(shapes))
    ids, logits = random_ids(), []
    for device in ("cpu", split(1, 1)):
        model, cache = with_room(tmp_path / "m", ReferenceOps(), device)
        load_lora(model, tmp_path / "a")
        logits.append(run_chunks(model, cache, ids, len(ids)))
    assert torch.equal(*logits)


def test_names_of_wrapped_models(tmp_path):
    state = write_quantized_model(tmp_path / "m", "exl2", seed=5)
    shapes = adapted_shapes({key: value.shape for key, value in state.items()}, ["v_proj"])
    ids, logits = random_ids(), []
    for prefix in ("model.", "", "model.language_model.", "language_model.model."):
        renamed = {prefix + name.removeprefix("model."): shape for name, shape in shapes.items()}
        write_adapter(tmp_path / f"a-{prefix}", renamed)
        model, cache = with_room(tmp_path / "m", ReferenceOps())
        load_lora(model, tmp_path / f"a-{prefix}")
        logits.append(run_chunks(model, cache, ids, len(ids)))
    assert all(torch.equal(logits[0], other) for other in logits[1:])


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(("shapes", "options", "words"), [
    ({"model.layers.2.self_attn.q_proj": (64, 64)}, {}, ["layers.2", "2 layers", "no such"]),
    ({"model.layers.1.attn.q_proj": (64, 64)}, {}, ["attn.q_proj"]),
    ({"vision_tower.layers.1.self_attn.q_proj": (64, 64)}, {}, ["vision_tower"]),
    ({Q: (64, 32)}, {}, [Q, "64", "[4, 32]"]), ({Q: (96, 64)}, {}, [Q, "[96, 4]"]),
    ({Q: (64, 64)}, {"rank": 65}, ["rank", "64", "65"]),
    ({"model.embed_tokens": (288, 64)}, {}, ["lora_embedding"]),
    ({"lm_head": (288, 64)}, {"embeddings": ["lm_head"]}, ["lora_embedding_A"]),
    ({Q: (64, 64)}, {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
     ["Qwen2ForCausalLM", "LlamaForCausalLM"]),
])
def test_adapters_of_another_model(shapes, options, words, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    write_adapter(tmp_path / "a", shapes, **options)
    model, _ = with_room(tmp_path / "m", ReferenceOps())
    with pytest.raises(InvalidCheckpoint) as caught:
        load_lora(model, tmp_path / "a")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert model.loras == ()
