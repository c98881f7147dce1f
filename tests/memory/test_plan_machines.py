"""Plans over several machines, whose answers come through real JSON."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.backends.cuda.backend import CudaBackend
from exl_loader.cache.layout import PAGE_LEN, CacheType, cache_specs, pages_for
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.memory import buffers as memory
from exl_loader.memory.reservation import LoadOptions, plan, planned
from exl_loader.memory.reservation.questions import ASSIGN, PLAN, RECORDS, to_json
from exl_loader.memory.segments import lay_out
from exl_loader.model.builder import build_parts
from exl_loader.model.step import workspace_specs
from exl_loader.utils.errors import InvalidSettings
from exl_loader.utils.table import DeviceMap
from support.plan_machines import FakeConnection, plan_over
from support.sparse import LLAMA_2_7B, write_sparse_exl2

GIB, MIB = 1 << 30, 1 << 20
ON_CPU = LoadOptions(device="cpu")
SMALL = {"ctx_size": 600, "cache_type": "q4", "chunk_size": 64, "max_batch_size": 2}


def machines_for(folder, count: int) -> FakeConnection:
    """Return so many other machines with a CPU, all of which have the folder."""
    return FakeConnection([folder] * count, [ON_CPU] * count)


def gib(limits) -> str:
    """Write limits in bytes as a `gpu_split` of machines with one device each, exactly."""
    return ";".join(repr(limit / GIB) for limit in limits)


def over(connection, folder, limits, **options):
    """Plan over machines with a CPU each, whose buffers may take so many bytes."""
    return plan_over(connection, folder, device="cpu", gpu_split=gib(limits), **(SMALL | options))


def layers_of(found) -> list[tuple[int, int, int]]:
    return [(d.machine, d.first_layer, d.end_layer) for d in found.devices]


@settings(max_examples=15)
@given(
    num_layers=st.integers(2, 6),
    is_tied=st.booleans(),
    counts=st.lists(st.integers(1, 2), min_size=2, max_size=4),
    shares=st.lists(st.floats(0.15, 0.9), min_size=8, max_size=8),
    cache_type=st.sampled_from(["fp16", "q4", "q8_q3"]),
    has_limits=st.booleans(),
)
def test_every_machine_allocates_its_part_of_the_plan(
    num_layers, is_tied, counts, shares, cache_type, has_limits
):
    options = SMALL | {"cache_type": cache_type}
    names = [",".join(f"cpu:{i}" for i in range(count)) for count in counts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(
            Path(temporary) / "m", num_hidden_layers=num_layers, tie_word_embeddings=is_tied
        )
        connection = FakeConnection(
            [temporary] * (len(counts) - 1), [LoadOptions(device=name) for name in names[1:]]
        )
        one = plan(folder, device="cpu", **options)
        limits = (share * one.total_bytes / GIB for share in shares)
        split = ";".join(",".join(str(next(limits)) for _ in range(count)) for count in counts)
        chosen = LoadOptions(
            device=names[0], gpu_split=split if has_limits else None, **options
        )
        with planned(folder, chosen, connection) as model:
            found, segments = model.reservation, {0: model.segments}
            for place, asked in model.others.items():
                fields = json.loads(json.dumps(to_json(asked)))
                segments[place] = connection.answers[place - 1].part(fields).segments
        connection.close()
    for place, own in segments.items():
        buffers = memory.allocate(own)
        there = [device for device in found.devices if device.machine == place]
        assert buffers.allocated_bytes() == sum(device.total_bytes for device in there)
        for device in there:
            assert buffers.allocated_bytes(device.device) == device.total_bytes
            assert buffers.allocated_bytes(device.device, "cache") == device.cache_bytes
    layers = [i for d in found.devices for i in range(d.first_layer, d.end_layer)]
    assert layers == list(range(num_layers))
    assert {d.machine for d in found.devices} == set(segments)
    assert [d.host for d in found.devices] == [f"host-{'abcd'[d.machine]}" for d in found.devices]
    assert found.cache_bytes == one.cache_bytes
    assert found.bytes_by_cache_type[cache_type] == found.total_bytes


def table_bytes(folder, layers: range, options) -> int:
    """Return the bytes of layers on a machine of one device, from its table."""
    return sum(machine_bytes(folder, [layers], options).values())


def machine_bytes(folder, ranges, options) -> dict[str, int]:
    """Return the bytes on each device of a machine, for the layers of each, from its table."""
    config, kind = ModelConfig.from_dir(folder), CacheType.parse(options["cache_type"])
    layers = [f"cpu:{i}" for i, part in enumerate(ranges) for _ in part]
    if not layers:
        return {}
    first = min(part.start for part in ranges if part)
    ends = (layers[0], layers[-1]) if first == 0 else (None, None)
    where = DeviceMap(ends[0], tuple(layers), ends[1], first)
    with Checkpoint.open(folder) as checkpoint:
        parts = build_parts(config, checkpoint, where)
    specs = [
        *parts.specs(), *cache_specs(config, pages_for(options["ctx_size"]), kind, where),
        *workspace_specs(
            parts.stages(), ctx_size=options["ctx_size"], cache_type=kind,
            chunk_size=options["chunk_size"], max_batch_size=options["max_batch_size"],
        ),
    ]
    taken = dict.fromkeys(layers, 0)
    for (device, _), segment in lay_out(specs).items():
        taken[device] += segment.nbytes
    return taken


def fits_somehow(folder, num_layers: int, limits) -> bool:
    """Try every contiguous split that leaves a layer on the first machine.

    Args:
        limits: of each device of each machine.
    """
    count = sum(map(len, limits))
    for inner in itertools.combinations_with_replacement(range(num_layers + 1), count - 1):
        edges = itertools.pairwise([0, *inner, num_layers])
        parts = iter([range(first, end) for first, end in edges])
        by_machine = [[next(parts) for _ in own] for own in limits]
        if any(by_machine[0]) and all(
            nbytes <= own[int(device.removeprefix("cpu:"))]
            for ranges, own in zip(by_machine, limits, strict=True)
            for device, nbytes in machine_bytes(folder, ranges, SMALL).items()
        ):
            return True
    return False


@settings(max_examples=20)
@given(
    num_layers=st.integers(2, 5), is_tied=st.booleans(),
    shares=st.lists(
        st.lists(st.floats(0.2, 0.9), min_size=1, max_size=2), min_size=2, max_size=2
    ),
)
def test_a_split_over_machines_is_found_exactly_where_there_is_one(num_layers, is_tied, shares):
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(
            Path(temporary) / "m", num_hidden_layers=num_layers, tie_word_embeddings=is_tied
        )
        total = plan(folder, device="cpu", **SMALL).total_bytes
        limits = [[int(share * total) for share in own] for own in shares]
        names = [",".join(f"cpu:{i}" for i in range(len(own))) for own in limits]
        split = ";".join(",".join(repr(limit / GIB) for limit in own) for own in limits)
        connection = FakeConnection([folder], [LoadOptions(device=names[1])])
        found = plan_over(connection, folder, device=names[0], gpu_split=split, **SMALL)
        connection.close()
        assert found.fits == fits_somehow(folder, num_layers, limits)


@settings(max_examples=4)
@given(shares=st.lists(st.floats(0.3, 1.5), min_size=2, max_size=4))
def test_the_largest_context_over_machines_fits_and_one_page_more_does_not(shares):
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(Path(temporary) / "m", num_hidden_layers=4)
        total = plan(folder, device="cpu", **(SMALL | {"ctx_size": 2000})).total_bytes
        limits = [int(share * total) for share in shares]
        connection = machines_for(folder, len(limits) - 1)
        found = over(connection, folder, limits)
        for cache_type in ("fp16", "q4"):
            tokens = found.largest_ctx_size[cache_type]
            assert tokens % PAGE_LEN == 0
            longer = over(connection, folder, limits, ctx_size=tokens + 1, cache_type=cache_type)
            assert not longer.fits
            if tokens:
                most = over(connection, folder, limits, ctx_size=tokens, cache_type=cache_type)
                assert most.fits and most.total_bytes == most.bytes_by_cache_type[cache_type]
        automatic = over(connection, folder, limits, ctx_size="auto")
        assert automatic.ctx_size == max(PAGE_LEN, found.largest_ctx_size["q4"])
        connection.close()


def slowest(work, ranges) -> int:
    """Return the most bytes that a machine reads in a step."""
    ends = [work[1]] + [0] * (len(ranges) - 1)
    return max(sum(work[0][n] for n in part) + end for part, end in zip(ranges, ends, strict=True))


def work_of(folder, options) -> tuple[list[int], int]:
    """Return the bytes of each layer with its cache, and of final norm and head."""
    config = ModelConfig.from_dir(folder)
    with Checkpoint.open(folder) as checkpoint:
        parts = build_parts(
            config, checkpoint, DeviceMap.single("cpu", config.num_hidden_layers)
        )
        cache = plan(folder, device="cpu", **options).cache_bytes // config.num_hidden_layers
        sizes = [sum(spec.nbytes for spec in layer.specs()) + cache for layer in parts.layers]
        return sizes, sum(spec.nbytes for spec in parts.ends[1].specs())


def ranges_of(found, count: int) -> list[range]:
    """Return the layers of each machine of one device."""
    ranges = {d.machine: range(d.first_layer, d.end_layer) for d in found.devices}
    return [ranges.get(place, range(0)) for place in range(count)]


@settings(max_examples=20)
@given(
    num_layers=st.integers(2, 6), is_tied=st.booleans(), vocab_size=st.sampled_from([320, 3200]),
    shares=st.lists(st.floats(0.2, 1.2), min_size=2, max_size=3),
    cache_type=st.sampled_from(["fp16", "q4"]),
)
def test_work_is_split_evenly_as_far_as_memory_allows(
    num_layers, is_tied, vocab_size, shares, cache_type
):
    options = SMALL | {"cache_type": cache_type}
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(
            Path(temporary) / "m", num_hidden_layers=num_layers, tie_word_embeddings=is_tied,
            vocab_size=vocab_size,
        )
        total = plan(folder, device="cpu", **options).total_bytes
        # The limit of the first machine holds for the others as well.
        limits = sorted((int(share * total) for share in shares), reverse=True)
        connection = FakeConnection(
            [folder] * (len(limits) - 1),
            [LoadOptions(device="cpu", memory_limit=limit) for limit in limits[1:]],
        )
        chosen = {"device": "cpu", "memory_limit": limits[0]} | options
        found = plan_over(connection, folder, **chosen)
        work = work_of(folder, options)
        fitting = []
        for inner in itertools.combinations_with_replacement(
            range(1, num_layers + 1), len(limits) - 1
        ):
            edges = itertools.pairwise([0, *inner, num_layers])
            ranges = [range(first, end) for first, end in edges]
            if all(
                not part or table_bytes(folder, part, options) <= limit
                for part, limit in zip(ranges, limits, strict=True)
            ):
                fitting.append(ranges)
        assert found.fits == bool(fitting)
        if fitting:
            assert slowest(work, ranges_of(found, len(limits))) == min(
                slowest(work, ranges) for ranges in fitting
            )
        # The largest context is the one that fits in any split.
        tokens = found.largest_ctx_size[cache_type]
        longer = plan_over(connection, folder, **chosen | {"ctx_size": tokens + 1})
        assert not longer.fits
        if tokens:
            most = plan_over(connection, folder, **chosen | {"ctx_size": tokens})
            assert most.fits and most.total_bytes == most.bytes_by_cache_type[cache_type]
        connection.close()


KINDS = {"cpu": "cpu", "cards": "cuda:0,cuda:1", "card and cpu": "cuda:0,cpu"}


@settings(max_examples=25)
@given(
    num_layers=st.integers(2, 6),
    is_tied=st.booleans(),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=3),
    shares=st.lists(st.floats(0.2, 1.2), min_size=6, max_size=6),
    embedding_device=st.sampled_from(["auto", "cpu", "cuda:0"]),
)
def test_machines_may_have_devices_of_several_kinds(
    num_layers, is_tied, kinds, shares, embedding_device
):
    """The plan itself compares every sum with the table that is laid out."""
    names = [KINDS[kind].split(",") for kind in kinds]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_sparse_exl2(
            Path(temporary) / "m", num_hidden_layers=num_layers, tie_word_embeddings=is_tied
        )
        own = [
            LoadOptions(device=devices, vram=[GIB] * len(devices)) for devices in names
        ]
        connection = FakeConnection([folder] * (len(names) - 1), own[1:])
        total = plan(folder, device="cpu", **SMALL).total_bytes
        limits = (share * total / GIB for share in shares)
        split = ";".join(",".join(str(next(limits)) for _ in devices) for devices in names)
        options = {"device": names[0], "vram": own[0].vram, "gpu_split": split, **SMALL}
        if embedding_device in names[0]:
            options["embedding_device"] = embedding_device
        try:
            found = plan_over(connection, folder, 5 * MIB, **options)
        except InvalidSettings as error:
            # The first layer is on another device than the embedding was wanted on.
            assert error.thing == "embedding_device"
            return
        finally:
            connection.close()
    layers = [i for d in found.devices for i in range(d.first_layer, d.end_layer)]
    assert layers == list(range(num_layers))
    for place in {d.machine for d in found.devices}:
        there = [d for d in found.devices if d.machine == place]
        # Each machine that has layers needs main memory for the connection.
        assert sum(d.memory_name.endswith("main memory") for d in there) == 1
        assert place == 0 or not any(d.embedding_bytes for d in there)


@pytest.fixture
def folder(tmp_path):
    return write_sparse_exl2(tmp_path / "models" / "m", num_hidden_layers=6)


@pytest.fixture
def connection(folder):
    """Two other machines, one with a folder of models and one with the model's own."""
    made = FakeConnection([folder.parent, folder], [ON_CPU, ON_CPU])
    yield made
    made.close()


@pytest.mark.parametrize("split", ["1;1;3", "1;;", ";;", "2;1;2", "1;0.0001;5", "0.3;0.3;0.3"])
def test_a_plan_asks_each_machine_a_few_questions(split, tmp_path, machine):
    machine(free_bytes=6 * GIB)
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    connection = machines_for(folder, 2)
    plan_over(connection, folder, device="cpu", ctx_size=3000, cache_type="q4", gpu_split=split)
    connection.close()
    for place in (1, 2):
        count = {name: connection.asked[place, name] for name in (PLAN, ASSIGN, RECORDS)}
        # Of five cache types, each with a search of its own. A question takes up to 50 ms.
        assert count[PLAN] == 1 and count[RECORDS] <= 1 and count[ASSIGN] <= 10, count


def test_memory_that_no_even_split_fits_into_takes_few_more_questions(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    small = LoadOptions(device="cpu", memory_limit=GIB)
    connection = FakeConnection([folder] * 2, [small, LoadOptions(device="cpu")])
    found = plan_over(connection, folder, device="cpu", memory_limit=8 * GIB, **SMALL)
    connection.close()
    assert found.fits and [d.machine for d in found.devices] == [0, 1, 2]
    assert found.devices[1].end_layer - found.devices[1].first_layer < 10
    assert connection.asked[1, ASSIGN] <= 12


def test_a_machine_without_room_is_passed_over(connection, folder):
    found = over(connection, folder, [table_bytes(folder, range(2), SMALL), 1000, GIB])
    assert layers_of(found) == [(0, 0, 2), (2, 2, 6)] and found.fits
    assert found.hosts == ("host-a", "host-b", "host-c")
    assert found.to_dict()["hosts"] == ["host-a", "host-b", "host-c"]


def test_a_model_that_fits_within_the_first_limit_stays_there(connection, folder):
    found = over(connection, folder, [GIB, GIB, GIB])
    assert layers_of(found) == [(0, 0, 6)]
    alone = plan(folder, device="cpu", **SMALL)
    assert found.total_bytes == alone.total_bytes
    assert found.bytes_by_cache_type == alone.bytes_by_cache_type


def test_work_is_split_by_the_speed_of_machines(connection, folder):
    sizes, head = work_of(folder, SMALL)

    def change(speed):
        connection.change = lambda asked, reply: (
            reply | {"speed": speed} if asked == PLAN else reply
        )
        return ranges_of(plan_over(connection, folder, device="cpu", **SMALL), 3)

    speed = CpuBackend().relative_speed("cpu")
    equal = change(speed)
    assert slowest((sizes, head), equal) == min(
        slowest((sizes, head), [range(a), range(a, b), range(b, 6)])
        for a in range(1, 6) for b in range(a, 7)
    )
    assert change(100 * speed) == [range(1), range(1, 3), range(3, 6)]
    assert change(1)[0].stop >= equal[0].stop


def test_a_larger_cache_leaves_more_layers_to_the_machine_with_the_head(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", num_hidden_layers=6, vocab_size=3200)
    connection = machines_for(folder, 1)
    ends = [
        plan_over(
            connection, folder, device="cpu", **SMALL | {"ctx_size": ctx_size}
        ).devices[0].end_layer for ctx_size in (256, 1 << 16)
    ]
    connection.close()
    assert ends == [1, 3]


def test_a_draft_model_counts_as_work_of_the_first_machine(connection, folder):
    small = write_sparse_exl2(folder.parent / "d", num_hidden_layers=12)
    alone = ranges_of(plan_over(connection, folder, device="cpu", **SMALL), 3)
    found = plan_over(connection, folder, device="cpu", model_draft=small, **SMALL)
    assert found.devices[0].draft_bytes
    assert len(alone[0]) > len(ranges_of(found, 3)[0]) == 1


@pytest.mark.parametrize("device", ["cuda:0", "cuda:0,cpu"])
def test_machines_with_other_kinds_of_devices_are_filled_in_order(device, folder):
    other = LoadOptions(device=device, vram=[GIB] * len(device.split(",")))
    connection = FakeConnection([folder], [other])
    found = plan_over(connection, folder, device="cpu", **SMALL)
    connection.close()
    assert layers_of(found) == [(0, 0, 6)]
    cards = LoadOptions(device="cuda:0,cuda:1", vram=[GIB] * 2)
    connection = FakeConnection([folder], [cards])
    found = plan_over(connection, folder, device="cuda:0", vram=[GIB], **SMALL)
    connection.close()
    used = [d for d in found.devices if d.has_layers]
    assert [(d.machine, d.device) for d in used] == [(0, "cuda:0"), (1, "cuda:0")]
    assert 0 < used[0].end_layer < 6


def test_the_first_machine_keeps_a_layer_and_shows_what_it_lacks(connection, folder):
    found = over(connection, folder, [1000, GIB, GIB])
    assert layers_of(found) == [(0, 0, 1), (1, 1, 6)] and not found.fits
    assert not found.devices[0].fits and found.devices[1].fits
    assert set(found.largest_ctx_size.values()) == {0}


def test_the_last_machine_takes_the_rest_and_shows_what_it_lacks(connection, folder):
    found = over(connection, folder, [table_bytes(folder, range(2), SMALL), 1000, 1000])
    assert layers_of(found) == [(0, 0, 2), (2, 2, 6)] and not found.fits
    assert found.devices[0].fits and found.devices[-1].missing_bytes > 0


def test_what_the_connection_takes_is_in_the_overhead_of_each_machine(connection, folder):
    limits = [table_bytes(folder, range(2), SMALL), table_bytes(folder, range(2, 4), SMALL), GIB]
    options = {"device": "cpu", "gpu_split": gib(limits), **SMALL}
    without = plan_over(connection, folder, 0, **options)
    found = plan_over(connection, folder, 5 * MIB, **options)
    assert layers_of(found) == layers_of(without) == [(0, 0, 2), (1, 2, 4), (2, 4, 6)]
    for device, before in zip(found.devices, without.devices, strict=True):
        assert device.overhead_bytes == before.overhead_bytes + 5 * MIB
        assert device.total_bytes == before.total_bytes


def test_main_memory_has_a_record_where_only_cards_have_layers(folder):
    cards = LoadOptions(device="cuda:0,cuda:1", vram="1GiB,1GiB")
    connection = FakeConnection([folder], [cards])

    def split_at(limit: int):
        limits = f"{table_bytes(folder, range(2), SMALL) / GIB!r};{limit / GIB!r},1"
        return plan_over(connection, folder, 3 * MIB, device="cpu", gpu_split=limits, **SMALL)

    assert layers_of(split_at(GIB)) == [(0, 0, 2), (1, 2, 6), (1, 6, 6)]
    found = split_at(split_at(GIB).devices[1].total_bytes - 1)
    connection.close()
    assert [(d.machine, d.device) for d in found.devices] == [
        (0, "cpu"), (1, "cuda:0"), (1, "cuda:1"), (1, "cpu"),
    ]
    main_memory = found.devices[-1]
    assert not main_memory.has_layers and main_memory.total_bytes == 0
    assert main_memory.overhead_bytes >= 3 * MIB and main_memory.first_layer == 6


def test_a_draft_model_is_on_the_first_machine(connection, folder):
    small = write_sparse_exl2(folder.parent / "d", num_hidden_layers=1)
    draft = plan(folder, device="cpu", model_draft=small, **SMALL).devices[0].draft_bytes
    limits = [table_bytes(folder, range(2), SMALL) + draft, GIB, GIB]
    found = over(connection, folder, limits, model_draft=small)
    assert layers_of(found) == [(0, 0, 2), (1, 2, 6)]
    assert [d.draft_bytes for d in found.devices] == [draft, 0]


def test_a_machine_without_cards_takes_a_limit_for_main_memory(folder, monkeypatch):
    monkeypatch.setattr(CudaBackend, "auto_devices", lambda self, count: ["cuda:0"] * count)
    connection = FakeConnection([folder], [LoadOptions()])
    found = over(connection, folder, [table_bytes(folder, range(2), SMALL), GIB])
    connection.close()
    assert [(d.machine, d.device, d.limit_bytes) for d in found.devices][1] == (1, "cpu", GIB)


def test_a_limit_of_a_machine_of_its_own_holds(folder):
    limit = table_bytes(folder, range(3), SMALL)
    own = LoadOptions(device="cpu", memory_limit=1000)
    connection = FakeConnection([folder, folder], [own, ON_CPU])
    found = plan_over(connection, folder, device="cpu", memory_limit=limit, **SMALL)
    connection.close()
    assert {d.machine for d in found.devices} == {0, 2} and found.fits
    assert [d.limit_bytes for d in found.devices] == [limit] * 2


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("20", "3 parts divided by `;`, such as 20;20;20, one for each of the first machine "
         "(host-a), machine 1 (host-b), machine 2 (host-c), found '20'"),
        ("20;20", "3 parts"),
        ("1;1;1;1", "3 parts"),
        ([20, 20, 20], "3 parts"),
        ("1;1,1;1", "2 values|1 values"),
        ("1;x;1", "GiB for each device"),
        ("1;0;1", "GiB for each device"),
    ],
)
def test_a_gpu_split_needs_a_part_for_each_machine(split, expected, connection, folder):
    with pytest.raises(InvalidSettings) as caught:
        plan_over(connection, folder, device="cpu", gpu_split=split, **SMALL)
    assert caught.value.thing == "gpu_split"
    assert any(part in str(caught.value) for part in expected.split("|")), caught.value


def test_a_gpu_split_of_several_machines_needs_machines(folder):
    with pytest.raises(InvalidSettings, match="the option machines"):
        plan(folder, device="cpu", gpu_split="1;2", **SMALL)


@pytest.mark.parametrize(
    "options", [{"loras": "some/folder"}, {"max_lora_bytes": "1MiB"}, {"vram": "8GiB"}]
)
def test_what_several_machines_cannot_have_is_refused_by_name(options, folder):
    (name,) = options
    with pytest.raises(InvalidSettings, match=f"^{name}: expected no {name} together with machine"):
        plan(folder, machines="tcp://192.0.2.1:29500", **options)


@pytest.mark.parametrize("value", [5, True, ["tcp://192.0.2.1:29500"]])
def test_an_address_that_is_no_text_is_refused(value, folder):
    with pytest.raises(InvalidSettings, match="^machines: expected an address"):
        plan(folder, machines=value)
