"""The GPU benchmark as a program: its model, its passes and its table, on an emulated card."""

from __future__ import annotations

import json

import torch

from benchmarks.cuda import speed
from support.emulated_cuda import emulated_ops, install


def test_dry_run(tmp_path, monkeypatch, capsys):
    ops = emulated_ops()
    install(monkeypatch, ops)
    monkeypatch.setattr(
        "exl_loader.backends.cuda.cards.auto_cards", lambda: ("cuda:0",)
    )
    rows = speed.main([
        "--dry", "--no-peer", "--bandwidth", "1e9", "--folder", str(tmp_path),
        "--json", str(tmp_path / "rows.json"),
    ])  # fmt: skip
    assert [row["cache_type"] for row in rows] == list(speed.CACHE_TYPES)
    assert all(list(row["decode"]) == ["0", "300"] and row["prefill"] > 0 for row in rows)
    # Both depths of a type are one captured step.
    assert ops.cpu_access.captures_made == len(rows)
    assert ops.cpu_access.replays == len(rows) * (2 * (speed.WARM_UP + 3) - 1)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    printed = capsys.readouterr().out
    assert printed.count("exl_loader") == 4 and "at 300" in printed
    for row in rows:
        ratio = row["share"]["300"] / row["decode"]["300"] * 1e9
        assert ratio > speed.weight_bytes(tmp_path / "dry")


def test_layers_of_one_input_share_its_permutation(tmp_path):
    folder = speed.write_model(tmp_path / "m", speed.GEOMETRIES["dry"])
    from safetensors.torch import load_file

    tensors = load_file(folder / "layer-000.safetensors")
    q, k, o = (tensors[f"model.layers.0.self_attn.{n}_proj.q_invperm"] for n in "qko")
    assert torch.equal(q, k) and not torch.equal(q, o)
