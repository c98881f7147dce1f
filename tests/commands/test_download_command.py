"""`python -m exl_loader download`, against a local server that speaks the hub's protocol."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from exl_loader import InvalidCheckpoint, plan
from exl_loader.checkpoint.folder import is_quantised
from exl_loader.checkpoint.weight_files import UNFINISHED_NAME
from exl_loader.commands import hub as hub_module
from exl_loader.commands import model_download
from exl_loader.commands.cli import EXIT_INTERRUPTED, main
from exl_loader.commands.hub import MAX_TRIES, Hub, parse_repo
from exl_loader.commands.model_download import folder_name, prepared
from exl_loader.utils.errors import (
    DownloadError,
    InvalidSettings,
    ModelNotFound,
    UnsupportedFormat,
)
from support import REPO
from support.golden_models import write_model
from support.hub_server import Repository, body, cut, damage, hub_server, oid, status
from support.tiny import write_tiny_model

pytest.importorskip("huggingface_hub", minversion="1.0")
constants = pytest.importorskip("huggingface_hub.constants")

NAME = "owner/model"


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # No login of the person who runs the tests.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path):
    """A model in two files, with what repositories have besides."""
    folder = write_tiny_model(tmp_path / "source", shards=2, num_hidden_layers=3)
    tensors = {"weight_map": {"a": "model-00001-of-00002.safetensors",
                              "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tensors))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    for name in ("pytorch_model.bin", "model-Q4_0.gguf", "picture.png", ".gitattributes",
                 "measurement.json", "pytorch_model.bin.index.json", "modeling_x.py",
                 "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


WANTED = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
    "model.safetensors.index.json", "additional_chat_templates/tool.jinja",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
}


@pytest.fixture
def server(source):
    with hub_server(**{NAME: Repository({"main": source})}) as running:
        yield running


@pytest.fixture
def waits():
    return []


@pytest.fixture
def hub(server, waits):
    return Hub(server.endpoint, sleep=waits.append)


def files_of(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def fetch(hub, target, repo_id=NAME, revision=None, **more):
    with prepared(repo_id, revision, target=target, hub=hub, **more) as model:
        model.fetch()
    return model


def same(folder, source, names):
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_only_the_files_of_a_model_are_downloaded(hub, source, tmp_path):
    model = fetch(hub, tmp_path / "target")
    assert files_of(tmp_path / "target") == WANTED
    assert same(tmp_path / "target", source, WANTED)
    assert model.total_bytes == sum((source / name).stat().st_size for name in WANTED)


def test_the_plan_comes_before_the_weights_and_is_the_real_one(
    hub, server, tmp_path, monkeypatch
):
    target = tmp_path / "target"
    monkeypatch.setattr(model_download, "HEADER_BYTES", 8192)
    with prepared(NAME, target=target, hub=hub) as model:
        assert min(file.size for file in model.files[-2:]) > 100_000
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            assert server.ranges(name) == ["bytes=0-8191"]
        assert not target.exists()
        early = model.reservation
        model.fetch()
    late = plan(target)
    assert early.model_dir == late.model_dir == str(target)
    assert early.total_bytes == late.total_bytes
    assert early.bytes_by_cache_type == late.bytes_by_cache_type
    assert not model.staged.exists()


def test_a_header_longer_than_the_first_request_is_read_in_full(hub, server, tmp_path, monkeypatch):
    monkeypatch.setattr(model_download, "HEADER_BYTES", 100)
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        asked = server.ranges("model-00001-of-00002.safetensors")
        assert len(asked) == 2 and asked[0] == "bytes=0-99"
        length = int(asked[1].removeprefix("bytes=0-")) + 1
        assert 100 < length < model.files[-1].size
        model.fetch()
    assert plan(tmp_path / "target").fits


def test_of_weights_in_several_forms_those_are_downloaded_that_the_engine_reads(
    server, hub, tmp_path
):
    """An EXL2 model beside the files of the model that it was made from."""
    folder = tmp_path / "exl2"
    folder.mkdir()
    write_model(folder, "Llama", "exl2", seed=1)
    (folder / "model.safetensors").rename(folder / "output.safetensors")
    write_tiny_model(tmp_path / "dense")
    shutil.copy(tmp_path / "dense" / "model.safetensors", folder)
    server.repositories["owner/exl2"] = Repository({"main": folder})
    fetch(hub, tmp_path / "target", "owner/exl2")
    assert {p.name for p in (tmp_path / "target").glob("*.safetensors")} == {
        "output.safetensors"
    }
    assert plan(tmp_path / "target").format == "exl2"


# Interrupted and damaged transfers


class Interrupt(KeyboardInterrupt):
    pass


class Stopping:
    """Progress that raises when so many bytes were downloaded."""

    def __init__(self, after):
        self.left = after

    def start(self, task, total, unit):
        self.task = task

    def advance(self, task, n=1):
        if task == "downloading":
            self.left -= n
            if self.left <= 0:
                raise Interrupt

    def finish(self, task):
        pass


def interrupted(hub, target, after):
    with pytest.raises(Interrupt):
        with prepared(NAME, target=target, hub=hub) as model:
            model.fetch(Stopping(after))


def refuse_loading(target):
    with pytest.raises(InvalidCheckpoint, match="unfinished one .*download` again"):
        plan(target)


def test_an_interrupted_download_is_refused_and_goes_on_where_it_was(
    hub, server, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(hub_module, "PIECE_BYTES", 1000)
    target, first = tmp_path / "target", "model-00001-of-00002.safetensors"
    small = sum((source / name).stat().st_size for name in WANTED if "safetensors" not in name)
    small += (source / "model.safetensors.index.json").stat().st_size
    interrupted(hub, target, small + 2500)
    refuse_loading(target)
    (part,) = target.glob("*.part")
    assert part.name.startswith(first) and not (target / first).exists()
    position = part.stat().st_size
    assert position >= 2000
    with prepared(NAME, target=target, hub=hub) as model:
        assert model.missing_bytes() == model.total_bytes - small - position
        server.requests.clear()
        model.fetch()
        assert model.missing_bytes() == 0
    size = (source / first).stat().st_size
    assert server.ranges(first) == [f"bytes={position}-{size - 1}"]
    assert files_of(target) == WANTED and same(target, source, WANTED)
    # What is complete is not downloaded again.
    server.requests.clear()
    fetch(hub, target)
    last = min(model_download.HEADER_BYTES, size) - 1
    assert server.ranges(first) == [f"bytes=0-{last}"]


def test_a_folder_whose_files_are_all_there_is_refused_until_the_mark_is_gone(hub, tmp_path):
    target = tmp_path / "target"
    fetch(hub, target)
    (target / UNFINISHED_NAME).write_text("{}")
    refuse_loading(target)
    fetch(hub, target)
    assert plan(target).fits and files_of(target) == WANTED


def test_an_unfinished_quantised_folder_chooses_this_engine_which_names_the_fault(
    server, hub, tmp_path
):
    folder, target = tmp_path / "exl2", tmp_path / "target"
    folder.mkdir()
    write_model(folder, "Llama", "exl2", seed=1)
    server.repositories[NAME] = Repository({"main": folder})
    interrupted(hub, target, sum(p.stat().st_size for p in folder.glob("*.json")) + 1)
    refuse_loading(target)
    config = json.loads((folder / "config.json").read_text())
    assert is_quantised(target) == ("quantization_config" in config)


def test_cut_connections_are_opened_again(hub, server, source, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(hub_module, "PIECE_BYTES", 1000)
    name = "model-00002-of-00002.safetensors"
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        server.requests.clear()
        server.fault(name, *[lambda answer: None, cut(3000)] * 3, lambda answer: None, cut(0))
        model.fetch()
    size = (source / name).stat().st_size
    assert server.ranges(name) == [
        *(f"bytes={3000 * i}-{size - 1}" for i in range(4)), f"bytes=9000-{size - 1}"
    ]
    assert same(tmp_path / "target", source, WANTED) and len(waits) == 4


def test_a_server_that_is_gone_is_said_after_some_tries(hub, server, tmp_path, waits):
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        server.fault("model-00001-of-00002.safetensors", *[cut(0)] * 100)
        with pytest.raises(DownloadError, match="at byte 0.*goes on where it was") as caught:
            model.fetch()
    assert f"({MAX_TRIES} times)" in str(caught.value) and len(waits) == MAX_TRIES - 1
    refuse_loading(tmp_path / "target")


@pytest.mark.parametrize("number", [429, 500, 503])
def test_a_busy_server_is_asked_again(number, hub, server, source, tmp_path, waits):
    server.fault("/revision/main", status(number))
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        server.fault("config.json", status(number), status(number))
        server.fault("model-00001-of-00002.safetensors", status(number))
        model.fetch()
    assert same(tmp_path / "target", source, WANTED) and len(waits) == 2


def test_a_server_without_ranges_sends_the_file_again(hub, server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "PIECE_BYTES", 1000)
    target, name = tmp_path / "target", "model-00001-of-00002.safetensors"

    def whole(answer):
        if answer.status == 206:
            answer.status, answer.body = 200, (source / name).read_bytes()
            del answer.headers["Content-Range"]

    advanced = []

    class Sum(Stopping):
        def advance(self, task, n=1):
            if task == "downloading":
                advanced.append(n)

    with prepared(NAME, target=target, hub=hub) as model:
        server.fault(name, lambda answer: None, cut(5000), whole, whole)
        model.fetch(Sum(0))
        assert sum(advanced) == model.total_bytes and min(advanced) == -5000
    assert same(target, source, WANTED)


def test_damaged_bytes_are_found_and_not_kept(hub, server, source, tmp_path):
    target, name = tmp_path / "target", "model-00001-of-00002.safetensors"
    with prepared(NAME, target=target, hub=hub) as model:
        server.fault(name, lambda answer: None, damage)
        with pytest.raises(DownloadError, match=f"{name}: expected the hash {oid(source, name)}"):
            model.fetch()
    assert not (target / name).exists() and not list(target.glob("*.part"))
    refuse_loading(target)
    fetch(hub, target)
    assert same(target, source, WANTED)


def test_more_bytes_than_the_file_has_are_refused(hub, server, tmp_path):
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        server.fault("model-00001-of-00002.safetensors", lambda answer: None,
                     lambda answer: setattr(answer, "body", answer.body + b"more"))
        with pytest.raises(DownloadError, match="expected [0-9]+ bytes, found more"):
            model.fetch()


def test_a_part_of_another_version_is_not_continued(hub, server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "PIECE_BYTES", 1000)
    target = tmp_path / "target"
    interrupted(hub, target, sum((source / n).stat().st_size for n in WANTED) - 3000)
    assert list(target.glob("model-00002*.part"))
    shutil.rmtree(source)
    write_tiny_model(source, shards=3, num_hidden_layers=3, seed=7)
    fetch(hub, target)
    assert files_of(target) == files_of(source) and same(target, source, files_of(source))


# The folder


def test_a_complete_folder_is_recognised_by_its_hashes(hub, source, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(source, target)
    with prepared(NAME, target=target, hub=hub) as model:
        assert model.missing_bytes() == 0
        model.fetch()
    data = bytearray((target / "model-00001-of-00002.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(InvalidSettings, match="model-00001-of-00002.safetensors is not the mod"):
        fetch(hub, target)


def test_other_folders_are_not_touched(hub, server, source, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidSettings, match="expected an empty folder"):
        fetch(hub, tmp_path / "target")
    assert files_of(tmp_path / "target") == {"notes.txt"}
    interrupted(hub, tmp_path / "other", 1)
    server.repositories["owner/second"] = Repository({"main": source})
    with pytest.raises(InvalidSettings, match="an unfinished download of owner/model:main"):
        fetch(hub, tmp_path / "other", "owner/second")


def test_two_downloads_into_one_folder_are_refused(hub, tmp_path):
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        (tmp_path / "target").mkdir()
        with model_download._locked(tmp_path / "target"):
            with pytest.raises(DownloadError, match="another process is downloading"):
                model.fetch()
        model.fetch()
    assert files_of(tmp_path / "target") == WANTED


def test_a_disk_that_is_too_small_is_refused_but_parts_count(hub, source, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    target, free = tmp_path / "target", [0]
    monkeypatch.setattr(model_download.shutil, "disk_usage", lambda _: Usage(9, 9, free[0]))
    with prepared(NAME, target=target, hub=hub) as model:
        free[0] = model.total_bytes - 1
        with pytest.raises(DownloadError, match="the disk is too small: expected .* free"):
            model.fetch()
        assert not target.exists()
        free[0] = model.total_bytes
        with pytest.raises(Interrupt):
            model.fetch(Stopping(model.total_bytes - 100))
    with prepared(NAME, target=target, hub=hub) as model:
        free[0] = model.missing_bytes()
        assert free[0] < model.total_bytes
        model.fetch()
    assert same(target, source, WANTED)


def test_folders_are_named_as_in_the_webui():
    assert folder_name("owner/model", "main") == "owner_model"
    assert folder_name("owner/model", "4.0bpw") == "owner_model_4.0bpw"
    assert folder_name("owner/model", "refs/pr/1") == "owner_model_refs_pr_1"


# What the hub refuses, and what the engine does


@pytest.mark.parametrize(("text", "expected"), [
    ("owner/model", ("owner/model", None)),
    ("owner/model:4.0bpw", ("owner/model", "4.0bpw")),
    (" owner/model ", ("owner/model", None)),
    ("https://huggingface.co/owner/model", ("owner/model", None)),
    ("https://huggingface.co/owner/model/tree/4.0bpw", ("owner/model", "4.0bpw")),
    ("https://huggingface.co/owner/model/tree/refs%2Fpr%2F1", ("owner/model", "refs/pr/1")),
])
def test_repositories_are_read(text, expected):
    assert parse_repo(text) == expected


@pytest.mark.parametrize("text", ["", "model", "owner/model/more", "owner/model:", "../x/y",
                                  "a b/c", "owner/mo\ndel", "https://huggingface.co/"])
def test_other_texts_are_no_repositories(text):
    with pytest.raises(InvalidSettings, match="^REPO: expected a repository such as"):
        parse_repo(text)


def test_an_unknown_revision_lists_the_branches(hub, server, source, tmp_path):
    server.repositories[NAME].branches |= {"4.0bpw": source, "3.0bpw": source}
    with pytest.raises(ModelNotFound, match="'5.0bpw': expected one of its branches: 3.0bpw, 4.0b"
                                            "pw, main, found none"):
        fetch(hub, tmp_path / "target", revision="5.0bpw")


def test_a_branch_without_weights_names_the_others(hub, server, source, tmp_path):
    (tmp_path / "main").mkdir()
    for name in ("README.md", "measurement.json"):
        shutil.copy(source / name, tmp_path / "main")
    server.repositories[NAME] = Repository({"main": tmp_path / "main", "4.0bpw": source})
    with pytest.raises(ModelNotFound, match="keep each size in a branch.*are 4.0bpw, main"):
        fetch(hub, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    fetch(hub, tmp_path / "target", revision="4.0bpw")
    assert plan(tmp_path / "target").fits


@pytest.mark.parametrize(("name", "words"), [
    ("model.gguf", "model.gguf: expected [*].safetensors, found GGUF"),
    ("pytorch_model.bin", "a pickle file"),
])
def test_other_formats_are_refused_by_name(name, words, hub, server, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_bytes(b"x")
    server.repositories[NAME] = Repository({"main": tmp_path / "other"})
    with pytest.raises(UnsupportedFormat, match=words):
        fetch(hub, tmp_path / "target")


def test_a_model_that_cannot_run_is_refused_before_its_weights(hub, server, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    with pytest.raises(hub_module.ModelNotFound.__mro__[1], match="OddForCausalLM"):
        fetch(hub, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert all(asked != "bytes=0-" for asked in server.ranges("model-00001-of-00002.safetensors"))


@pytest.mark.parametrize(("token", "words"), [
    (None, "owner/none: expected a repository that you may see, found none .status 401.*"
           "hf auth login"),
    ("mine", "owner/none: expected a repository that you may see, found none .status 404"),
])
def test_an_unknown_repository(token, words, server, tmp_path, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelNotFound, match=words):
        fetch(Hub(server.endpoint), tmp_path / "target", "owner/none")


def test_a_private_repository_takes_the_login(server, source, tmp_path, monkeypatch):
    server.repositories[NAME].token = "secret"
    with pytest.raises(ModelNotFound, match="If it is private: Log in"):
        fetch(Hub(server.endpoint), tmp_path / "target")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelNotFound, match="status 404"):
        fetch(Hub(server.endpoint), tmp_path / "target")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text("secret")
    fetch(Hub(server.endpoint), tmp_path / "target")
    assert same(tmp_path / "target", source, WANTED)


@pytest.mark.parametrize(("token", "words"), [
    (None, "a gated one .status 401.. Accept its terms on .*owner/model. Log in"),
    ("mine", "a gated one .status 403.. Accept its terms on .*owner/model$"),
])
def test_a_gated_repository(token, words, server, tmp_path, monkeypatch):
    server.repositories[NAME].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError, match=words):
        fetch(Hub(server.endpoint), tmp_path / "target")


def test_a_file_that_vanishes(hub, server, tmp_path):
    with prepared(NAME, target=tmp_path / "target", hub=hub) as model:
        server.fault("model-00002-of-00002.safetensors", status(404, "EntryNotFound"))
        with pytest.raises(DownloadError, match="has lost a file"):
            model.fetch()
    refuse_loading(tmp_path / "target")


@pytest.mark.parametrize(("fault", "words"), [
    (status(403), "the server forbids it"),
    (status(418), "answers with status 418"),
    (body(b"<html>"), "expected a JSON object"),
    (body(b"[]"), "expected a JSON object"),
    (body(b'{"sha": "x"}'), "expected a commit"),
    (body(b'{"sha": "%s", "siblings": 3}' % (b"0" * 40)), "expected a list of files"),
    *((body(json.dumps({"sha": "0" * 40, "siblings": [entry]}).encode()), words)
      for entry, words in (
        (3, "expected the path of a file"),
        ({"rfilename": "../x", "size": 1, "blobId": "0" * 40}, "expected the path of a file"),
        ({"rfilename": "/etc/x", "size": 1, "blobId": "0" * 40}, "expected the path of a file"),
        ({"rfilename": "C:\\x", "size": 1, "blobId": "0" * 40}, "expected the path of a file"),
        ({"rfilename": "x", "size": -1, "blobId": "0" * 40}, "expected the size"),
        ({"rfilename": "x", "size": True, "blobId": "0" * 40}, "expected the size"),
        ({"rfilename": "x", "size": 1, "blobId": "../../x"}, "expected the hash"),
    )),
])
def test_strange_answers_are_one_error(fault, words, hub, server, tmp_path):
    server.fault("/revision/main", fault)
    with pytest.raises(DownloadError, match=words):
        fetch(hub, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_server_that_is_not_there(tmp_path, waits):
    with pytest.raises(DownloadError, match="expected an answer of http://127.0.0.1:1, .*5 time"):
        fetch(Hub("http://127.0.0.1:1", sleep=waits.append), tmp_path / "target")


def test_without_the_package_the_pip_line_is_said(monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InvalidSettings, match="python -m pip install 'huggingface_hub>=1.0'"):
        Hub()


def test_the_extra_has_the_version_that_the_message_names():
    project = (REPO / "pyproject.toml").read_text()
    assert f'"{hub_module.LIBRARY.replace("_", "-")}>={hub_module.LEAST_VERSION}"' in project


def test_offline_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        Hub()


# The command


@pytest.fixture
def at_server(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    return server


def test_the_command_shows_the_plan_and_downloads(at_server, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["download", NAME, "--ctx-size", "256", "--cache-type", "q4"]) == 0
    printed = capsys.readouterr().out
    for words in ("weights", "256 tokens of context, cache q4", "Largest context that fits",
                  "in 8 files; ", "free on the disk", "owner_model is complete"):
        assert words in printed
    assert printed.index("verdict") < printed.index("in 8 files")
    assert same(tmp_path / "owner_model", source, WANTED)
    assert main(["download", NAME, "--dir", str(tmp_path / "owner_model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing_bytes"] == 0 and set(report["files"]) == WANTED
    assert report["plan"]["total_bytes"] == plan(tmp_path / "owner_model").total_bytes


def test_a_dry_run_downloads_nothing(at_server, tmp_path, capsys):
    arguments = ["download", NAME, "--models-dir", str(tmp_path / "models"), "--dry-run"]
    assert main(arguments) == 0
    assert "free on the disk" in capsys.readouterr().out
    assert not (tmp_path / "models").exists()


def test_a_revision_may_be_named_once(at_server, source, tmp_path, capsys):
    at_server.repositories[NAME].branches["4.0bpw"] = source
    common = ["--models-dir", str(tmp_path), "--dry-run", "--json"]
    folders = []
    for arguments in ([f"{NAME}:4.0bpw"], [NAME, "--revision", "4.0bpw"],
                      [f"{NAME}:4.0bpw", "--revision", "4.0bpw"]):
        assert main(["download", *arguments, *common]) == 0
        folders.append(json.loads(capsys.readouterr().out)["folder"])
    assert set(folders) == {str(tmp_path / "owner_model_4.0bpw")}
    assert main(["download", f"{NAME}:4.0bpw", "--revision", "main", *common]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --revision: expected '4.0bpw'") and error.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_and_the_same_command_again(server, source, tmp_path):
    """In processes of their own, with HF_ENDPOINT, as a person runs it."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "exl_loader", "download", NAME, "--dir", str(target)]
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"),
                   "HF_HUB_OFFLINE": "0"}

    def hold(answer):
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    asked = len(server.requests)
    server.fault("/cdn/" + "owner/model/resolve/" + server.commit(NAME, "main")
                 + "/model-00002-of-00002.safetensors", lambda answer: None, hold)
    process = subprocess.Popen(command, cwd=REPO, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (target / "model-00001-of-00002.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, EXIT_INTERRUPTED), err
    assert "The same command goes on where this one was." in err and "Traceback" not in err
    assert "verdict" in out and len(server.requests) > asked
    refuse_loading(target)
    again = subprocess.run(command, cwd=REPO, env=environment, text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert re.search(r"in 8 files, .* of it here already", again.stdout)
    assert same(target, source, WANTED) and files_of(target) == WANTED


def test_the_server_speaks_to_the_hubs_own_client(server, source, tmp_path):
    """What these tests prove holds for the hub as far as their server is like it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    api = HfApi(endpoint=server.endpoint, token=False)
    info = api.model_info(NAME, files_metadata=True)
    assert info.sha == server.commit(NAME, "main")
    large = {one.rfilename: one.lfs.sha256 for one in info.siblings if one.lfs is not None}
    assert large["pytorch_model.bin"] == oid(source, "pytorch_model.bin")
    assert [ref.name for ref in api.list_repo_refs(NAME).branches] == ["main"]
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        path = api.hf_hub_download(NAME, name, local_dir=tmp_path / "theirs")
        assert (source / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), path
    found = api.parse_safetensors_file_metadata(NAME, "model-00001-of-00002.safetensors")
    assert found.tensors
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="none")
    server.repositories[NAME].gated = True
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(NAME, "README.md", local_dir=tmp_path / "gated")
