"""The models below a folder: formats and sizes, and those that cannot be loaded by name."""

import pytest

from extension.page import model_folders
from extension.page.model_folders import find_models, folder_bytes
from support.tiny import write_tiny_model


def write(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    write_tiny_model(folder / "Tiny-exl2")
    write_tiny_model(folder / "owner" / "Nested")
    write_tiny_model(folder / "frob", architectures=["FrobForCausalLM"], model_type="frob")
    write_tiny_model(folder / ".hidden")
    write_tiny_model(folder / "a" / "b" / "TooDeep")
    write(folder / "llama.gguf", b"GGUF" + bytes(60))
    write(folder / "broken" / "model.safetensors", b"nonsense")
    write(folder / "pickled" / "pytorch_model.bin", b"nonsense")
    write(folder / "empty" / "readme.txt")
    return folder


def test_models_are_found_with_their_formats_and_sizes(models):
    found = find_models(str(models))
    assert [model.name for model in found.loadable] == ["frob", "owner/Nested", "Tiny-exl2"]
    by_name = {model.name: model for model in found.loadable}
    assert by_name["Tiny-exl2"].format in ("EXL2", "unquantised")
    assert by_name["frob"].format.endswith("unknown architecture")
    files = models.joinpath("Tiny-exl2").glob("*.safetensors")
    assert by_name["Tiny-exl2"].nbytes == sum(file.stat().st_size for file in files) > 0
    assert by_name["owner/Nested"].label.startswith("owner/Nested · ")
    assert by_name["Tiny-exl2"].path == str(models / "Tiny-exl2")


def test_what_cannot_be_loaded_is_said_by_name(models):
    problems = {model.name: model.problem for model in find_models(str(models)).others}
    assert set(problems) == {"broken", "llama.gguf", "pickled"}
    assert "GGUF" in problems["llama.gguf"]
    assert all(problems.values())


def test_a_folder_that_is_a_model_is_found_itself(models):
    (found,) = find_models(str(models / "Tiny-exl2")).loadable
    assert found.name == "Tiny-exl2"


def test_a_link_to_a_folder_is_followed_and_a_circle_ends(models, tmp_path):
    elsewhere = write_tiny_model(tmp_path / "elsewhere" / "Linked")
    (models / "Linked").symlink_to(elsewhere)
    (models / "circle").symlink_to(models)
    names = [model.name for model in find_models(str(models)).loadable]
    assert "Linked" in names


def test_a_search_that_ends_early_says_so(models, monkeypatch):
    assert find_models(str(models)).whole
    monkeypatch.setattr(model_folders, "MAX_FOLDERS", 2)
    assert not find_models(str(models)).whole


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OSError):
        find_models(str(tmp_path / "nowhere"))


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path):
    write(tmp_path / "a", bytes(10))
    write(tmp_path / "b", bytes(5))
    write(tmp_path / "c" / "d", bytes(100))
    assert folder_bytes(tmp_path) == 15
