"""Conversions whose layers run on a card: emulated on the CPU, as far as that goes.

Emulated memory is main memory, so that these tests do not see a tensor that is on the wrong device.
"""

from __future__ import annotations

import pytest
import torch

import exl_loader
from exl_loader.backends.cuda import backend, cards
from exl_loader.convert import convert, measurement
from exl_loader.convert.activations import LayerRunner
from exl_loader.convert.reservation import ConversionReservation
from exl_loader.convert.source import Source
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings
from support.emulated_cuda import DEVICE, EmulatedCards, emulated_ops, install

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"calibration_rows": 2, "calibration_row_len": 32, "bits": 7.5}


@pytest.fixture(autouse=True)
def _few_mixes(monkeypatch):
    monkeypatch.setattr(measurement, "MIXES", [measurement.MIXES[2], measurement.PROBE])


def test_a_layer_runs_on_the_card(tiny_model, monkeypatch):
    folder = tiny_model(num_hidden_layers=1)
    rows = torch.randint(3, 259, (2, 32), generator=torch.Generator().manual_seed(2)).tolist()
    found = {}
    ops = emulated_ops()
    install(monkeypatch, ops)
    source = Source(folder)
    for device in ("cpu", DEVICE):
        runner = LayerRunner(source, 32, device=device)
        states = runner.embed(rows)
        loaded, outputs = runner.load(0), torch.empty_like(states)
        before = ops.launcher.launches
        hessians, _ = runner.record(loaded, states, outputs=outputs)
        assert (ops.launcher.launches > before) == (device == DEVICE)
        runner.load_head()
        logits = runner.logits(outputs[0]).clone()
        means = [hessian.mean() for hessian in hessians.values()]
        means.append(runner.head_hessian(outputs).mean())
        found[device] = [outputs, logits, *means]
    source.close()
    for one, other in zip(found["cpu"], found[DEVICE], strict=True):
        assert (one - other).norm() < 2e-3 * one.norm()


def test_a_conversion_on_the_card_is_one_of_the_cpu(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model(num_hidden_layers=1)
    announced: list[ConversionReservation] = []
    ops = emulated_ops()
    install(monkeypatch, ops)
    convert(folder, tmp_path / "card", device="cuda", announce=announced.append, **FEW)
    assert ops.launcher.launches > 0
    convert(folder, tmp_path / "cpu", announce=announced.append, **FEW)
    on_card, on_cpu = announced
    assert on_card.device == DEVICE and on_card.device_bytes > 0 and f"{DEVICE}: " in str(on_card)
    assert not on_cpu.device_memory and on_card.memory_bytes < on_cpu.memory_bytes
    logits = {}
    for name in ("card", "cpu"):
        with exl_loader.load(tmp_path / name, ctx_size=256, device="cpu") as model:
            logits[name] = model.prompt_logits(list(range(5, 60)))
    difference = (logits["card"] - logits["cpu"]).norm() / logits["cpu"].norm()
    assert difference < 0.2


def test_every_name_of_main_memory_is_main_memory(tiny_model, tmp_path):
    announced: list[ConversionReservation] = []
    convert(tiny_model(num_hidden_layers=1), tmp_path / "exl2", device="cpu:1",
            announce=announced.append, **FEW)
    assert announced[0].device == "cpu" and not announced[0].device_memory


def test_a_card_that_is_too_small_is_refused(tiny_model, tmp_path, monkeypatch):
    EmulatedCards(1, {DEVICE: 1 << 20}).install(monkeypatch)
    with pytest.raises(InsufficientMemory, match=DEVICE):
        convert(tiny_model(), tmp_path / "exl2", device=DEVICE, **FEW)
    assert not list(tmp_path.glob("exl2*"))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", 3, None])
def test_unknown_devices_are_refused(tiny_model, tmp_path, device):
    with pytest.raises(InvalidSettings, match="device"):
        convert(tiny_model(), tmp_path / "exl2", device=device, **FEW)
    assert not list(tmp_path.glob("exl2*"))


def test_a_missing_card_suggests_only_what_the_call_has(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_torch_in_use", lambda device: None)
    monkeypatch.setattr(cards, "smi_memory", lambda device: None)
    folder = tiny_model(num_hidden_layers=1)
    with pytest.raises(InvalidSettings, match="device='cpu'") as found:
        convert(folder, tmp_path / "out", device="cuda:7", **FEW)
    assert "vram" not in str(found.value)
    with pytest.raises(InvalidSettings, match="device='cpu', or vram="):
        exl_loader.plan(folder, device="cuda:7")
