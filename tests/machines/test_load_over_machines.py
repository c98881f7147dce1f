"""A model whose layers are on several machines: processes of this one that run `serve-stage`.

It gives the tokens of one machine, takes the bytes of its plan, and survives machines that end.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import threading
from pathlib import Path

import pytest

import exl_loader
from exl_loader.checkpoint.safetensors_header import read_header
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.machines.address import parse_address
from exl_loader.machines.connection import close_all, connect
from exl_loader.utils.errors import InsufficientMemory, MachineLost, MachineRefused
from support.ports import free_port
from support.stage_processes import StageFarm, StageProcesses
from support.tiny import write_tiny_model

SMOLLM2 = Path(__file__).parents[2] / "build" / "smollm2"
PROMPTS = [[3 + (7 * i * i + 5 * n) % 300 for i in range(length)]
           for n, length in enumerate((20, 300, 41, 77))]
SETTINGS = {"temperature": 0, "max_new_tokens": 12, "ban_eos_token": True}
# How often a machine is killed; 50 by hand.
KILLS = int(os.environ.get("EXL_LOADER_MACHINE_KILLS", "6"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "m", tokenizer=False, num_hidden_layers=6,
        vocab_size=320, intermediate_size=2048,
    )


@pytest.fixture(scope="module")
def expected(folder):
    with exl_loader.load(folder, **options()) as model:
        return model.reservation, texts(model)


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    made = StageFarm(tmp_path_factory.mktemp("farm") / "log.txt")
    yield made
    made.close()


@pytest.fixture(params=[2, 3, 4], ids="{} machines".format)
def machines(request, folder, farm):
    yield from started(request.param, folder, farm)


@pytest.fixture
def two(folder, farm):
    yield from started(2, folder, farm)


@pytest.fixture
def three(folder, farm):
    yield from started(3, folder, farm)


def started(count, folder, farm):
    """Start all machines but the first; show what they said where a test fails."""
    before = farm.log.stat().st_size
    processes = StageProcesses(farm, folder.parent, f"tcp://127.0.0.1:{free_port()}", count)
    processes.start(*range(1, count))
    try:
        yield processes
    finally:
        close_all()
        processes.close()
        print(farm.log.read_text(encoding="utf-8")[before:])


def options(**more):
    return {"device": "cpu", "ctx_size": 512, "cache_type": "q4", "chunk_size": 64,
            "max_batch_size": 4, **more}


def split(folder, count):
    """Return a `gpu_split` by which the first machine has 2 layers, and those between 1 each."""
    plan = exl_loader.plan(folder, **options())
    (device,) = plan.devices
    headers = [
        header for path in folder.glob("*.safetensors")
        for header in read_header(path)[0] if ".layers.0." in header.name
    ]
    layer = sum(header.nbytes for header in headers) + device.cache_bytes // plan.num_layers
    first = device.total_bytes - (plan.num_layers - 2.5) * layer
    others = [device.workspace_bytes + 1.5 * layer] * (count - 2)
    return ";".join(f"{nbytes / (1 << 30):.9f}" for nbytes in (first, *others)) + ";"


def texts(model):
    """Return what the model writes after each prompt, all at once and then one by one."""
    generations = [model.generate_ids(ids, SETTINGS) for ids in PROMPTS]
    together = [list(generation) for generation in generations]
    alone = [list(model.generate_ids(ids, SETTINGS)) for ids in PROMPTS]
    return together, alone


def load(folder, processes, progress=None, **more):
    """Load over machines; a larger context leaves more layers to the last one."""
    chosen = {"machines": processes.address, "gpu_split": split(folder, processes.world_size)}
    return exl_loader.load(folder, progress=progress, **options(**chosen | more))


def test_tokens_and_bytes_are_those_of_one_machine_and_of_the_plan(folder, machines, expected):
    plan = exl_loader.plan(
        folder, **options(machines=machines.address, gpu_split=split(folder, machines.world_size))
    )
    for _ in range(2):
        with load(folder, machines) as model:
            reservation = model.reservation
            assert [d.total_bytes for d in reservation.devices] == [
                d.total_bytes for d in plan.devices]
            planned = {(d.machine, d.device): d.total_bytes for d in reservation.devices}
            used = {place for place, _ in planned}
            assert used == set(range(machines.world_size)), planned
            found = model.allocated_on_machines() | {(0, "cpu"): model.allocated_bytes("cpu")}
            assert found == {key: nbytes for key, nbytes in planned.items() if nbytes}
            assert model.allocated_bytes() == reservation.total_bytes
            layers = [n for d in reservation.devices for n in range(d.first_layer, d.end_layer)]
            assert layers == list(range(6))
            assert texts(model) == expected[1]
        assert model.allocated_bytes() == 0


@pytest.mark.parametrize("model_dir", [
    pytest.param(DEMO_MODEL, id="demo model"),
    pytest.param(SMOLLM2, id="smollm2", marks=[
        pytest.mark.smollm2,
        pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(),
                           reason="no build/smollm2; python tools/smollm2.py makes it"),
    ]),
])  # fmt: skip
@pytest.mark.parametrize("count", [2, 4])
def test_real_models_write_the_text_of_one_machine(model_dir, count, farm):
    prompt = "def read_lines(path):\n"
    settings = {"temperature": 0, "max_new_tokens": 24}
    with exl_loader.load(model_dir, **options()) as model:
        expected = "".join(model.generate(prompt, settings))
    for processes in started(count, model_dir, farm):
        with load(model_dir, processes) as model:
            assert "".join(model.generate(prompt, settings)) == expected
            assert model.allocated_bytes() == model.reservation.total_bytes
            # Small layers may leave machines without any, which pass on what comes.
            assert 1 <= len(model.allocated_on_machines()) <= count - 1


def test_without_limits_every_machine_has_a_part_of_the_work(folder, machines, expected):
    plan = exl_loader.plan(folder, **options(machines=machines.address))
    with load(folder, machines, gpu_split=None) as model:
        devices = model.reservation.devices
        assert [d.machine for d in devices] == list(range(machines.world_size))
        assert [d.total_bytes for d in devices] == [d.total_bytes for d in plan.devices]
        found = model.allocated_on_machines() | {(0, "cpu"): model.allocated_bytes("cpu")}
        assert found == {(d.machine, d.device): d.total_bytes for d in devices}
        assert texts(model) == expected[1]


def test_texts_are_divided_among_the_machines_that_have_layers(folder, three, expected):
    with load(folder, three, gpu_split=split(folder, 2) + "0.000001;") as model:
        assert {device.machine for device in model.reservation.devices} == {0, 2}
        found = model.run_alone(lambda forward, cache: iter([forward.decoding_in_flight]))
        assert list(found) == [2]
        assert texts(model) == expected[1]


def test_a_gpu_split_limits_main_memory_without_cards(folder, two, expected):
    with load(folder, two, device="auto") as model:
        assert {device.machine for device in model.reservation.devices} == {0, 1}
        assert texts(model) == expected[1]


def test_what_does_not_fit_is_refused_with_the_machine_named(folder, two):
    share = split(folder, 2)
    with pytest.raises(InsufficientMemory, match="machine 1 "):
        load(folder, two, gpu_split=share + "0.000001")
    with load(folder, two) as model:
        assert model.allocated_on_machines()


def test_a_draft_model_guesses_on_the_first_machine(folder, two, expected):
    share = split(folder, 2)
    drafts = exl_loader.plan(folder, **options()).total_bytes / (1 << 30)
    share = f"{float(share.rstrip(';')) + drafts:.9f};"
    with load(folder, two, model_draft=folder, draft_max=3, gpu_split=share) as model:
        assert model.allocated_on_machines()
        generation = model.generate_ids(PROMPTS[2], SETTINGS)
        assert list(generation) == expected[1][1][2]
        assert generation.stats.accepted_tokens > 0
        assert texts(model) == expected[1]


def test_only_one_model_at_a_time_uses_the_machines(folder, two, expected):
    with load(folder, two) as model:
        with pytest.raises(MachineRefused, match="another model over the same machines"):
            load(folder, two)
        assert texts(model) == expected[1]


def test_a_model_that_is_dropped_frees_the_machines(folder, two, expected):
    model = load(folder, two)
    assert next(iter(model.generate_ids(PROMPTS[0], SETTINGS))) == expected[1][1][0][0]
    del model
    with load(folder, two) as model:
        assert texts(model) == expected[1]


def test_an_interrupted_load_frees_the_machines(folder, two, expected):
    class Interrupt:
        def start(self, task, total, unit):
            if task == "loading weights":
                raise KeyboardInterrupt

        def advance(self, task, n=1):
            pass

        def finish(self, task):
            pass

    with pytest.raises(KeyboardInterrupt):
        load(folder, two, progress=Interrupt())
    with load(folder, two) as model:
        assert texts(model) == expected[1]


def test_the_tasks_of_other_machines_are_shown(folder, two):
    seen = []

    class Names:
        def start(self, task, total, unit):
            seen.append(task)

        def advance(self, task, n=1):
            pass

        def finish(self, task):
            pass

    load(folder, two, progress=Names()).unload()
    assert any(name.startswith("loading weights, machine 1 (") for name in seen), seen
    assert "loading weights" in seen


def test_requests_end_with_an_error_when_a_machine_is_killed(folder, three, expected):
    endless = SETTINGS | {"max_new_tokens": 1 << 20}
    with load(folder, three, ctx_size=16384) as model:
        iterators = [iter(model.generate_ids(ids, endless)) for ids in PROMPTS[:2]]
        for iterator in iterators:
            next(iterator)
        three.signal(2)
        for iterator in iterators:
            with pytest.raises(MachineLost, match=r"machine [12] \("):
                list(iterator)
        with pytest.raises(MachineLost):
            list(model.generate_ids(PROMPTS[0], SETTINGS))
    assert model.allocated_bytes() == 0
    three.start(2)
    with load(folder, three) as model:
        assert texts(model) == expected[1]


def test_the_machines_that_are_left_can_load(folder, three, expected):
    with load(folder, three) as model:
        three.signal(1)
        with pytest.raises(MachineLost):
            list(model.generate_ids(PROMPTS[0], SETTINGS))
    left = load(
        folder, three, machines=three.address + "?world_size=2", gpu_split=split(folder, 2)
    )
    with left as model:
        assert model.reservation.hosts and len(model.reservation.hosts) == 2
        assert texts(model) == expected[1]


class Killer:
    """Kills a machine in a task of the load, a random moment after it has begun.

    While the first machine waits for the others, it is started again at once.
    """

    def __init__(self, processes, rank, task, delay):
        self._processes, self._rank, self._task, self._delay = processes, rank, task, delay
        self._timer = None

    def start(self, task, total=None, unit=""):
        if task.startswith(self._task) and self._timer is None:
            self._timer = threading.Timer(self._delay, self._kill)
            self._timer.start()

    def advance(self, task, n=1):
        pass

    def finish(self, task):
        pass

    def _kill(self):
        self._processes.signal(self._rank)
        if self._task == WAITING:
            self._processes.start(self._rank)

    def end(self):
        """Start the machine again, if that has not been done."""
        assert self._timer is not None, self._task
        self._timer.join()
        if self._task != WAITING:
            self._processes.start(self._rank)


WAITING = "waiting for machines"
MOMENTS = (WAITING, "reserving memory", "loading weights", "sampling keys", "prefill", "decode")


def test_kills_at_random_moments(folder, three, expected):
    """Whatever a machine was doing: a typed error, memory freed, and the next load succeeds."""
    rng = random.Random(18)
    outcomes = []
    for number in range(KILLS):
        moment = MOMENTS[number % len(MOMENTS)]
        if moment == WAITING:
            close_all()
        killer = Killer(three, rng.choice((1, 2)), moment, rng.uniform(0, 0.1))
        try:
            with load(folder, three, progress=killer, ctx_size=16384) as model:
                assert moment != WAITING or texts(model) == expected[1]
                if moment == WAITING:
                    outcomes.append((moment, "loaded"))
                else:
                    killer.start("prefill")
                    iterator = iter(model.generate_ids(
                        PROMPTS[1] * 20, SETTINGS | {"max_new_tokens": 1 << 20}))
                    next(iterator)
                    killer.start("decode")
                    list(iterator)
                    outcomes.append((moment, "no error"))
        except (MachineLost, MachineRefused) as error:
            outcomes.append((moment, type(error).__name__))
        killer.end()
    print(collections.Counter(outcomes))
    found = {outcome for moment, outcome in outcomes if moment != WAITING}
    assert found == {"MachineLost"}, outcomes
    with load(folder, three) as model:
        assert texts(model) == expected[1]


def test_a_machine_that_hangs_is_lost(folder, two, expected):
    address = parse_address(two.address)
    connect(address, timeout=3.0, beat=0.5)
    with load(folder, two, ctx_size=16384) as model:
        iterator = iter(model.generate_ids(PROMPTS[0], SETTINGS | {"max_new_tokens": 1 << 20}))
        next(iterator)
        two.signal(1, signal.SIGSTOP)
        with pytest.raises(MachineLost):
            list(iterator)
    two.signal(1, signal.SIGCONT)
    with load(folder, two) as model:
        assert texts(model) == expected[1]
