"""An interrupted conversion continues where it was, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from exl_loader.convert import conversion, convert, measurement
from exl_loader.convert.activations import LayerRunner
from exl_loader.convert.work_folder import WorkFolder
from exl_loader.utils.errors import InvalidSettings

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"calibration_rows": 3, "calibration_row_len": 32, "bits": 7.5}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def _reference_operations_and_few_options(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    monkeypatch.setattr(conversion, "MOST_BITS", 16)
    monkeypatch.setattr(measurement, "MIXES", [*measurement.MIXES[2:4], measurement.PROBE])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_at(monkeypatch, number: int) -> None:
    """End the conversion when it renames its `number`-th file, counted from 1."""
    left = [number]
    rename = os.replace

    def replace(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_conversion_that_ends_at_any_file_continues_to_the_same_bytes(
    tiny_model, tmp_path, monkeypatch
):
    folder = tiny_model()
    convert(folder, tmp_path / "whole", **FEW)
    expected = contents(tmp_path / "whole")
    target = tmp_path / "continued"
    number = 0
    while not target.exists():
        number += 1
        with monkeypatch.context() as patch:
            # A quantised layer is two files, so that with three every attempt gets further.
            kill_at(patch, 3 if number > 1 else 1)
            try:
                convert(folder, target, **FEW)
            except Killed:
                continue
    # job.json, 2 layers measured, measurement.json, 3 layers quantised with their states, output.
    assert number > 5
    assert contents(target) == expected
    assert not WorkFolder(target).path.exists()


def test_a_conversion_continues_with_the_threads_with_which_it_was_begun(
    tiny_model, tmp_path, monkeypatch
):
    folder, target = tiny_model(), tmp_path / "exl2"
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            convert(folder, target, **FEW)
    seen = []
    record = LayerRunner.record

    def spy(*args, **options):
        seen.append(torch.get_num_threads())
        return record(*args, **options)

    monkeypatch.setattr(LayerRunner, "record", spy)
    torch.set_num_threads(2)
    convert(folder, target, **FEW)
    assert set(seen) == {1} and torch.get_num_threads() == 2


def test_a_damaged_number_of_threads_is_refused(tmp_path):
    work = WorkFolder(tmp_path / "exl2")
    assert work.begin({"bits": 4}, 3) == 3
    assert work.begin({"bits": 4}, 5) == 3
    job = work.path / "job.json"
    for value in (0, True, "3", None):
        job.write_text(json.dumps({"bits": 4, "threads": value}))
        with pytest.raises(InvalidSettings, match="threads"):
            work.begin({"bits": 4}, 5)


def test_options_that_differ_are_refused_by_name(tiny_model, tmp_path, monkeypatch):
    folder, target = tiny_model(), tmp_path / "exl2"
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            convert(folder, target, **FEW)
    before = contents(WorkFolder(target).path)
    for other, name in (
        ({"bits": 8.5}, "bits"),
        ({"head_bits": 8}, "head_bits"),
        ({"calibration_rows": 2}, "calibration"),
    ):
        with pytest.raises(InvalidSettings, match=f"^{name} of the conversion"):
            convert(folder, target, **FEW | other)
    assert contents(WorkFolder(target).path) == before
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(InvalidSettings, match="weight files"):
        convert(folder, target, **FEW)


def test_a_damaged_work_folder_is_refused(tiny_model, tmp_path, monkeypatch):
    folder, target = tiny_model(), tmp_path / "exl2"
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            convert(folder, target, **FEW)
    states = WorkFolder(target).path / "measuring.safetensors"
    states.write_bytes(states.read_bytes()[:-100])
    with pytest.raises(InvalidSettings, match=r"measuring\.safetensors"):
        convert(folder, target, **FEW)
    other = tmp_path / "other"
    WorkFolder(other).path.mkdir()
    (WorkFolder(other).path / "letters.txt").write_text("of somebody else")
    with pytest.raises(InvalidSettings, match="work folder"):
        convert(folder, other, **FEW)
    assert (WorkFolder(other).path / "letters.txt").exists()


def test_a_killed_process_continues(tiny_model, tmp_path):
    """SIGKILL as soon as the first layer is measured, then again when one is quantised."""
    folder, target = tiny_model(), tmp_path / "exl2"
    work = WorkFolder(target).path
    command = [sys.executable, "-m", "exl_loader", "convert", str(folder), str(target), "--json",
               "--bits", "8", "--calibration-rows", "3", "--calibration-row-len", "32"]
    for name in ("measuring.safetensors", "layer-00000.safetensors"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not (work / name).exists() and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout)["out_dir"] == str(target)
    assert not work.exists()
