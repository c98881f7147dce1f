"""A model over several machines gives the bits that it gives on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl_loader.backends import get_ops
from exl_loader.cache.paging import PagedSequence
from exl_loader.machines.frames import Frame, InvalidFrame
from exl_loader.machines.ring import error_from
from exl_loader.model.pass_frames import pack_entries, unpack_entries
from exl_loader.utils.errors import InvalidCall, MachineFailed
from support.hf_models import MODELS, make_model
from support.machines_in_process import build_over_machines, machine_maps
from support.model_builder import build_model, run_chunks, together

pytest.importorskip("transformers")

# On three machines as well: experts, a window, frequencies by length.
IN_THREE = ("mixtral", "gemma2", "llama-dynamic")
IDS = [(7 * i * i + 3) % 331 for i in range(44)]
TEXTS = [IDS, IDS[20:], IDS[10:30]]


def outputs(model, cache):
    """Return logits of a text in chunks, of one token by token, and of three in one pass."""
    return [
        run_chunks(model, cache, IDS, 17), run_chunks(model, cache, IDS[:20], 1, total=44),
        together(model, cache, TEXTS),
    ]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_machines_give_the_bits_of_one(name, tmp_path):
    make_model(name, 3, tmp_path / "m", "float16")
    ops, options = get_ops("cpu"), {"cache_type": "q4", "sequences": 3}
    expected = outputs(*build_model(tmp_path / "m", ops, **options))
    count = MODELS[name][1].get("num_hidden_layers", 3)
    for firsts in ((0, 1), (0, 1, 2))[: 2 if name in IN_THREE else 1]:
        model, cache, ring = build_over_machines(
            tmp_path / "m", ops, machine_maps(count, *firsts), **options
        )
        assert all(map(torch.equal, outputs(model, cache), expected)), firsts
        assert "pass" in ring.sent


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q3"])
def test_reused_pages_are_copied_on_every_machine(cache_type, tmp_path):
    """A text that begins as one before reuses whole pages, and copies of the rest."""
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    ops = get_ops("cpu")
    options = {"cache_type": cache_type, "sequences": 2, "ctx_size": 1024}
    text = [(5 * i * i + i) % 331 for i in range(700)]
    found = []
    for build in (
        lambda: build_model(tmp_path / "m", ops, **options),
        lambda: build_over_machines(tmp_path / "m", ops, machine_maps(3, 0, 1, 2), **options)[:2],
    ):
        model, cache = build()
        rows, reused = [], []
        for ids in (text[:600], text[:590] + text[:9], text[:300] + text[20:60], text[:600]):
            sequence = cache.acquire(len(ids), ids)
            reused.append(sequence.past_len)
            while sequence.past_len < len(ids):
                end = min(sequence.past_len + 100, sequence.end_of_pass(sequence.past_len))
                rows.append(model.forward([(sequence, ids[sequence.past_len : end])]).clone())
                cache.commit(sequence, ids)
            cache.release(sequence)
        found.append((reused, torch.cat(rows)))
    assert found[0][0] == found[1][0] and max(found[0][0]) > 256
    assert torch.equal(found[0][1], found[1][1])


def test_flights_end_in_order_and_keep_their_rows(tmp_path):
    make_model("qwen2", 3, tmp_path / "m", "float16")
    options = {"cache_type": "q8", "sequences": 4}
    one, cache = build_model(tmp_path / "m", get_ops("cpu"), **options)
    expected = []
    for ids in TEXTS:
        sequence = cache.acquire(len(ids))
        one.forward([(sequence, ids[:-1])], "none")
        expected.append(one.forward([(sequence, ids[-1:])]).clone())
    model, cache, ring = build_over_machines(
        tmp_path / "m", get_ops("cpu"), machine_maps(3, 0, 2), lag=99, **options
    )
    assert (model.most_in_flight, model.decoding_in_flight) == (4, 2)
    flights = []
    for ids in TEXTS:
        sequence = cache.acquire(len(ids))
        flights.append(model.start_rows([(sequence, ids[:-1])], "none"))
        assert sequence.past_len == len(ids) - 1
        flights.append(model.start_rows([(sequence, ids[-1:])]))
    late = cache.acquire(len(IDS))
    for i, flight in enumerate(flights):
        rows = flight.rows()
        if i == 1:
            # What is started meanwhile leaves the rows as they are.
            behind = model.start_rows([(late, IDS)])
        if i % 2:
            assert torch.equal(torch.from_numpy(rows[0].values)[None], expected[i // 2])
        else:
            assert rows == []
    assert torch.equal(torch.from_numpy(behind.rows()[0].values)[None], expected[0])


def test_a_pass_that_fails_on_a_machine_ends_alone(tmp_path, monkeypatch):
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    ops = get_ops("cpu")
    model, cache, ring = build_over_machines(tmp_path / "m", ops, machine_maps(3, 0, 1, 2))
    sequence = cache.acquire(20)
    expected = model.forward([(sequence, IDS[:5])]).clone()
    run, calls = ring.machines[0]._layers.run, []

    def fail_once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("the card fell off")
        return run(*args, **options)

    monkeypatch.setattr(ring.machines[0]._layers, "run", fail_once)
    sequence.past_len = 0
    with pytest.raises(MachineFailed, match=r"machine 1 \(host1\).*the card fell off"):
        model.forward([(sequence, IDS[:5])])
    assert sequence.past_len == 0
    assert torch.equal(model.forward([(sequence, IDS[:5])]), expected)


@pytest.mark.parametrize("entry", [
    [3, 0, 8, -1, 1], [3, 0, 8, -1, 1, 99], [3, 0, 8, -1, 1, -1], [3, 255, 300, -1, 1, 0],
    [0, 0, 8, -1, 1, 0], [3, -1, 8, -1, 1, 0], [3, 0, 8, 0, 1, 0], [3, 0, 8], [4, 0, 8, -1, 1, 0],
    [3, 0, 0, -1, 1, 0], [3, 0, 8, -2, 1, 0], [3, 0, 8, -1, -1], [], [3, 0, 8, -1, 9, *range(9)],
])
def test_a_pass_outside_the_tensors_is_refused(entry, tmp_path):
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    _, _, ring = build_over_machines(tmp_path / "m", get_ops("cpu"), machine_maps(3, 0, 1))
    hidden = np.zeros((3, ring.machines[0]._layers.hidden_size), np.float32)
    frame = Frame("pass", {"logits": "last"}, (np.array(entry, np.int32), hidden))
    with pytest.raises(MachineFailed):
        raise error_from(ring.machines[0].run(frame).fields["error"], None)


@pytest.mark.parametrize(("kind", "fields"), [
    ("copy tokens", {"source": 0, "target": 99, "count": 1}),
    ("copy tokens", {"source": -1, "target": 0, "count": 1}),
    ("copy tokens", {"source": 0, "target": 1, "count": 257}),
    ("copy tokens", {"source": 0, "target": True, "count": 1}),
    ("copy open page", {"source": 0, "target": 0, "count": 1}),
    ("unknown", {}),
])
def test_a_copy_outside_the_cache_is_refused(kind, fields, tmp_path):
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    _, _, ring = build_over_machines(tmp_path / "m", get_ops("cpu"), machine_maps(3, 0, 1))
    with pytest.raises(InvalidFrame):
        ring.machines[0].run(Frame(kind, fields))


def test_what_needs_one_machine_is_refused_with_what_to_do(tmp_path):
    make_model("llama-tied", 3, tmp_path / "m", "float16")
    options = {"cache_type": "q4", "sequences": 1}
    model, cache, _ = build_over_machines(
        tmp_path / "m", get_ops("cpu"), machine_maps(3, 0, 1), **options
    )
    with pytest.raises(InvalidCall, match="on 2 machines.* or merge the adapter"):
        model.load_lora(None, 1.0)
    with pytest.raises(InvalidCall, match="on 2 machines.*Load it without machines"):
        model.with_cache(cache)


def test_entries_survive_the_way():
    sequences = [PagedSequence([4, 2], 200, 999, open_page=3), PagedSequence([0], 0, 1)]
    entries = [(sequences[0], [5, 6, 7]), (sequences[1], [8])]
    found = unpack_entries(pack_entries(entries))
    assert [(s.pages, s.past_len, s.rope_len, s.open_page, len(ids)) for s, ids in found] == [
        ([4, 2], 200, 999, 3, 3), ([0], 0, 1, None, 1)]
