"""The plan equals the table and the allocated buffers; splits, largest contexts, options."""

from __future__ import annotations

import collections
import itertools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_loader
from exl_loader.backends import backend_of
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.cache.layout import PAGE_LEN, CacheType, pages_for
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.memory import buffers as memory
from exl_loader.memory.reservation import LoadOptions, plan, planned
from exl_loader.memory.reservation.costs import PlacedModel, segments_of
from exl_loader.memory.reservation.options import RunOptions
from exl_loader.memory.reservation.text import render
from exl_loader.memory.segments import lay_out
from exl_loader.model.builder import build_parts
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings
from exl_loader.utils.table import DeviceMap, TensorSpec
from support.sparse import LLAMA_2_7B, write_sparse_exl2

GIB, MIB = 1 << 30, 1 << 20
CACHE_TYPES = ("fp16", "q8", "q6", "q4", "q3")


@st.composite
def geometries(draw, head_dims=(32, 64, 80, 96, 100, 128, 256)):
    """Draw the config of a small Llama, tied or not, with grouped heads or not."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from(head_dims)),
        "hidden_size": 32 * draw(st.integers(1, 9)),
        "intermediate_size": 32 * draw(st.integers(1, 9)),
        "vocab_size": draw(st.integers(260, 1000)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def aligned_sum(specs, device: str, segment: str) -> int:
    """Sum a segment by hand: every tensor rounded up to the device's alignment.

    Of tensors that share memory the largest phase counts.
    """
    step, phases = backend_of(device).alignment_bytes, collections.Counter()
    for spec in specs:
        if (spec.device, spec.segment) == (device, segment):
            phases[spec.phase] += -(-spec.nbytes // step) * step
    return phases.pop(None, 0) + max(phases.values(), default=0)


def split_limits(draw, total: int, count: int) -> list[int]:
    return [draw(st.integers(total // count // 2, total)) for _ in range(count)]


@settings(max_examples=25)
@given(
    config=geometries(),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    pair=st.tuples(*[st.sampled_from(CACHE_TYPES)] * 2),
    ctx_size=st.integers(1, 4 * PAGE_LEN),
    chunk_size=st.integers(4, 96),
    max_batch_size=st.integers(1, 4),
    num_devices=st.integers(1, 3),
    data=st.data(),
)
def test_the_plan_equals_the_table_and_the_allocated_buffers(
    config, bits, pair, ctx_size, chunk_size, max_batch_size, num_devices, data
):
    names = [f"cpu:{i}" for i in range(num_devices)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(Path(temporary) / "m", bits=bits, shards=2, **config)
        options = {"chunk_size": chunk_size, "max_batch_size": max_batch_size}
        total = plan(folder, ctx_size=ctx_size, cache_type="_".join(pair), **options).total_bytes
        limits = split_limits(data.draw, total, num_devices)
        options |= {"device": names, "gpu_split": [limit / GIB for limit in limits]}
        chosen = LoadOptions(ctx_size=ctx_size, cache_type="_".join(pair), **options)
        with planned(folder, chosen) as model:
            reservation, segments = model.reservation, model.segments
        buffers = memory.allocate(segments)
    specs = [tensor.spec for segment in segments for tensor in segment.offsets]
    for device in reservation.devices:
        for segment in ("weights", "cache", "workspace"):
            planned_bytes = getattr(device, f"{segment}_bytes")
            assert planned_bytes == aligned_sum(specs, device.device, segment)
            assert planned_bytes == buffers.allocated_bytes(device.device, segment)
        assert device.total_bytes == buffers.allocated_bytes(device.device)
    assert reservation.total_bytes == buffers.allocated_bytes()
    ranges = [(d.first_layer, d.end_layer) for d in reservation.devices]
    assert [i for first, end in ranges for i in range(first, end)] == list(
        range(config["num_hidden_layers"])
    )


@settings(max_examples=25)
@given(config=geometries(head_dims=(32, 64, 96, 128, 160, 256)), ctx_size=st.integers(1, 100_000))
def test_cache_bytes_are_exactly_the_bits_of_the_cache_type(config, ctx_size):
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(Path(temporary) / "m", **config)
        names = [*CACHE_TYPES, "q8_q4", "q4_q6", "q8_q3"]
        found = {
            name: plan(folder, ctx_size=ctx_size, cache_type=name).cache_bytes for name in names
        }
    assert found["q4"] * 85 == found["q8"] * 45
    assert found["q4"] * 160 == found["fp16"] * 45
    assert found["q3"] * 45 == found["q4"] * 35
    tokens = pages_for(ctx_size) * PAGE_LEN
    elements = tokens * config["num_hidden_layers"] * config["num_key_value_heads"]
    elements *= config["head_dim"]
    bits = {"q8": 8.5, "q6": 6.5, "q4": 4.5, "q3": 3.5, "fp16": 16}
    for name in names:
        k, v = (name.split("_") * 2)[:2]
        assert found[name] == elements * (bits[k] + bits[v]) / 8


def fits_somehow(folder: Path, ctx_size: int, names: list[str], limits: list[int]) -> bool:
    """Try every contiguous split, by laying out its whole table."""
    config = ModelConfig.from_dir(folder)
    options = RunOptions(CacheType.parse("q4"), 64).at(512)
    cuts = range(config.num_hidden_layers + 1)
    with Checkpoint.open(folder) as checkpoint:
        for inner in itertools.combinations_with_replacement(cuts, len(names) - 1):
            ends = [*inner, config.num_hidden_layers]
            layers = [names[sum(end <= i for end in ends)] for i in range(len(cuts) - 1)]
            where = DeviceMap(layers[0], tuple(layers), layers[-1])
            parts = build_parts(config, checkpoint, where)
            table = segments_of(PlacedModel(parts, checkpoint, ctx_size, ctx_size), options)
            taken = dict.fromkeys(names, 0)
            for (device, _), segment in table.items():
                taken[device] += segment.nbytes
            if all(taken[name] <= limit for name, limit in zip(names, limits, strict=True)):
                return True
    return False


@settings(max_examples=30)
@given(config=geometries(), num_devices=st.integers(1, 3), data=st.data())
def test_a_split_is_found_exactly_where_there_is_one(config, num_devices, data):
    names = [f"cpu:{i}" for i in range(num_devices)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(Path(temporary) / "m", **config)
        total = plan(folder, ctx_size=600, cache_type="q4", chunk_size=64).total_bytes
        limits = split_limits(data.draw, total, num_devices)
        found = plan(
            folder, ctx_size=600, cache_type="q4", chunk_size=64, device=names,
            gpu_split=[n / GIB for n in limits],
        )
        assert found.fits == fits_somehow(folder, 600, names, limits)


@settings(max_examples=10)
@given(config=geometries(), cards=st.integers(1, 3), data=st.data())
def test_the_largest_context_fits_and_one_page_more_does_not(config, cards, data):
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(Path(temporary) / "m", **config)
        sizes = [data.draw(st.integers(514 * MIB, 1024 * MIB)) for _ in range(cards)]
        found = plan(folder, ctx_size=1, cache_type="q8_q4", vram=sizes)
        for cache_type, tokens in found.largest_ctx_size.items():
            assert tokens % PAGE_LEN == 0
            options = {"cache_type": cache_type, "vram": sizes}
            assert tokens == 0 or plan(folder, ctx_size=tokens, **options).fits
            assert not plan(folder, ctx_size=tokens + 1, **options).fits
        assert set(found.largest_ctx_size) == {*CACHE_TYPES, "q8_q4"}


@pytest.mark.parametrize("draft", [False, True])
def test_bytes_by_cache_type_are_those_of_a_plan_with_it(tmp_path, draft):
    folder = write_sparse_exl2(tmp_path / "m", num_hidden_layers=4)
    options = {"model_draft": folder, "ctx_size_draft": 300} if draft else {}
    found = plan(folder, ctx_size=5000, cache_type="q8_q4", **options)
    assert set(found.bytes_by_cache_type) == {*CACHE_TYPES, "q8_q4"}
    for cache_type, nbytes in found.bytes_by_cache_type.items():
        assert nbytes == plan(folder, ctx_size=5000, cache_type=cache_type, **options).total_bytes
    assert found.to_dict()["bytes_by_cache_type"] == found.bytes_by_cache_type


def test_a_card_without_room_for_a_layer_is_skipped(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", num_hidden_layers=4)
    found = plan(folder, ctx_size=256, vram=["1MiB", "600MiB", "600MiB"])
    assert [device.device for device in found.devices] == ["cuda:1", "cpu"]
    assert found.fits and found.devices[0].has_layers and not found.devices[1].has_layers


def test_the_shortfall_is_shown_on_the_last_card(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", num_hidden_layers=4)
    found = plan(folder, ctx_size=256, vram=["1MiB", "513MiB"])
    assert not found.fits
    last, main_memory = found.devices
    assert last.device == "cuda:1" and last.missing_bytes > 0 and main_memory.fits
    assert found.largest_ctx_size == dict.fromkeys(CACHE_TYPES, 0)


def test_context_defaults(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", max_position_embeddings=32768)
    short = write_sparse_exl2(tmp_path / "short", max_position_embeddings=2048)
    assert plan(folder).ctx_size == 8192
    assert plan(short).ctx_size == 2048
    assert plan(short, compress_pos_emb=2.0).ctx_size == 4096
    assert plan(short, alpha_value=8.0).ctx_size == 8192
    assert plan(folder, ctx_size="auto").ctx_size == 32768
    machine(free_bytes=4 * MIB)
    found = plan(folder, ctx_size="auto", cache_type="q6")
    assert found.ctx_size == found.largest_ctx_size["q6"] < 32768
    assert found.fits and not plan(folder, ctx_size=found.ctx_size + 1, cache_type="q6").fits
    machine(free_bytes=MIB // 8)
    assert plan(folder, ctx_size="auto").ctx_size == PAGE_LEN
    assert not plan(folder, ctx_size="auto").fits


def test_the_limit_may_be_the_reservation_itself(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m")
    total = plan(folder, ctx_size=5000, cache_type="q4").total_bytes
    exact = plan(folder, ctx_size=5000, cache_type="q4", memory_limit=total)
    assert exact.fits and exact.devices[0].headroom_bytes == 0
    assert exact.largest_ctx_size["q4"] == pages_for(5000) * PAGE_LEN
    short = plan(folder, ctx_size=5000, cache_type="q4", memory_limit=total - 1)
    assert not short.fits and short.devices[0].missing_bytes == 1


def test_the_limit_of_the_environment_is_the_capacity(
    tmp_path, machine, no_other_model, monkeypatch
):
    folder = write_sparse_exl2(tmp_path / "m")
    machine(GIB)
    total = plan(folder, ctx_size=5000).total_bytes
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(total))
    device = plan(folder, ctx_size=5000).devices[0]
    assert device.fits and device.headroom_bytes == 0
    assert device.capacity_bytes == device.free_bytes == total
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(total - 1))
    assert plan(folder, ctx_size=5000).devices[0].missing_bytes == 1
    assert plan(folder, ctx_size=5000, memory_limit=100).devices[0].limit_bytes == 100
    assert plan(folder, ctx_size=5000, vram="24GiB").devices[0].limit_bytes is None


def test_a_plan_that_replaces_the_loaded_model_counts_its_memory_as_free(
    tmp_path, machine, no_other_model, monkeypatch
):
    folder = write_sparse_exl2(tmp_path / "m")
    machine(64 * MIB, capacity_bytes=128 * MIB)
    before = plan(folder, ctx_size=4096)
    specs = [TensorSpec("t", "weights", "uint8", (8 * MIB,))]
    buffers = memory.allocate(lay_out(specs).values())
    after = plan(folder, ctx_size=4096, replacing=True)
    assert after.devices[0].free_bytes == before.devices[0].free_bytes + 8 * MIB
    limit = before.total_bytes
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(limit))
    assert plan(folder, ctx_size=4096, replacing=True).fits
    assert not plan(folder, ctx_size=4096).fits
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(limit - 1))
    assert plan(folder, ctx_size=4096, replacing=True).devices[0].missing_bytes == 1
    buffers.release()


def test_gpu_split_limits_our_buffers(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", num_hidden_layers=4)
    whole = plan(folder, ctx_size=1024, vram="24GiB")
    share = (whole.workspace_bytes + whole.cache_bytes // 2 + whole.weights_bytes // 2) / GIB
    found = plan(folder, ctx_size=1024, vram="24GiB,24GiB", gpu_split=f"{share},1")
    assert [d.device for d in found.devices] == ["cuda:0", "cuda:1", "cpu"]
    assert found.devices[2].limit_bytes is None
    assert found.devices[0].total_bytes <= int(share * GIB) == found.devices[0].limit_bytes
    assert found.devices[1].limit_bytes == GIB


def test_a_card_that_is_not_here_has_an_assumed_context(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m")
    device, main_memory = plan(folder, vram="24GiB").devices
    assert main_memory.capacity_bytes == backend_of("cpu").capacity("cpu").capacity_bytes
    assert (device.device, device.capacity_bytes) == ("cuda:0", 24 * GIB)
    assert not device.overhead_measured and device.overhead_bytes > 0
    assert "(assumed)" in render(plan(folder, vram="24GiB"))
    import torch  # noqa: F401

    assert plan(folder).devices[0].overhead_measured


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ctx_size": 0}, "ctx_size"),
        ({"ctx_size": -5}, "ctx_size"),
        ({"ctx_size": True}, "ctx_size"),
        ({"ctx_size": 1.5}, "ctx_size"),
        ({"ctx_size": "most"}, "ctx_size"),
        ({"ctx_size": 1 << 31}, "ctx_size"),
        ({"cache_type": "q5"}, "cache_type"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 2, "max_batch_size": 4}, "chunk_size"),
        ({"max_batch_size": "4"}, "max_batch_size"),
        ({"memory_limit": "a lot"}, "memory_limit"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"gpu_split": "1,x"}, "gpu_split"),
        ({"gpu_split": "1,-2"}, "gpu_split"),
        ({"gpu_split": [0.5], "vram": [GIB, GIB]}, "gpu_split"),
        ({"vram": "none"}, "vram"),
        ({"vram": "1GiB", "device": ["cuda:0", "cuda:1"]}, "vram"),
        ({"device": "tpu"}, "device"),
        ({"device": []}, "device"),
        ({"device": "cpu,cpu"}, "device"),
        ({"device": None}, "device"),
        ({"device": ["cpu", 0]}, "device"),
        ({"alpha_value": 0.0}, "alpha_value"),
        ({"alpha_value": float("inf")}, "alpha_value"),
        ({"alpha_value": "2"}, "alpha_value"),
        ({"compress_pos_emb": float("nan")}, "compress_pos_emb"),
    ],
)
def test_invalid_options_are_refused_by_name(tmp_path, options, named):
    folder = write_sparse_exl2(tmp_path / "m")
    with pytest.raises(InvalidSettings) as caught:
        plan(folder, **options)
    assert str(caught.value).startswith(named)


def test_a_huge_context_is_planned_and_does_not_fit(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m")
    found = plan(folder, ctx_size=(1 << 31) - 1)
    assert not found.fits and found.cache_bytes > 1 << 38


def test_json_names_are_the_attributes(tmp_path):
    found = plan(write_sparse_exl2(tmp_path / "m"), ctx_size=3000, cache_type="q8_q4")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["model_dir"] == str(tmp_path / "m")
    for name, value in values.items():
        if name != "devices":
            assert getattr(found, name) == value
    (device,) = values["devices"]
    for name, value in device.items():
        assert getattr(found.devices[0], name) == value
    assert (
        values["total_bytes"]
        == device["total_bytes"]
        == sum(device[f"{part}_bytes"] for part in ("weights", "cache", "workspace"))
    )
    assert device["needed_bytes"] == device["total_bytes"] + device["overhead_bytes"]


def test_load_refuses_before_a_weight_is_read_or_a_buffer_exists(tmp_path, machine, monkeypatch):
    folder = write_sparse_exl2(tmp_path / "m")
    total = plan(folder, ctx_size=4096, cache_type="q4").total_bytes
    monkeypatch.setattr(Checkpoint, "_read", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr(CpuBackend, "empty", lambda *_: pytest.fail("a buffer was taken"))
    machine(GIB)
    with pytest.raises(InsufficientMemory) as caught:
        exl_loader.load(folder, ctx_size=4096, cache_type="q4", memory_limit=total - 1)
    assert caught.value.reservation.devices[0].missing_bytes == 1


def test_free_memory_holds_the_overhead_as_well(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m")
    machine(GIB)
    (device,) = plan(folder, ctx_size=4096).devices
    needed, total = device.needed_bytes, device.total_bytes
    assert needed > total
    machine(needed)
    exact = plan(folder, ctx_size=4096)
    assert exact.fits and exact.devices[0].headroom_bytes == 0
    machine(needed - 1)
    assert plan(folder, ctx_size=4096).devices[0].missing_bytes == 1
    # A limit that is no tighter than the system's free memory does not hide the overhead.
    assert not plan(folder, ctx_size=4096, memory_limit=total).fits


def test_a_quantised_cache_never_takes_more_than_16_bits(tmp_path):
    """From three pages of context on, open pages take less than the codes save."""
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    for ctx_size in (768, 1024, 2048, 3840, 4096, 8192, 16384, 65536):
        sizes = plan(folder, ctx_size=ctx_size, vram="200GiB").bytes_by_cache_type
        assert sizes["q4"] < sizes["q6"] < sizes["q8"] < sizes["fp16"], (ctx_size, sizes)
