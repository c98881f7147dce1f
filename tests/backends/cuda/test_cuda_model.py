"""Whole models on a card: emulated on the CPU, and a real one where there is one.

Small random models of every format go through the table of bytes, packing on the device, the
recorded and captured steps and the copies of inputs and logits, and are held against the CPU
engine, against transformers, and against themselves fed in another way.
"""

from __future__ import annotations

import pytest
import torch

import exl_loader
from exl_loader.backends.cuda import fusion
from exl_loader.backends.cuda.cpu_access import CAPTURE_TRIES
from support import in_threads
from support.emulated_cuda import DEVICE, emulated_ops, install
from support.hf_models import make_model
from support.makers import make_exl2_layer, quantization_config, write_quantized_model
from support.model_builder import build_model, run_chunks
from support.tiny import write_tiny_model

CTX = 512
IDS = [5, 9, 100, 7, 3, 20, 33, 250, 17, 18, 19, 200]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ban_eos_token": True}
# float16 tensor cores in attention, and activations of 15 bits whose scales belong to other
# groups of channels than on the CPU.
BOUND = 2e-3


@pytest.fixture(params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def card(request, monkeypatch):
    """The operations of `cuda:0`."""
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from exl_loader.backends import get_ops

        return get_ops(DEVICE)
    ops = emulated_ops()
    install(monkeypatch, ops)
    return ops


@pytest.fixture
def emulated(monkeypatch):
    """The operations of an emulated `cuda:0`, which count captures and launches."""
    ops = emulated_ops()
    install(monkeypatch, ops)
    return ops


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def run(folder, device, ids=IDS, **options):
    """Return a text's logits and its greedy continuation, and check memory against the plan."""
    total = exl_loader.plan(folder, ctx_size=CTX, device=device, **options).total_bytes
    with exl_loader.load(folder, ctx_size=CTX, device=device, **options) as model:
        assert model.allocated_bytes() == total == model.reservation.total_bytes
        logits = model.prompt_logits(ids)
        answer = list(model.generate_ids(ids, GREEDY))
        assert model.allocated_bytes() == total
    assert model.allocated_bytes() == 0
    return logits, answer


def assert_like_the_cpu(folder, **options):
    expected, _ = run(folder, "cpu", **options)
    logits, answer = run(folder, DEVICE, **options)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert relative_error(logits, expected) <= BOUND
    assert len(answer) == GREEDY["max_new_tokens"]
    # Step-by-step generation agrees with the logits of the whole text.
    whole, _ = run(folder, DEVICE, ids=[*IDS, *answer], **options)
    rows = whole[len(IDS) - 1 : -1].clone()
    rows[:, 2] = -torch.inf  # the end token, which GREEDY bans
    chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (rows.max(dim=1).values - chosen).max() <= 0.01 * expected.std()


# Rows that a block normalises; narrower ones have another kernel.
WIDE = {"hidden_size": 576, "intermediate_size": 640}

FORMATS = {
    "exl2": ("exl2", {}),
    "gptq": ("gptq", {}),
    "gptq-act-order": ("gptq", {"act_order": True, "group_size": 32, "bits": 3}),
    "gptq-8": ("gptq", {"bits": 8, "v2": True, "bias": True}),
    "gptq-group-16": ("gptq", {"group_size": 16, "act_order": True}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_models(card, tmp_path, name):
    kind, options = FORMATS[name]
    write_quantized_model(tmp_path / "m", kind, **options)
    assert_like_the_cpu(tmp_path / "m")


@pytest.mark.parametrize("tied", [False, True])
def test_unquantized_models(card, tmp_path, tied):
    write_tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    assert_like_the_cpu(tmp_path / "m", chunk_size=40, max_batch_size=3)


@pytest.mark.parametrize("cache_type", ["q8", "q6", "q4", "q3", "q8_q4", "fp32"])
def test_every_cache_type(card, tmp_path, cache_type):
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    assert_like_the_cpu(tmp_path / "m", cache_type=cache_type)


def write_mixture(folder, seed=0):
    """Write a small Mixtral whose experts are EXL2 layers and whose rest is not quantised."""
    import numpy as np

    from support.tiny import CONFIG

    config = CONFIG | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    }
    write_tiny_model(folder, seed=seed, tokenizer=False, **config)
    from safetensors.torch import load_file

    from support.makers import write_folder

    tensors = load_file(folder / "model.safetensors")
    rng, hidden, inner = np.random.default_rng(seed), config["hidden_size"], 96
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("gate_proj", "up_proj", "down_proj"):
            del tensors[f"{prefix}.mlp.{name}.weight"]
        block = f"{prefix}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.from_numpy(rng.normal(size=(5, hidden))).half()
        for expert in range(5):
            for name, shape in (("w1", (hidden, inner)), ("w3", (hidden, inner)),
                                ("w2", (inner, hidden))):
                stored, _ = make_exl2_layer(rng, *shape)
                tensors |= {f"{block}.experts.{expert}.{name}.{k}": t for k, t in stored.items()}
    config["quantization_config"] = quantization_config("exl2")
    write_folder(folder, tensors, config)


def test_experts_chosen_on_the_device(card, tmp_path):
    write_mixture(tmp_path / "m")
    assert_like_the_cpu(tmp_path / "m")


def test_experts_of_few_rows_give_the_bits_of_many(emulated, tmp_path):
    """Chosen on the card (one row, 2 pairs) and on the CPU (9 rows)."""
    write_mixture(tmp_path / "m")
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE, sequences=9)
    sequences = [cache.acquire(20) for _ in range(9)]
    for ids in (IDS[:9], IDS[3:]):
        on_cpu = model.forward([(s, [i]) for s, i in zip(sequences, ids, strict=True)]).clone()
        for sequence, token, row in zip(sequences, ids, on_cpu, strict=True):
            sequence.past_len -= 1
            assert torch.equal(model.forward([(sequence, [token])])[0], row)
    (many,), (one,) = (model._local.steps[n, n, "last", False].stages for n in (9, 1))
    assert not many.capturable and one.capturable
    assert emulated.cpu_access.captures_made == 1


def test_a_row_is_the_same_bits_beside_others(card, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    model, cache = build_model(tmp_path / "m", card, device=DEVICE, cache_type="q4",
                               sequences=3)
    texts = [IDS, IDS[::-1], IDS[3:] + IDS[:3]]
    alone = []
    for ids in texts:
        sequence = cache.acquire(20)
        rows = [model.forward([(sequence, ids[:6])])] + [
            model.forward([(sequence, [i])]).clone() for i in ids[6:]
        ]
        alone.append(torch.cat(rows[1:]))
        cache.release(sequence)
    sequences = [cache.acquire(20) for _ in texts]
    model.forward([(s, ids[:6]) for s, ids in zip(sequences, texts, strict=True)])
    for step in range(6, len(IDS)):
        rows = model.forward(
            [(s, [ids[step]]) for s, ids in zip(sequences, texts, strict=True)]
        )
        for text, row in enumerate(rows):
            assert torch.equal(row, alone[text][step - 6])


def test_a_graph_serves_every_length(emulated, tmp_path):
    """The step is captured once, at its second run, and replays give the same bits."""
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE, cache_type="q8")
    captured = run_chunks(model, cache, IDS, 1)
    assert emulated.cpu_access.captures_made == 1
    assert emulated.cpu_access.replays == len(IDS) - 1
    single = emulated_ops()
    single.cpu_access.captures = False
    other, other_cache = build_model(tmp_path / "m", single, device=DEVICE, cache_type="q8")
    assert torch.equal(run_chunks(other, other_cache, IDS, 1), captured)
    assert single.cpu_access.captures_made == 0


@pytest.mark.parametrize(("cache_type", "config"), [
    ("q4", {}), ("q6_fp16", {"head_dim": 160, "num_hidden_layers": 1}),
])  # fmt: skip
def test_a_graph_rounds_keys_with_feedback(emulated, tmp_path, cache_type, config):
    """Replays write the codes of steps without a graph, and the layers' matrices count in them."""
    write_quantized_model(tmp_path / "m", "exl2", config=config)
    single = emulated_ops()
    single.cpu_access.captures = False

    def run_with(ops, has_feedback=True):
        model, cache = build_model(tmp_path / "m", ops, device=DEVICE, cache_type=cache_type)
        for layer in cache.layers:
            assert layer.key_feedback.any()
            if not has_feedback:
                layer.key_feedback.zero_()
        logits = run_chunks(model, cache, IDS, 1)
        return logits, [layer.k_codes[:, :, : len(IDS)].clone() for layer in cache.layers]

    logits, captured = run_with(emulated)
    assert emulated.cpu_access.captures_made == 1
    assert emulated.cpu_access.replays == len(IDS) - 1
    expected, codes = run_with(single)
    assert single.cpu_access.captures_made == 0
    assert torch.equal(logits, expected) and all(map(torch.equal, captured, codes))
    _, plain = run_with(emulated, has_feedback=False)
    assert not any(map(torch.equal, captured, plain))


@pytest.mark.parametrize("spoilt", [1, 3])
def test_a_spoilt_capture_is_tried_again(emulated, tmp_path, spoilt):
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE)
    whole = run_chunks(model, cache, IDS, 4)
    emulated.cpu_access._launcher.spoilt_captures = spoilt
    before = emulated.cpu_access.captures_made, emulated.cpu_access.replays
    logits = run_chunks(model, cache, IDS, 1)
    # The first step runs without a graph, and so do steps whose capture fails.
    assert emulated.cpu_access.captures_made == before[0] + spoilt + 1
    assert emulated.cpu_access.replays == before[1] + len(IDS) - 1 - spoilt
    assert relative_error(logits, whole) <= 1e-5


def test_captures_that_always_fail_are_given_up_with_one_warning(emulated, tmp_path, caplog):
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE)
    whole = run_chunks(model, cache, IDS, 4)
    emulated.cpu_access._launcher.spoilt_captures = 10**6
    before = emulated.cpu_access.captures_made
    for _ in range(CAPTURE_TRIES):
        logits = run_chunks(model, cache, IDS, 1)
    assert emulated.cpu_access.captures_made == before + CAPTURE_TRIES
    assert [record.message for record in caplog.records if "captured" in record.message] == [
        f"Steps are not captured as graphs, and decoding is slower: {CAPTURE_TRIES} captures in "
        "a row failed, the last with: graphics card, cuStreamEndCapture: invalidated (901)"
    ]
    assert not any(part.capturable for step in model._local.steps.values()
                   if len(step.stages[0].x) == 1 for part in step.stages)
    assert relative_error(logits, whole) <= 1e-5


def test_pages_prefixes_and_texts_side_by_side(card, tmp_path):
    """A text over two pages, another with the same beginning, and four at once."""
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    long = [(11 * i + i * i) % 288 for i in range(270)]
    settings = GREEDY | {"max_new_tokens": 4}
    with exl_loader.load(tmp_path / "m", ctx_size=1024, device=DEVICE, cache_type="q4") as model:
        first = list(model.generate_ids(long, settings))
        again = model.generate_ids(long, settings)
        assert list(again) == first
        assert again.stats.reused_tokens >= 256
        branch = model.generate_ids(long[:262] + IDS, settings)
        answers = list(branch)
        assert branch.stats.reused_tokens >= 262
        with exl_loader.load(tmp_path / "m", ctx_size=1024, device=DEVICE,
                             cache_type="q4") as fresh:
            assert list(fresh.generate_ids(long[:262] + IDS, settings)) == answers
        prompts = [IDS[i:] + IDS[:i] for i in range(4)]
        alone = [list(model.generate_ids(p, GREEDY)) for p in prompts]
        together = in_threads(lambda prompt: list(model.generate_ids(prompt, GREEDY)), prompts)
        assert together == alone


def test_a_draft_model_on_the_card(card, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    write_quantized_model(tmp_path / "d", "exl2", seed=1, config={"num_hidden_layers": 1})
    _, plain = run(tmp_path / "m", DEVICE)
    _, drafted = run(tmp_path / "m", DEVICE, model_draft=tmp_path / "d")
    assert drafted == plain


def test_neighbours_are_one_launch(emulated, tmp_path):
    """A decode step has 6 launches a Llama layer and 3 more (angles, embedding, head)."""
    launches = {}
    for layers in (1, 2):
        write_quantized_model(tmp_path / f"{layers}", "exl2", permuted=False,
                              config=WIDE | {"num_hidden_layers": layers})
        model, cache = build_model(tmp_path / f"{layers}", emulated, device=DEVICE)
        sequence = cache.acquire(20)
        model.forward([(sequence, [3])])
        before = emulated.cpu_access._launcher.launches
        model.forward([(sequence, [4])])
        launches[layers] = emulated.cpu_access._launcher.launches - before
    assert launches == {1: 6 + 3, 2: 2 * 6 + 3}


@pytest.mark.parametrize(("name", "chunk"), [("qwen3", 5), ("wide", 1), ("wide", 5)])
def test_fused_operations_give_the_bits_of_single_ones(
    emulated, tmp_path, monkeypatch, name, chunk
):
    if name == "wide":
        write_quantized_model(tmp_path / "m", "exl2", permuted=False, config=WIDE)
    else:
        make_model(name, 3, tmp_path / "m", "float16")
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE)
    fused = run_chunks(model, cache, IDS, chunk)
    for name in ("_norm_linears", "_gated_linear", "_linears", "_rope_write_cache"):
        monkeypatch.setattr(fusion, name, lambda ops, recorded: 0)
    model, cache = build_model(tmp_path / "m", emulated, device=DEVICE)
    assert torch.equal(run_chunks(model, cache, IDS, chunk), fused)


def test_a_card_needs_no_cpp_compiler(emulated, tmp_path, monkeypatch):
    """Windows mostly has none, so only NVRTC may compile."""
    for name, seed in (("m", 1), ("d", 2)):
        write_tiny_model(tmp_path / name, seed=seed)

    def none(*_):
        raise AssertionError("a C++ compiler is wanted")

    for module in ("build.toolchain", "build.spec", "cuda.compilers"):
        monkeypatch.setattr(f"exl_loader.backends.{module}.find_compiler", none)
    monkeypatch.setattr("exl_loader.backends.cpu.open.open_library", none)
    settings = {"max_new_tokens": 4, "top_k": 5, "repetition_penalty": 1.2, "seed": 3,
                "guidance_scale": 1.5, "negative_prompt": "no", "ban_eos_token": True}
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, device=DEVICE, cache_type="q4",
                         model_draft=tmp_path / "d") as model:
        assert model.prompt_logits(IDS).isfinite().all()
        assert len(list(model.generate_ids(IDS, GREEDY))) == GREEDY["max_new_tokens"]
        with model.generate("some words", settings) as generation:
            "".join(generation)
            assert generation.stats.new_tokens == settings["max_new_tokens"]


def test_memory_of_the_card_is_given_back_when_a_load_fails(card, tmp_path, monkeypatch):
    from exl_loader.memory import buffers as memory
    from exl_loader.model.parts.embedding import Embedding

    write_quantized_model(tmp_path / "m", "exl2")
    before = memory.live_bytes()
    monkeypatch.setattr(Embedding, "load", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exl_loader.load(tmp_path / "m", ctx_size=CTX, device=DEVICE)
    assert memory.live_bytes() == before


def test_the_command_line_chooses_the_card(emulated, tmp_path, capsys):
    from exl_loader.commands.cli import main

    write_quantized_model(tmp_path / "m", "exl2", tokenizer=True)
    options = ["--ctx-size", "512", "--max-new-tokens", "5", "--ban-eos-token", "--seed", "1"]
    assert main(["generate", str(tmp_path / "m"), "--prompt", "ab", *options,
                 "--device", DEVICE]) == 0
    assert emulated.cpu_access.replays == 3


def count_rows_fetched(monkeypatch, access):
    """Return a list that gets every row of logits that is copied to the CPU."""
    fetched, collect = [], access.collect

    def counting(tensor, mirror):
        if tensor.dtype == torch.float32:
            fetched.extend(tensor)
        collect(tensor, mirror)

    monkeypatch.setattr(access, "collect", counting)
    return fetched


SAMPLED = {
    "greedy": {"temperature": 0},
    "top_k": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    "penalties": {"repetition_penalty": 1.2, "min_p": 0.2, "temperature": 0.3},
    "drafts": {"top_k": 20, "prompt_lookup_num_tokens": 3},
    "whole": {"temperature": 0.8, "max_new_tokens": 3},
    "guided": {"guidance_scale": 1.5, "max_new_tokens": 3},
    "logprobs": {"temperature": 0, "logprobs": 2, "max_new_tokens": 3},
}
NEED_ROWS = ("whole", "guided", "logprobs")


def test_samplers_need_only_the_top_logits(card, tmp_path, monkeypatch):
    """The ids are those of whole rows, and rows stay on the card if they are not needed."""
    write_quantized_model(tmp_path / "m", "exl2", config={"vocab_size": 3000})
    fetched = count_rows_fetched(monkeypatch, card.cpu_access)
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, device=DEVICE) as model:
        for name, settings in SAMPLED.items():
            settings = {"max_new_tokens": 8, "seed": 3, "ban_eos_token": True, **settings}
            fetched.clear()
            lazy = list(model.generate_ids(IDS, settings))
            assert len(lazy) == settings["max_new_tokens"]
            assert bool(fetched) == (name in NEED_ROWS), name
            with monkeypatch.context() as patch:
                patch.setattr("exl_loader.model.top_logits_reader.read_result", lambda *args: None)
                assert list(model.generate_ids(IDS, settings)) == lazy, name
            assert fetched


def test_padding_is_never_found(emulated, tmp_path, monkeypatch):
    """The tokenizer has fewer ids than the head: the ids beyond do not count."""
    write_quantized_model(tmp_path / "m", "exl2", tokenizer=True, config={"vocab_size": 2500})
    fetched = count_rows_fetched(monkeypatch, emulated.cpu_access)
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, device=DEVICE) as model:
        size = model.tokenizer.vocab_size
        ids = list(model.generate_ids(IDS, GREEDY))
    assert size < 2500 and max(ids) < size
    # The top logits would hold the whole of so small a vocabulary.
    assert (len(fetched) == 0) == (size > 1024)


def test_a_draft_model_needs_only_the_top_logits(emulated, tmp_path, monkeypatch):
    config = {"vocab_size": 3000}
    write_quantized_model(tmp_path / "m", "exl2", config=config)
    write_quantized_model(tmp_path / "d", "exl2", seed=1, config=config | {"num_hidden_layers": 1})
    _, plain = run(tmp_path / "m", DEVICE)
    fetched = count_rows_fetched(monkeypatch, emulated.cpu_access)
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, device=DEVICE,
                         model_draft=tmp_path / "d") as model:
        assert list(model.generate_ids(IDS, GREEDY)) == plain
    assert not fetched


def test_a_model_is_there_for_every_thread_when_it_is_made(emulated, tmp_path):
    """A thread with another stream does not wait for the launches of the loading thread."""
    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    finished = []
    emulated.cpu_access.finish = lambda: finished.append(emulated.cpu_access._launcher.launches)
    build_model(tmp_path / "m", emulated, device=DEVICE)
    assert finished == [emulated.cpu_access._launcher.launches]
