"""The plugin in a real text-generation-webui, without its page and with it.

Runs where TEXTGEN_WEBUI_DIR is a checkout of the web UI; TEXTGEN_WEBUI_PYTHON is its Python
where that cannot be found. Installs into it, and takes everything out again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import exl_loader
from exl_loader.webui_install import command, host, saved

WEBUI = os.environ.get("TEXTGEN_WEBUI_DIR")
PYTHON = os.environ.get("TEXTGEN_WEBUI_PYTHON")
DEMO = Path(exl_loader.__file__).parent / "demo_model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not WEBUI, reason="TEXTGEN_WEBUI_DIR is not set"),
    pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model"),
]

PROMPT = "The quick brown"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    """The web UI's folder with the plugin in it."""
    root = Path(WEBUI or "").resolve()
    python = Path(PYTHON) if PYTHON else None
    before = tracked(root)
    command.install(root, python)
    yield root
    command.uninstall(root, python)
    assert tracked(root) == before, "no file of the web UI may be changed"
    assert not host.extension_folder(root).exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(DEMO, folder / "demo")
    return folder


@pytest.fixture(scope="module")
def expected():
    """The greedy text of the engine itself, and its reservation."""
    with exl_loader.load(DEMO, ctx_size=512, cache_type="q4") as model:
        with model.generate(PROMPT, {"temperature": 0, "max_new_tokens": 12}) as generation:
            return "".join(generation), model.reservation.total_bytes


@pytest.fixture(scope="module")
def server(webui, models):
    """One server without a page, for the tests that need no flags."""
    with Server(webui, models) as running:
        yield running


def tracked(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for folder in ("modules", "extensions", ".") for p in (root / folder).glob("*.py")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """The web UI as a process, with its API."""

    def __init__(self, root: Path, models: Path, *flags: str, page: bool = False) -> None:
        self.port, self.page_port = free_port(), free_port()
        self._has_page = page
        python = host.find_python(root, Path(PYTHON) if PYTHON else None).executable
        arguments = ["--api", "--api-port", str(self.port), "--model-dir", str(models), *flags]
        arguments += ["--listen-port", str(self.page_port)] if page else ["--nowebui"]
        self.log = models.parent / f"server-{self.port}.log"
        self._file = self.log.open("w")
        self._process = subprocess.Popen(
            [str(python), "server.py", *arguments], cwd=root, stdout=self._file,
            stderr=subprocess.STDOUT, env=host.clean_environment() | {"OMP_NUM_THREADS": "1"})

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("internal/model/info")
                if self._has_page:
                    socket.create_connection(("127.0.0.1", self.page_port), 5).close()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise AssertionError(self.said())

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._file.close()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(self._url(path), timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, **body):
        request = urllib.request.Request(
            self._url(path), json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=240) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code

    def load(self, name="demo", **args):
        return self.post("internal/model/load", model_name=name, args=args, settings={})

    def text(self, **changes) -> str:
        return self.post("completions", **GREEDY | changes)["choices"][0]["text"]

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/{path}"


def test_load_generate_and_unload_over_the_api(server, expected):
    assert server.load(ctx_size=512, cache_4bit=True) == "OK"
    assert server.get("internal/model/info")["loader"] == "ExLlamav2"
    assert server.text() == expected[0]
    chat = server.post("chat/completions", messages=[{"role": "user", "content": "Hi"}],
                       max_tokens=8)
    assert chat["choices"][0]["message"]["content"]
    # v4.0 answers nothing, later ones OK.
    assert server.post("internal/model/unload") in ("OK", None)
    assert server.get("internal/model/info")["model_name"] == "None"


def test_both_loaders_give_the_same_greedy_text(server, expected):
    assert server.load(loader="ExLlamav2_HF", ctx_size=512, cache_type="q4") == "OK"
    assert server.get("internal/model/info")["loader"] == "ExLlamav2_HF"
    assert server.text() == expected[0]
    assert server.text(guidance_scale=1.5, negative_prompt="something else")
    answer = server.text(grammar_string='root ::= "yes" | "no"', temperature=1)
    assert answer in ("yes", "no")


def test_log_probabilities_biases_and_echo(server):
    server.load(ctx_size=512)
    choice = server.post("completions", **GREEDY, logprobs=3)["choices"][0]
    # v4.0 gives the alternatives of the tokens and no more.
    top = choice["logprobs"]["top_logprobs"]
    assert all(0 < len(t) <= 3 and max(t.values()) < 0 for t in top)
    if "tokens" not in choice["logprobs"]:
        return
    assert len(top) == 12
    echo = server.post("completions", **GREEDY, logprobs=1, echo=True)["choices"][0]
    assert echo["text"].startswith(PROMPT)
    assert len(echo["logprobs"]["tokens"]) >= 12
    (token,) = server.post("internal/encode", text="x")["tokens"][-1:]
    biased = server.text(logit_bias={str(token): 100}, max_tokens=3)
    assert biased.replace(" ", "") == "xxx"


def test_token_counts_and_logits(server):
    server.load(ctx_size=512)
    tokens = server.post("internal/encode", text=PROMPT)["tokens"]
    assert server.post("internal/token-count", text=PROMPT)["length"] == len(tokens)
    plain = server.post("internal/logits", prompt=PROMPT, use_samplers=False)
    sampled = server.post("internal/logits", prompt=PROMPT, use_samplers=True, top_k=5)
    plain, sampled = plain.get("logits", plain), sampled.get("logits", sampled)
    assert max(plain, key=plain.get).strip("▁ ") == max(sampled, key=sampled.get).strip("▁ ")
    assert sum(value > 0 for value in sampled.values()) == 5


def test_requests_at_once_and_the_same_seed(server):
    server.load(ctx_size=2048)
    wanted = [{"prompt": f"{PROMPT} {i}", "temperature": 1, "seed": i, "max_tokens": 20}
              for i in range(4)]
    alone = [server.text(**w) for w in wanted]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: server.text(**w), wanted))
    assert together == alone


def test_stopping_from_outside(server):
    server.load(ctx_size=1024)
    found = []
    ask = threading.Thread(target=lambda: found.append(server.text(
        max_tokens=900, temperature=1, ban_eos_token=True)))
    began = time.monotonic()
    ask.start()
    time.sleep(0.3)
    server.post("internal/stop-generation")
    ask.join()
    assert found and time.monotonic() - began < 60


def test_refusals_leave_no_model_and_the_reason_in_the_log(server):
    server.load(ctx_size=512)
    assert server.load(cache_type="q3") in (400, 500)
    assert "expected one of" in server.said()
    assert server.load(name="absent") in (400, 500)
    # Up to v4.3 the web UI keeps the options of a load that failed.
    assert server.load(ctx_size=512, cache_type="fp16") == "OK" and server.text()


def test_the_command_line(webui, models, expected):
    flags = ["--model", "demo", "--loader", "exllama-v2", "--cache-4bit", "--ctx-size", "512"]
    with Server(webui, models, *flags) as server:
        assert server.get("internal/model/info") == {
            "model_name": "demo", "lora_names": [], "loader": "ExLlamav2"}
        assert server.text() == expected[0]


def test_the_command_line_recognises_the_model_and_saved_settings(webui, models, expected):
    settings = "demo$:\n  loader: ExLlamav2_HF\n  max_seq_len: 512\n  cache_4bit: true\n"
    (models / saved.CONFIG).write_text(settings)
    try:
        with Server(webui, models, "--model", "demo") as server:
            assert server.get("internal/model/info")["loader"] == "ExLlamav2_HF"
            assert server.text() == expected[0]
    finally:
        (models / saved.CONFIG).unlink()


def test_the_page(webui, models):
    """Choose, toggle, gauge, load, save, reload the page, refuse."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    with Server(webui, models, page=True) as server, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        expect = sync_api.expect
        expect.set_options(timeout=60_000)

        def open_model_tab():
            page.goto(f"http://127.0.0.1:{server.page_port}", wait_until="domcontentloaded")
            page.get_by_role("tab", name="Model", exact=True).click()

        def button(name):
            return page.get_by_role("button", name=name, exact=True)

        gauge = page.locator("#exl-gauge")
        cache_type = page.get_by_label("cache-type")
        open_model_tab()
        page.get_by_label("Model", exact=True).first.click()
        page.get_by_role("option", name="demo").click()
        expect(page.get_by_label("Model loader")).to_have_value("ExLlamav2")
        expect(gauge).to_contain_text("Fits")
        assert not page.locator("#exl_pick").is_visible()
        page.get_by_label("cache_4bit").check()
        expect(cache_type).to_have_value("q4")
        expect(gauge).to_contain_text("4-bit cache")
        page.get_by_label("cache_8bit").check()
        expect(cache_type).to_have_value("q8")
        expect(page.get_by_label("cache_4bit")).not_to_be_checked()
        gauge.get_by_role("button").nth(2).click()
        expect(cache_type).to_have_value("q4")
        button("Load").click()
        expect(gauge).to_contain_text("Measured equals reserved, to the byte")
        assert server.get("internal/model/info")["loader"] == "ExLlamav2"
        button("Save settings").click()
        expect(page.get_by_text("Settings for")).to_be_visible()
        assert "cache_4bit: true" in (models / saved.CONFIG).read_text()
        open_model_tab()
        expect(page.get_by_label("Model loader")).to_have_value("ExLlamav2")
        expect(page.get_by_label("cache_4bit")).to_be_checked()
        # Opening the page leaves the model as it is.
        assert server.text(), server.said()[-3000:]
        cache_type.fill("q3")
        cache_type.press("Enter")
        expect(gauge).to_contain_text("Cannot be loaded")
        button("Load").click()
        expect(page.locator(".exl-verdict")).to_have_count(2)
        assert server.get("internal/model/info")["model_name"] in ("demo", "None")
        browser.close()
    (models / saved.CONFIG).unlink()


def test_many_users(webui, models):
    with Server(webui, models, "--multi-user", "--model", "demo", page=True) as server:
        assert server.text()
        assert "Traceback" not in server.said()
