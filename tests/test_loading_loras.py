"""Loading and unloading adapters while a model stays: the plan, running texts, the cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import exl_loader
from exl_loader.memory.buffers import live_bytes
from exl_loader.memory.reservation.text import render
from exl_loader.utils.byte_counts import amount
from exl_loader.utils.errors import (
    ExlLoaderError,
    InsufficientMemory,
    InvalidCall,
    InvalidCheckpoint,
    InvalidSettings,
    ModelNotFound,
    ModelUnloaded,
)
from support import damage
from support.emulated_cuda import EmulatedCards, emulated_ops, install
from support.lora_folders import ATTENTION, MLP, adapted_shapes, merged, write_adapter
from support.makers import write_folder, write_quantized_model
from support.tiny import CONFIG

CTX = 512
IDS = [5, 9, 100, 7, 3, 20, 33, 250, 17, 18, 19, 200]
# More than a page of the cache.
PROMPT = [(7 * i) % 280 + 3 for i in range(150)]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ban_eos_token": True}
ROOM = "1MiB"
# Damages of the file with the matrices.
DAMAGES = [kind for kind in damage.OF_WEIGHTS if kind is not damage.quantization_changed]


@pytest.fixture(params=["cpu", "cuda:0", pytest.param("real", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda:0"
    if request.param == "cuda:0":
        install(monkeypatch, emulated_ops())
    return request.param


@pytest.fixture
def folders(tmp_path):
    """An EXL2 model, two adapters of it, and models with each merged."""
    seed = int.from_bytes(os.urandom(3), "little")
    state = write_quantized_model(tmp_path / "m", "exl2", seed=seed)
    shapes = adapted_shapes({name: value.shape for name, value in state.items()},
                            (*ATTENTION, *MLP, "lm_head"))
    deltas = [
        write_adapter(tmp_path / "a", shapes, seed=seed, rank=8),
        write_adapter(tmp_path / "b", shapes, seed=seed + 1, rank=3, dtype=torch.float16),
    ]
    for name, delta in zip(("with-a", "with-b"), deltas, strict=True):
        write_folder(tmp_path / name, merged(state, delta), CONFIG | {"torch_dtype": "float32"})
    return tmp_path


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def load(folder, device, **options):
    """Load a model and compare its memory with its plan."""
    plan = exl_loader.plan(folder, ctx_size=CTX, device=device, **options)
    model = exl_loader.load(folder, ctx_size=CTX, device=device, **options)
    assert model.allocated_bytes() == plan.total_bytes == model.reservation.total_bytes
    assert model.reservation.lora_bytes == plan.lora_bytes
    return model


def logits_of(folder, device):
    with load(folder, device) as model:
        return model.prompt_logits(IDS)


def test_adapters_come_and_go(folders, device):
    expected = {name: logits_of(folders / f"with-{name}", device) for name in "ab"}
    bare = logits_of(folders / "m", device)
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        total = model.allocated_bytes()
        assert model.reservation.lora_bytes == 1 << 20
        assert torch.equal(model.prompt_logits(IDS), bare)
        for name in "aba":
            lora = model.load_lora(folders / name)
            assert model.loras == (lora,) and lora.name == name and lora.scaling == 1.0
            assert 0 < lora.nbytes <= 1 << 20
            assert relative_error(model.prompt_logits(IDS), expected[name]) <= 2e-2
            model.unload_loras()
            assert model.loras == ()
            assert torch.equal(model.prompt_logits(IDS), bare)
        assert model.allocated_bytes() == total
    assert relative_error(expected["a"], bare) > 0.1


def test_adapters_named_at_load_are_reserved_exactly(folders, device):
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        loaded = model.load_lora(folders / "a"), model.load_lora(str(folders / "b"), -0.3)
        expected = model.prompt_logits(IDS)
    loras = [folders / "a", (folders / "b", -0.3)]
    with load(folders / "m", device, loras=loras) as model:
        assert [lora.scaling for lora in model.loras] == [1.0, -0.3]
        assert model.reservation.lora_bytes == sum(lora.nbytes for lora in loaded)
        assert torch.equal(model.prompt_logits(IDS), expected)
        model.unload_loras()
        model.load_lora(folders / "b")
        model.load_lora(folders / "a")
        assert [lora.name for lora in model.loras] == ["b", "a"]
    with load(folders / "m", device, loras=f"{folders / 'a'},{folders / 'b'}=-0.3",
              max_lora_bytes="3MiB") as model:
        assert model.reservation.lora_bytes == 3 << 20
        assert torch.equal(model.prompt_logits(IDS), expected)


def test_texts_and_cached_prompts(folders, device):
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        bare = list(model.generate_ids(PROMPT, GREEDY))
        model.load_lora(folders / "a")
        fresh = model.generate_ids(PROMPT, GREEDY)
        text = list(fresh)
        assert fresh.stats.reused_tokens == 0 and text != bare
        again = model.generate_ids(PROMPT, GREEDY)
        assert list(again) == text and again.stats.reused_tokens > 0
        model.unload_loras()
        last = model.generate_ids(PROMPT, GREEDY)
        assert list(last) == bare and last.stats.reused_tokens == 0


def test_a_change_is_refused_while_a_text_is_generated(folders, device):
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        expected = list(model.generate_ids(IDS, GREEDY))
        running = model.generate_ids(IDS, GREEDY)
        text = [next(running)]
        for change in (lambda: model.load_lora(folders / "a"), model.unload_loras):
            with pytest.raises(InvalidCall, match="Wait for their end"):
                change()
        assert model.loras == ()
        assert text + list(running) == expected
        model.load_lora(folders / "a")
        assert len(model.loras) == 1


def test_requests_of_other_threads_see_one_state_each(folders):
    """Texts that begin while adapters change are those of the model with or without them."""
    with load(folders / "m", "cpu", max_lora_bytes=ROOM) as model:
        known = {tuple(model.generate_ids(IDS, GREEDY))}
        model.load_lora(folders / "a")
        known.add(tuple(model.generate_ids(IDS, GREEDY)))
        assert len(known) == 2
        texts, done = [], threading.Event()

        def generate():
            while not done.is_set() or len(texts) < 4:
                texts.append(tuple(model.generate_ids(IDS, GREEDY)))
                # Adapters change while no text is generated, so there have to be such moments.
                time.sleep(0.01)

        threads = [threading.Thread(target=generate) for _ in range(2)]
        for thread in threads:
            thread.start()
        changes = 0
        while changes < 4:
            try:
                model.unload_loras()
                model.load_lora(folders / "a")
                changes += 1
            except (InvalidCall, InvalidSettings):
                continue
        done.set()
        for thread in threads:
            thread.join()
    assert set(texts) <= known


def test_room_that_is_too_small(folders, device):
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        needed = model.load_lora(folders / "a").nbytes
        loaded = model.prompt_logits(IDS)
    with load(folders / "m", device) as model:
        assert model.reservation.lora_bytes == 0
        with pytest.raises(InsufficientMemory) as caught:
            model.load_lora(folders / "a")
        message = str(caught.value)
        assert f"{needed} bytes" in message and f"max_lora_bytes={needed}B" in message
        assert "0 bytes free" in message and device in message
        bare = model.prompt_logits(IDS)
    with load(folders / "m", device, max_lora_bytes=f"{needed}B") as model:
        model.load_lora(folders / "a")
        with pytest.raises(InsufficientMemory, match=f"0 bytes free of {needed} "):
            model.load_lora(folders / "b")
        assert torch.equal(model.prompt_logits(IDS), loaded)
    with load(folders / "m", device, max_lora_bytes=f"{needed - 1}B") as model:
        if model.reservation.lora_bytes < needed:
            with pytest.raises(InsufficientMemory):
                model.load_lora(folders / "a")
            assert torch.equal(model.prompt_logits(IDS), bare)


def test_values_that_are_no_numbers_leave_the_model_as_it_was(folders, device):
    path = folders / "b" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, path)
    with load(folders / "m", device, max_lora_bytes=ROOM) as model:
        first = model.load_lora(folders / "a")
        before = model.prompt_logits(IDS)
        with pytest.raises(InvalidCheckpoint, match="NaN or infinite"):
            model.load_lora(folders / "b")
        assert model.loras == (first,)
        assert torch.equal(model.prompt_logits(IDS), before)
    with pytest.raises(InvalidCheckpoint, match="NaN or infinite"):
        exl_loader.load(folders / "m", ctx_size=CTX, device=device, loras=folders / "b")


def test_a_scaling_beyond_the_dtype_is_refused(folders):
    path = folders / "b" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = 60_000
    save_file(tensors, path)
    with load(folders / "m", "cpu", max_lora_bytes=ROOM) as model:
        with pytest.raises(InvalidCheckpoint, match="times 2"):
            model.load_lora(folders / "b")  # alpha is twice the rank, and B is float16
        model.load_lora(folders / "b", 0.5)
        for scaling in (float("nan"), "1", None, 1e9, True):
            with pytest.raises(InvalidSettings, match="scaling"):
                model.load_lora(folders / "a", scaling)


def spellings(folder, monkeypatch):
    """Return other spellings of a folder."""
    link = folder.with_name("link")
    link.symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    return [f"{folder}/", folder.name, f"{folder.parent}/m/../{folder.name}", link]


def test_spellings_of_a_folder_are_one_lora(folders, monkeypatch):
    model_dir, others = str(folders / "m"), spellings(folders / "a", monkeypatch)
    with load(folders / "m", "cpu", max_lora_bytes=ROOM) as model:
        model.load_lora(folders / "a")
        for other in others:
            with pytest.raises(InvalidSettings, match="is loaded"):
                model.load_lora(other)
            with pytest.raises(InvalidSettings, match="each folder once"):
                exl_loader.plan(model_dir, loras=[folders / "a", other])
        model.load_lora(folders / "b")


def test_wrong_calls(folders):
    with load(folders / "m", "cpu", max_lora_bytes=ROOM) as model:
        model.load_lora(folders / "a")
        with pytest.raises(InvalidSettings, match="is loaded"):
            model.load_lora(folders / "a")
        with pytest.raises(ModelNotFound):
            model.load_lora(folders / "none")
        with pytest.raises(InvalidSettings):
            model.load_lora(7)
    with pytest.raises(ModelUnloaded):
        model.load_lora(folders / "a")
    with pytest.raises(ModelUnloaded):
        model.unload_loras()


@pytest.mark.parametrize("value", [
    7, b"a", {"a": 1.0}, [("a", 1.0, 2.0)], [("a", "much")], [("a", float("inf"))], [3], ["a", "a"],
    "a,a=2", [None], [["a"]],
])
def test_loras_that_make_no_sense(folders, value):
    with pytest.raises(InvalidSettings, match="lora|LoRA"):
        exl_loader.plan(folders / "m", loras=value)
    with pytest.raises(InvalidSettings, match="max_lora_bytes"):
        exl_loader.plan(folders / "m", max_lora_bytes="much")


def test_the_plan_shows_the_room(folders):
    found = exl_loader.plan(folders / "m", ctx_size=CTX, device="cpu", loras=[folders / "a"])
    bare = exl_loader.plan(folders / "m", ctx_size=CTX, device="cpu")
    (device,) = found.devices
    assert found.total_bytes == bare.total_bytes + device.lora_bytes > bare.total_bytes
    assert found.loras == {str(folders / "a"): 1.0} and bare.loras == {}
    assert f"LoRAs {amount(device.lora_bytes)}" in " ".join(render(found).split())
    assert "LoRAs" not in render(bare)
    with pytest.raises(InsufficientMemory, match=rf"LoRAs {amount(device.lora_bytes)}"):
        exl_loader.load(folders / "m", ctx_size=CTX, device="cpu", loras=[folders / "a"],
                        memory_limit=f"{bare.total_bytes}B")
    # The largest context that fits takes the room into account.
    limit = f"{found.total_bytes}B"
    largest = exl_loader.plan(folders / "m", ctx_size="auto", device="cpu", memory_limit=limit)
    smaller = exl_loader.plan(folders / "m", ctx_size="auto", device="cpu", memory_limit=limit,
                              loras=[folders / "a"])
    assert smaller.ctx_size <= largest.ctx_size and smaller.fits


def test_a_draft_model_guesses_without_the_loras(folders):
    options = {"loras": folders / "a", "model_draft": folders / "m"}
    with load(folders / "m", "cpu", loras=folders / "a") as model:
        expected = list(model.generate_ids(IDS, GREEDY))
        lora_bytes = model.reservation.lora_bytes
    with load(folders / "m", "cpu", **options) as model:
        assert model.reservation.lora_bytes == lora_bytes
        assert list(model.generate_ids(IDS, GREEDY)) == expected


def test_unloading_the_model_frees_its_loras(folders):
    before = live_bytes()
    model = load(folders / "m", "cpu", loras=[folders / "a", folders / "b"])
    assert live_bytes() == before + model.allocated_bytes()
    model.unload()
    assert live_bytes() == before


def test_layers_on_two_cards(folders, monkeypatch):
    EmulatedCards(2).install(monkeypatch)
    whole = exl_loader.plan(folders / "m", ctx_size=CTX, device="cuda:0", loras=folders / "a")
    split = [(whole.devices[0].total_bytes - 1) / 2**30, 20]
    options = {"gpu_split": split, "loras": folders / "a"}
    with load(folders / "m", ["cuda:0", "cuda:1"], **options) as model:
        one, two, in_main_memory = (d.lora_bytes for d in model.reservation.devices)
        assert one > 0 and two > 0 and in_main_memory == 0
        assert one + two == model.loras[0].nbytes
        actual = model.prompt_logits(IDS)
    with load(folders / "m", "cuda:0", loras=folders / "a") as model:
        assert torch.equal(model.prompt_logits(IDS), actual)


def damage_config(rng, folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config[rng.choice(sorted(config))] = rng.choice(damage.ODD)
    path.write_text(json.dumps(config))


def test_damaged_adapters_are_refused_or_come_and_go(folders):
    seed = int.from_bytes(os.urandom(3), "little")
    rng, kinds = random.Random(seed), [*DAMAGES, damage_config]
    with load(folders / "m", "cpu", max_lora_bytes=ROOM) as model:
        bare, refused = model.prompt_logits(IDS), 0
        for number in range(60):
            kind, copy = rng.choice(kinds), folders / f"{number}"
            shutil.copytree(folders / rng.choice("ab"), copy)
            kind(rng, copy)
            try:
                model.load_lora(copy)
                model.prompt_logits(IDS)
                model.unload_loras()
            except ExlLoaderError as error:
                assert "\n" not in str(error), (seed, number, kind.__name__)
                refused += 1
            except BaseException as error:
                raise AssertionError((seed, number, kind.__name__)) from error
            assert model.loras == (), (seed, number, kind.__name__)
        assert refused > 10
        assert torch.equal(model.prompt_logits(IDS), bare), seed
