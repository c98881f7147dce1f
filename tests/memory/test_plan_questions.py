"""What machines say to each other about a plan: every value is checked where it arrives."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from exl_loader.backends import BACKENDS
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.cache.layout import CacheType
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.copies import folder_digest
from exl_loader.memory.reservation import LoadOptions, plan, planned
from exl_loader.memory.reservation.answers import PlanAnswers
from exl_loader.memory.reservation.options import RunOptions
from exl_loader.memory.reservation.questions import (
    ASSIGN,
    PLAN,
    RECORDS,
    Asked,
    Assigned,
    PlanReply,
    PlanRequest,
    from_json,
    to_json,
)
from exl_loader.utils.errors import (
    ExlLoaderError,
    InvalidCheckpoint,
    InvalidSettings,
    MachineRefused,
    ModelNotFound,
)
from support.plan_machines import FakeConnection, plan_over
from support.sparse import write_sparse_exl2

ASKED = Asked(1, 2, 6, 600, "q4", 64, 2, 256, 0)
REQUEST = PlanRequest(1, "m", "0" * 64, None, False, "", None, 0)
MESSAGES = [ASKED, REQUEST, PlanReply(5, "cpu", 2), Assigned(4, (7, -3), 9),
            Asked(3, 1, None, 1, "q8_q3", 64, None, 0, 512),
            PlanRequest(7, "m", "1", "LlamaForCausalLM", True, "1,2", 3, 4)]
OPTIONS = {"ctx_size": 600, "cache_type": "q4", "chunk_size": 64, "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    return write_sparse_exl2(tmp_path / "m", num_hidden_layers=6)


@pytest.fixture
def answers(folder):
    made = PlanAnswers(folder, LoadOptions(device="cpu"))
    yield made
    made.close()


@pytest.fixture
def connection(folder):
    made = FakeConnection([folder], [LoadOptions(device="cpu")])
    yield made
    made.close()


def split(folder) -> str:
    """Return a `gpu_split` with which the other machine has layers."""
    return f"{plan(folder, **OPTIONS).total_bytes * 0.8 / 2**30!r};"


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_the_same_after_json(message):
    values = json.loads(json.dumps(to_json(message)))
    assert from_json(type(message), values, "somebody") == message


def test_the_record_of_a_device_is_the_same_after_json(folder):
    (record,) = plan(folder, **OPTIONS).devices
    for one in (record, replace(record, limit_bytes=None, headroom_bytes=-5)):
        assert from_json(type(one), json.loads(json.dumps(to_json(one))), "somebody") == one
    assert set(to_json(record)) == set(asdict(record))


def test_a_run_is_the_same_after_json():
    run = RunOptions(CacheType.parse("q8_q4"), 128, None, 256, 4096)
    assert Asked.of(1, 3, True, 1000, run).run() == run


WRONG = [None, True, 1.5, "x", -1, 1 << 61, [1], {}, "", [True], [1.0], ["x"]]


@pytest.mark.parametrize("message", MESSAGES[:4])
def test_a_value_of_another_type_is_refused_by_name(message):
    good = to_json(message)
    for field in fields(message):
        for value in WRONG:
            values = good | {field.name: value}
            try:
                read = from_json(type(message), json.loads(json.dumps(values)), "machine 1 (b)")
            except MachineRefused as error:
                assert "machine 1 (b) sent what is no " in str(error) and field.name in str(error)
            else:
                # Of the attribute's own type, and not merely equal to it, as True is to 1.
                assert to_json(read)[field.name] == value
                kinds = {type(good[field.name]), type(to_json(read)[field.name])}
                assert len(kinds - {type(None)}) < 2 or good[field.name] is None


@pytest.mark.parametrize("values", [None, [], "x", {}, {"free_bytes": 1, "more": 2}, {"Free": 1}])
def test_other_keys_are_refused(values):
    keys = "free_bytes, kind, speed"
    with pytest.raises(MachineRefused, match=f"no PlanReply: expected the keys {keys}"):
        from_json(PlanReply, values, "machine 1 (b)")


def test_a_question_out_of_turn_is_refused(answers):
    with pytest.raises(MachineRefused, match="of the last 8 that began, found the plan of number"):
        answers.answer(ASSIGN, {"asked": [to_json(ASKED)]})
    assert answers.answer("another question", {}) is None


def begun(answers, folder, number: int = ASKED.plan) -> None:
    """Begin a plan as the first machine does."""
    with Checkpoint.open(folder) as checkpoint:
        request = replace(
            REQUEST, plan=number, name=folder.name, digest=folder_digest(checkpoint)
        )
    answers.answer(PLAN, to_json(request))


def test_devices_are_initialized_before_they_are_measured(answers, folder, monkeypatch):
    called = []

    class Measured(CpuBackend):
        def initialize(self, device):
            called.append(f"initialize {device}")

        def overhead(self, device):
            called.append(f"overhead {device}")
            return super().overhead(device)

    monkeypatch.setitem(BACKENDS, "cpu", Measured())
    begun(answers, folder)
    assert called == ["initialize cpu", "overhead cpu"]


def test_plans_that_are_made_at_once_take_turns(folder):
    deeper = write_sparse_exl2(folder.parent / "deeper", num_hidden_layers=9)
    both = PlanAnswers(folder.parent, LoadOptions(device="cpu"))

    def assigned(number: int) -> tuple[int, int]:
        asked = {"asked": [to_json(replace(ASKED, plan=number, end_layer=None))]}
        (found,) = both.answer(ASSIGN, asked)["assigned"]
        return found["end_layer"], found["total_bytes"]

    begun(both, folder, 1)
    first = assigned(1)
    begun(both, deeper, 2)
    assert assigned(1) == first and first[0] == 6
    assert assigned(2)[0] == 9
    part = both.part(to_json(ASKED))
    assert part.model.parts.device_map.numbers == range(2, 6)
    for number in range(3, 10):
        begun(both, folder, number)
    # The first is the oldest of nine.
    assert assigned(9) == first
    with pytest.raises(MachineRefused, match="found the plan of number 1"):
        assigned(1)
    both.close()


@pytest.mark.parametrize(
    "change",
    [
        {"first_layer": 0}, {"first_layer": 6}, {"end_layer": 2}, {"end_layer": 7},
        {"ctx_size": 0}, {"ctx_size": 1 << 40},
        {"cache_type": "q5"}, {"cache_type": ""}, {"chunk_size": 0}, {"chunk_size": 1},
        {"max_batch_size": 0}, {"cache_window": 5}, {"cache_size": 1},
    ],
)
def test_a_question_with_impossible_options_is_refused(change, answers, folder):
    begun(answers, folder)
    assert answers.answer(ASSIGN, {"asked": [to_json(ASKED)]})["assigned"]
    with pytest.raises(InvalidSettings):
        answers.answer(ASSIGN, {"asked": [to_json(replace(ASKED, **change))]})


@pytest.mark.parametrize(
    "fields", [{}, {"asked": 5}, {"asked": [5]}, {"asked": [{}]}, {"asked": [], "more": 1}]
)
def test_a_malformed_question_is_refused(fields, answers, folder):
    begun(answers, folder)
    with pytest.raises(MachineRefused, match="^the first machine sent what is no Asked"):
        answers.answer(ASSIGN, fields)


def test_a_machine_without_the_folder_or_with_another_one_refuses(folder, tmp_path):
    (tmp_path / "models").mkdir()
    connection = FakeConnection([tmp_path / "models"])
    with pytest.raises(ModelNotFound, match=f"^m: not among the models of {tmp_path}/models"):
        plan_over(connection, folder, **OPTIONS)
    other = write_sparse_exl2(tmp_path / "models" / "m", num_hidden_layers=6, bits=5)
    connection = FakeConnection([tmp_path / "models"])
    with pytest.raises(InvalidCheckpoint, match=f"^{other}: another model than the first machine"):
        plan_over(connection, folder, **OPTIONS)
    connection.close()


def test_a_plan_after_a_refused_one_works(folder, tmp_path):
    connection = FakeConnection([tmp_path])
    other = write_sparse_exl2(tmp_path / "other" / "o", num_hidden_layers=6)
    with pytest.raises(ModelNotFound):
        plan_over(connection, other, **OPTIONS)
    assert plan_over(connection, folder, **OPTIONS).fits
    connection.close()


def changed(question, change):
    """Return what changes the reply to a question."""
    return lambda asked, reply: change(reply) if asked == question else reply


def first_item(key, **values):
    return lambda reply: {key: [reply[key][0] | values, *reply[key][1:]]}


@pytest.mark.parametrize(
    ("question", "change", "expected"),
    [
        (PLAN, lambda reply: {}, "no PlanReply"),
        (PLAN, lambda reply: reply | {"free_bytes": -1}, "free_bytes of type int, found -1"),
        (PLAN, lambda reply: reply | {"speed": 0}, "a speed"),
        (ASSIGN, lambda reply: {"assigned": reply["assigned"][1:]}, "no Assigned"),
        (ASSIGN, lambda reply: {"assigned": "none"}, "a list of"),
        (ASSIGN, first_item("assigned", end_layer=5), "an end from 6 to 6"),
        (ASSIGN, first_item("assigned", end_layer=7), "an end from 6 to 6"),
        (ASSIGN, first_item("assigned", end_layer=0), "an end from 6 to 6"),
        (ASSIGN, first_item("assigned", headroom_bytes=[]), "headroom of the devices"),
        (ASSIGN, first_item("assigned", total_bytes="1"), "total_bytes of type int"),
        (RECORDS, lambda reply: {"records": []}, "as it has assigned them"),
        (RECORDS, first_item("records", end_layer=5), "as it has assigned them"),
        (RECORDS, first_item("records", cache_bytes=1), "as it has assigned them"),
        (RECORDS, first_item("records", device="npu:0"), "devices of a known kind"),
        (RECORDS, first_item("records", fits=True), "no DeviceReservation"),
    ],
)
def test_a_reply_with_which_a_plan_cannot_go_on_is_refused(
    question, change, expected, connection, folder
):
    connection.change = changed(question, change)
    with pytest.raises(MachineRefused) as caught:
        plan_over(connection, folder, gpu_split=split(folder), **OPTIONS)
    assert str(caught.value).startswith("machine 1 (host-b)") and expected in str(caught.value)
    connection.change = lambda asked, reply: reply
    found = plan_over(connection, folder, gpu_split=split(folder), **OPTIONS)
    assert found.fits and found.devices[-1].machine == 1


def test_a_machine_names_itself_by_the_connection_alone(connection, folder):
    connection.change = changed(RECORDS, first_item("records", machine=7, host="elsewhere"))
    found = plan_over(connection, folder, gpu_split=split(folder), **OPTIONS)
    assert (found.devices[-1].machine, found.devices[-1].host) == (1, "host-b")


def test_an_error_of_a_machine_ends_the_plan(connection, folder):
    class Refused(ExlLoaderError):
        pass

    def refuse(asked, reply):
        raise Refused("machine 1 (host-b): no")

    connection.change = refuse
    with pytest.raises(Refused):
        plan_over(connection, folder, gpu_split=split(folder), **OPTIONS)


def test_a_machine_on_which_no_layer_fits_has_no_part(folder):
    answers = PlanAnswers(folder, LoadOptions(device="cpu", memory_limit=1000))
    begun(answers, folder)
    with pytest.raises(MachineRefused, match="^the layers from 2 on"):
        answers.part(to_json(replace(ASKED, end_layer=None)))
    assert not answers.part(to_json(ASKED)).records[0].fits
    answers.close()


def test_machines_need_a_connection(folder):
    with pytest.raises(InvalidSettings, match="^machines: expected nothing"):
        with planned(folder, LoadOptions(machines="tcp://192.0.2.1:29500")):
            pass
