"""The embedding of a model on cards, which is in main memory, on emulated cards."""

from __future__ import annotations

import json
import secrets

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import exl_loader  # noqa: E402
from exl_loader.memory import buffers as memory  # noqa: E402
from exl_loader.memory.reservation.text import render  # noqa: E402
from exl_loader.utils.byte_counts import GIB, amount  # noqa: E402
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings  # noqa: E402
from exl_loader.utils.integers import round_up  # noqa: E402
from support.emulated_cuda import EmulatedCards  # noqa: E402
from support.makers import write_quantized_model  # noqa: E402
from support.tiny import write_tiny_model  # noqa: E402

CTX = 512
IDS = [5, 9, 100, 7, 3, 20, 33, 250, 17, 18, 19, 200]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ban_eos_token": True}
TABLE = "model.embed_tokens.weight"
CARD = {"device": "cuda:0"}
ON_CARD = {"device": "cuda:0", "embedding_device": "cuda:0"}


@pytest.fixture
def cards(monkeypatch, no_other_model):
    made = EmulatedCards(2)
    made.install(monkeypatch)
    yield made
    assert memory.live_bytes() == 0


def table_bytes(folder):
    """Return the bytes of the embedding in main memory, aligned as there."""
    (file,) = folder.glob("*.safetensors")
    return round_up(load_file(file)[TABLE].nbytes, 64)


def run(folder, ids=IDS, **options):
    """Return logits and a continuation; hold the memory of each device against the plan."""
    planned = exl_loader.plan(folder, ctx_size=CTX, **options)
    with exl_loader.load(folder, ctx_size=CTX, **options) as model:
        for device in planned.devices:
            assert memory.live_bytes(device.device) == device.total_bytes
            for part in ("weights", "cache", "workspace", "embedding"):
                planned_bytes = getattr(device, f"{part}_bytes")
                assert model._buffers.allocated_bytes(device.device, part) == planned_bytes
        logits = model.prompt_logits(ids)
        answer = list(model.generate_ids(ids, GREEDY))
        assert model.allocated_bytes() == planned.total_bytes
    return logits, answer


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [
    {}, {"chunk_size": 8, "max_batch_size": 2, "cache_type": "q4"},
], ids=["whole", "chunks"])
def test_main_memory_and_card_give_the_same_bits(cards, tmp_path, dtype, options):
    write_tiny_model(tmp_path / "m", seed=secrets.randbelow(1 << 30))
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[TABLE] = tensors[TABLE].to(getattr(torch, dtype))
    save_file(tensors, path)
    in_main_memory = run(tmp_path / "m", **CARD, **options)
    on_card = run(tmp_path / "m", **ON_CARD, **options)
    assert torch.equal(in_main_memory[0], on_card[0]) and in_main_memory[1] == on_card[1]
    (access, _) = cards.accesses()
    assert access.replays > 0


def test_rows_are_those_of_the_ids_in_their_order(cards, tmp_path):
    write_tiny_model(tmp_path / "m")
    forward, _ = run(tmp_path / "m", IDS, **CARD)
    backward, _ = run(tmp_path / "m", IDS[::-1], **CARD)
    alone = [run(tmp_path / "m", [i], **CARD)[0][0] for i in (IDS[0], IDS[-1])]
    assert torch.equal(forward[0], alone[0]) and torch.equal(backward[0], alone[1])
    assert not torch.equal(alone[0], alone[1])


def test_the_plan_has_a_record_of_main_memory(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    nbytes = table_bytes(tmp_path / "m")
    planned = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD)
    card, main_memory = planned.devices
    assert (main_memory.device, main_memory.has_layers) == ("cpu", False)
    assert main_memory.total_bytes == main_memory.embedding_bytes == nbytes
    assert planned.embedding_bytes == nbytes and card.embedding_bytes == 0
    # The weights of the card pass through main memory, and the buffer ends on a whole page.
    assert main_memory.overhead_bytes > -nbytes % 4096
    (whole,) = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **ON_CARD).devices
    assert whole.weights_bytes - card.weights_bytes == round_up(nbytes, 256)
    assert planned.total_bytes == card.total_bytes + nbytes
    assert json.loads(json.dumps(planned.to_dict()))["embedding_bytes"] == nbytes
    row = next(line for line in render(planned).splitlines() if line.startswith("embedding"))
    assert amount(nbytes) in row


def test_prefixes_and_texts_side_by_side(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "gptq")
    prompts = [IDS, [*IDS, 44, 45, 46], IDS[4:], IDS[::-1]]

    def answers(options):
        with exl_loader.load(tmp_path / "m", ctx_size=CTX, **options) as model:
            streams = [model.generate_ids(prompt, GREEDY) for prompt in prompts]
            return list(zip(*streams, strict=True))

    assert answers(CARD) == answers(ON_CARD)


def test_a_split_over_two_cards(cards, tmp_path):
    from test_cuda_stages import gpu_split

    write_quantized_model(tmp_path / "m", "exl2")
    field = gpu_split(tmp_path / "m", 1)
    expected = run(tmp_path / "m", **ON_CARD)
    for options in ({}, {"embedding_device": "cuda:0"}):
        logits, answer = run(tmp_path / "m", gpu_split=field, **options)
        assert torch.equal(logits, expected[0]) and answer == expected[1]
    with pytest.raises(InvalidSettings, match=r"embedding_device: expected .*cuda:0"):
        exl_loader.plan(tmp_path / "m", ctx_size=CTX, gpu_split=field, embedding_device="cuda:1")


def test_a_tied_head_is_the_embedding_where_the_first_layer_is(cards, tmp_path):
    from test_cuda_stages import gpu_split

    write_tiny_model(tmp_path / "m", tie_word_embeddings=True)
    (alone,) = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD).devices
    assert alone.embedding_bytes == 0
    expected = run(tmp_path / "m", **CARD)
    # The head is on the second card, so the first card reads the table in main memory.
    field = gpu_split(tmp_path / "m", 1)
    split = exl_loader.plan(tmp_path / "m", ctx_size=CTX, gpu_split=field)
    assert split.embedding_bytes == table_bytes(tmp_path / "m")
    logits, answer = run(tmp_path / "m", gpu_split=field)
    assert torch.equal(logits, expected[0]) and answer == expected[1]


def test_a_quantised_head_of_a_tied_model_costs_nothing_twice(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    untied = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True}))
    tied = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD)
    assert [d.total_bytes for d in tied.devices] == [d.total_bytes for d in untied.devices]
    assert tied.embedding_bytes == table_bytes(tmp_path / "m")


def test_a_draft_models_embedding_is_in_main_memory_too(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    write_quantized_model(tmp_path / "d", "exl2", seed=1, config={"num_hidden_layers": 1})
    options = {"model_draft": tmp_path / "d"}
    _, main_memory = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD, **options).devices
    assert main_memory.draft_bytes == table_bytes(tmp_path / "d")
    assert main_memory.embedding_bytes == main_memory.draft_bytes + table_bytes(tmp_path / "m")
    assert run(tmp_path / "m", **CARD, **options)[1] == run(tmp_path / "m", **CARD)[1]


def test_main_memory_that_has_later_layers_holds_the_embedding_as_well(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    total = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD).devices[0].total_bytes
    options = {"device": "cuda:0,cpu", "gpu_split": [(total - 1) / GIB, 1]}
    planned = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **options)
    assert [d.has_layers for d in planned.devices] == [True, True]
    assert planned.devices[1].embedding_bytes == table_bytes(tmp_path / "m")
    assert planned.devices[1].weights_bytes > 0
    run(tmp_path / "m", **options)


def test_main_memory_that_is_too_small_is_refused_with_numbers(cards, tmp_path, monkeypatch):
    from exl_loader.backends import BACKENDS
    from exl_loader.backends.base import Capacity

    write_quantized_model(tmp_path / "m", "exl2")
    _, main_memory = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD).devices
    free = main_memory.needed_bytes - 1
    monkeypatch.setattr(BACKENDS["cpu"], "capacity", lambda device: Capacity(4 * GIB, free))
    short = exl_loader.plan(tmp_path / "m", ctx_size=CTX, **CARD)
    assert not short.fits and short.devices[1].missing_bytes == 1
    assert set(short.largest_ctx_size.values()) == {0}
    with pytest.raises(InsufficientMemory) as caught:
        exl_loader.load(tmp_path / "m", ctx_size=CTX, **CARD)
    text = str(caught.value)
    assert text.startswith("cpu: ") and f"{amount(1)} missing" in text
    assert f"embedding {amount(main_memory.embedding_bytes)}" in text
    assert "embedding_device=cuda:0 puts the embedding" in text
    run(tmp_path / "m", **ON_CARD)


def test_memory_that_another_process_takes_after_the_plan(cards, tmp_path, monkeypatch):
    write_quantized_model(tmp_path / "m", "exl2")
    monkeypatch.setattr(
        cards.memory, "empty_mapped", lambda device, nbytes: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(InsufficientMemory, match="cpu: no memory for the embedding buffer"):
        exl_loader.load(tmp_path / "m", ctx_size=CTX, **CARD)


@pytest.mark.parametrize("value", ["cuda:1", "cuda:7", "vulkan", 5, ""])
def test_an_embedding_device_that_makes_no_sense(cards, tmp_path, value):
    write_tiny_model(tmp_path / "m")
    with pytest.raises(InvalidSettings, match="device"):
        exl_loader.plan(tmp_path / "m", ctx_size=CTX, device="cuda:0", embedding_device=value)


def test_a_model_in_main_memory_has_its_embedding_in_its_weights(cards, tmp_path):
    write_tiny_model(tmp_path / "m")
    for value in ("auto", "cpu"):
        (device,) = exl_loader.plan(
            tmp_path / "m", ctx_size=CTX, device="cpu", embedding_device=value).devices
        assert device.embedding_bytes == 0
