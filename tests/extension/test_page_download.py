"""Downloads in the page, from a local server that speaks the hub's protocol."""

import contextlib
import json
import time
from collections import namedtuple

import pytest

from exl_loader.checkpoint.weight_files import UNFINISHED_NAME
from support.hub_server import Repository, cut, hub_server
from support.tiny import write_tiny_model
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
constants = pytest.importorskip("huggingface_hub.constants")

from exl_loader.commands import model_download  # noqa: E402
from extension.page.download_view import plan_html  # noqa: E402
from extension.page.downloads import COMPLETE, NONE, PLANNED, Downloads  # noqa: E402
from support.page_server import Page, serve  # noqa: E402

expect = sync_api.expect

NAME = "owner/model"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A hub with a model in two branches, a gated one, and one of another program."""
    folder = tmp_path_factory.mktemp("hub")
    model = write_tiny_model(folder / "model", num_hidden_layers=8)
    other = folder / "gguf"
    other.mkdir()
    (other / "model-Q4_0.gguf").write_bytes(b"GGUF")
    with hub_server(**{
        NAME: Repository({"main": model, "4.0bpw": model}),
        "owner/gated": Repository({"main": model}, gated=True),
        "owner/gguf": Repository({"main": other}),
    }) as running:
        yield running


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server, as the only hub that this process knows, without anybody's login."""
    server.requests.clear()
    server.faults.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return server


def wait(downloads, *stages):
    """Wait until it is in one of the stages, and return what is shown."""
    deadline = time.monotonic() + 60
    while (shown := downloads.shown()).stage not in stages:
        assert time.monotonic() < deadline, shown
        time.sleep(0.01)
    return shown


def test_the_plan_is_shown_before_the_weights_and_the_download_completes(hub, tmp_path):
    downloads = Downloads()
    assert downloads.shown().stage == NONE and plan_html(downloads.shown()) == ""
    downloads.look_up(f"{NAME}:4.0bpw", str(tmp_path))
    shown = wait(downloads, PLANNED)
    target = tmp_path / "owner_model_4.0bpw"
    assert shown.may_start and shown.model.target == target and not target.exists()
    assert all(found == "bytes=0-262143" for found in hub.ranges(WEIGHTS))
    html = plan_html(shown)
    for text in (f"{NAME}:4.0bpw", str(target), "free on the disk", "Files", WEIGHTS,
                 "16-bit", "4-bit", "exl-good"):
        assert text in html, text
    assert "here already" not in html
    for nbytes in shown.model.reservation.bytes_by_cache_type.values():
        assert f'title="{nbytes:,} bytes"' in html

    before = downloads.version
    downloads.start()
    shown = wait(downloads, COMPLETE)
    assert downloads.version != before and downloads.completed == 1
    assert (target / WEIGHTS).exists() and not (target / UNFINISHED_NAME).exists()
    assert "Complete" in plan_html(shown)
    # Looked up again, it is there.
    downloads.look_up(f"{NAME}:4.0bpw", str(tmp_path))
    assert wait(downloads, PLANNED).missing_bytes == 0


@pytest.fixture
def small_pieces(monkeypatch):
    """Weights arrive in small pieces."""
    from exl_loader.commands import hub as hub_module

    monkeypatch.setattr(hub_module, "PIECE_BYTES", 1000)


def test_a_stopped_download_goes_on_where_it_was(hub, tmp_path, small_pieces, monkeypatch):
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    shown = wait(downloads, PLANNED)
    total = shown.missing_bytes
    arrived = []
    real = model_download.Hub.pieces

    def stop_after_some(self, repo, file, first, end=None):
        for offset, piece in real(self, repo, file, first, end):
            yield offset, piece
            arrived.append(len(piece))
            if len(arrived) == 5:
                downloads.stop()

    monkeypatch.setattr(model_download.Hub, "pieces", stop_after_some)
    downloads.start()
    shown = wait(downloads, PLANNED)
    assert len(arrived) == 5 and 0 < shown.missing_bytes < total
    assert "here already" in plan_html(shown) and shown.problem == ""
    target = shown.model.target
    assert (target / UNFINISHED_NAME).exists()
    # A page that was started again goes on as well.
    downloads.stop()
    assert downloads.shown().stage == NONE
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    assert wait(downloads, PLANNED).missing_bytes == shown.missing_bytes
    hub.requests.clear()
    downloads.start()
    wait(downloads, COMPLETE)
    weights = shown.model.files[-1].size
    assert hub.ranges(WEIGHTS) == [f"bytes={weights - shown.missing_bytes}-{weights - 1}"]
    assert not (target / UNFINISHED_NAME).exists()


def test_a_cut_connection_is_said_and_the_download_goes_on(hub, tmp_path, monkeypatch):
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    wait(downloads, PLANNED)
    hub.fault(WEIGHTS, *[cut(0)] * 12)
    monkeypatch.setattr("exl_loader.commands.hub.WAIT_S", 0.01)
    downloads.start()
    shown = wait(downloads, PLANNED)
    assert "Interrupted" in shown.problem and "goes on where it was" in shown.problem
    hub.faults.clear()
    downloads.start()
    assert wait(downloads, COMPLETE).problem == ""


@pytest.mark.parametrize(("repo", "words"), [
    ("nonsense", "OWNER/NAME"), ("", "OWNER/NAME"), ("owner/<b>", "OWNER/NAME"),
    ("owner/unknown", "owner/unknown"), (f"{NAME}:5.0bpw", "4.0bpw, main"),
    ("owner/gated", "Accept its terms"), ("owner/gguf", "GGUF"),
])
def test_what_cannot_be_downloaded_is_one_clear_error(repo, words, hub, tmp_path):
    downloads = Downloads()
    downloads.look_up(repo, str(tmp_path))
    shown = wait(downloads, NONE)
    assert "Cannot be downloaded" in shown.problem and words in shown.problem
    assert "Traceback" not in shown.problem and "<b>&" not in shown.problem
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_one_clear_error(monkeypatch, hub, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("exl_loader.commands.hub.WAIT_S", 0.01)
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    problem = wait(downloads, NONE).problem
    assert "Check the network" in problem and "127.0.0.1:9" in problem


def test_a_disk_without_room_is_said_with_the_plan(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(model_download.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    shown = wait(downloads, PLANNED)
    assert "the disk is too small" in shown.problem and not shown.may_start
    assert "Not ready" in plan_html(shown) and ">Ready" not in plan_html(shown)
    downloads.start()
    assert downloads.shown().stage == PLANNED and list(tmp_path.iterdir()) == []


def test_another_model_waits_until_a_download_has_ended(hub, tmp_path, monkeypatch):
    downloads = Downloads()
    downloads.look_up(NAME, str(tmp_path))
    wait(downloads, PLANNED)
    real = model_download.ModelDownload.fetch

    def fetch(self, progress, stopped):
        downloads.look_up("owner/gguf", str(tmp_path))
        assert "one model at a time" in downloads.shown().problem
        return real(self, progress, stopped)

    monkeypatch.setattr(model_download.ModelDownload, "fetch", fetch)
    downloads.start()
    assert wait(downloads, COMPLETE).name == f"{NAME}:main"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_model_is_downloaded_in_one_tab_and_chosen_in_another(browser, server, tmp_path):
    write_tiny_model(tmp_path / "first")
    server.faults.clear()
    environ = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN_PATH": str(tmp_path / "none"),
               "HF_HUB_OFFLINE": "0"}
    with contextlib.contextmanager(serve)(str(tmp_path / "first"), **environ) as address:
        context = browser.new_context()
        with Page(context, address) as page, Page(context, address) as other:
            for each in (page, other):
                each.page.bring_to_front()
                each.click("#exl_download_fold > button")
            repo = page.page.locator("#exl_repo textarea, #exl_repo input")
            repo.fill("nonsense")
            page.page.bring_to_front()
            page.click("#exl_look_up")
            page.expect_text("#exl_download_problem", "OWNER/NAME")
            repo.fill(NAME)
            page.click("#exl_look_up")
            page.expect_text("#exl_download", "free on the disk")
            expect(page.page.locator("#exl_download_problem")).to_be_hidden()
            other.expect_text("#exl_download", "free on the disk")
            other.click("#exl_download_start")
            other.expect_text("#exl_download", "Complete")
            page.expect_text("#exl_download", "Complete")
            page.click("#exl_model_dir input")
            expect(page.page.get_by_role("option", name="owner_model")).to_be_visible()
            page.page.keyboard.press("Escape")
            other.click("#exl_download_choose")
            other.expect_gauge("owner_model")
            other.click("#exl_load")
            other.expect_text("#exl_line", "owner_model")
            page.expect_gauge("owner_model")
        context.close()
    assert json.loads((tmp_path / "owner_model" / "config.json").read_text())
