"""Machines with cards, emulated: a second machine with two cards gives the bits of one card."""

from __future__ import annotations

import pytest
import torch
from test_cuda_stages import cards, texts_of  # noqa: F401

from exl_loader.utils.table import DeviceMap
from support.hf_models import make_model
from support.machines_in_process import build_over_machines
from support.model_builder import build_model

FIRST = DeviceMap("cuda:0", ("cuda:0",), "cuda:0")
SECOND = DeviceMap(None, ("cuda:1", "cuda:2"), None, 1)


@pytest.mark.parametrize(("name", "cache_type"), [
    ("llama-tied", "q4"), ("gemma2", "q8"), ("mixtral", "fp16"), ("phi3-longrope", "fp16"),
])  # fmt: skip
def test_cards_of_two_machines_give_the_bits_of_one(cards, tmp_path, name, cache_type):  # noqa: F811
    make_model(name, 3, tmp_path / "m", "float16")
    ids = [(7 * i * i + 3) % 331 for i in range(12)]
    options = {"sequences": 3, "cache_type": cache_type}
    whole = build_model(tmp_path / "m", cards.ops, device=DeviceMap.single("cuda:0", 3), **options)
    expected = texts_of(*whole, ids)
    model, cache, _ = build_over_machines(tmp_path / "m", cards.ops, [FIRST, SECOND], **options)
    assert all(map(torch.equal, texts_of(model, cache, ids), expected))


def test_rows_of_a_flight_outlive_the_next_pass_on_a_card(cards, tmp_path):  # noqa: F811
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    model, cache, _ = build_over_machines(
        tmp_path / "m", cards.ops, [FIRST, SECOND], lag=9, sequences=3, cache_type="fp16"
    )
    sequences = [cache.acquire(20) for _ in range(2)]
    flights = [model.start_rows([(sequence, [5, 9, 2 + i])])
               for i, sequence in enumerate(sequences)]
    (row,) = flights[0].rows()
    before = row.values.copy()
    model.start_rows([(sequences[0], [7])])
    assert (row.values == before).all()
    assert row.argmax(model.sampled_vocab_size) == int(before.argmax())
    (other,) = flights[1].rows()
    assert (other.values != before).any()
