"""Copies of a model folder on other machines: found by name, compared by a digest."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("torch")

from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.copies import check_copy, find_folder, folder_digest, folder_name
from exl_loader.utils.errors import InvalidCheckpoint, InvalidSettings, ModelNotFound
from support.broken import edit_config, edit_tensors
from support.tiny import write_tiny_model

FILE = "model.safetensors"


def digest(folder) -> str:
    with Checkpoint.open(folder) as checkpoint:
        return folder_digest(checkpoint)


@pytest.fixture
def original(tmp_path):
    return write_tiny_model(tmp_path / "here" / "m", tokenizer=False)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "there" / "m")


def test_a_copy_has_the_same_digest_and_is_found_by_name(original, copy):
    assert digest(original) == digest(copy) and len(digest(copy)) == 64
    assert find_folder(copy.parent, folder_name(original)) == copy
    # A model folder in place of a folder of models has any name.
    assert find_folder(copy, "another name") == copy
    with Checkpoint.open(copy) as checkpoint:
        check_copy(checkpoint, digest(original))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: edit_config(folder, rms_norm_eps=1e-4),
        lambda folder: edit_tensors(folder, FILE, model__norm__weight=lambda x: x.float()),
        lambda folder: edit_tensors(folder, FILE, model__norm__weight=lambda x: x[:-1]),
        lambda folder: (folder / "quantize_config.json").write_text("{}"),
        lambda folder: (folder / FILE).rename(folder / "other.safetensors"),
    ],
)
def test_another_config_or_header_is_refused(change, original, copy):
    change(copy)
    with Checkpoint.open(copy) as checkpoint, pytest.raises(InvalidCheckpoint) as caught:
        check_copy(checkpoint, digest(original))
    text = str(caught.value)
    assert str(copy) in text and "another model" in text and digest(original)[:9] in text


def test_other_weights_with_equal_headers_cannot_be_told_apart(original, copy):
    edit_tensors(copy, FILE, model__norm__weight=lambda x: x + 1)
    edit_tensors(original, FILE, model__norm__weight=lambda x: x)
    assert (original / FILE).read_bytes() != (copy / FILE).read_bytes()
    assert digest(original) == digest(copy)


def test_a_folder_that_is_not_there_is_named(copy, tmp_path):
    with pytest.raises(ModelNotFound, match=r"^elsewhere: not among the models of .*Copy the"):
        find_folder(copy.parent, "elsewhere")
    (tmp_path / "there" / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="a folder without config.json"):
        find_folder(copy.parent, "empty")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../m", "/etc", "m\0"])
def test_a_name_that_is_a_path_is_refused(name, copy):
    with pytest.raises(InvalidSettings, match="a name without a path"):
        find_folder(copy.parent, name)


def test_the_name_of_the_current_folder(original, monkeypatch):
    monkeypatch.chdir(original)
    assert folder_name(".") == folder_name(f"{original}/") == "m"
