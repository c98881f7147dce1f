"""One model, one prompt, the same settings: all five front ends generate and reserve the same.

They are the web UI's loaders ExLlamav2 and ExLlamav2_HF, TabbyAPI's backend, the standalone page's
session, and the command line. The web UI and TabbyAPI are their doubles, and the real ones where
TEXTGEN_WEBUI_DIR and TABBYAPI_DIR name them.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import exl_loader
from exl_loader.memory.reservation import Reservation
from extension.page.session import Session
from extension.panel.panel import ModelChoice
from extension.tabby.container import ExlLoaderContainer
from extension.webui import loading, registration
from support import REPO, tabby_server
from support.host_server import DEMO, PROMPT, copy_demo
from support.tabby_double import HFModel, enter_tabby, params
from support.tabby_server import TabbyServer
from support.webui_double import enter_webui, forget_webui, write_webui
from support.webui_server import MARKS, Server

TOKENS = 40
CTX_SIZE = 768
SETTINGS = {"temperature": 0, "max_new_tokens": TOKENS, "ban_eos_token": True}

pytestmark = pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model")

needs_webui = MARKS[2]
needs_tabbyapi = tabby_server.MARKS[2]

# In TabbyAPI's names. Its default of chunk_size is another one.
TABBY_OPTIONS = {"max_seq_len": CTX_SIZE, "chunk_size": 256}
TABBY_REQUEST = {"temperature": 0, "max_tokens": TOKENS, "ban_eos_token": True}


class Answer(NamedTuple):
    """What a front end generated and reserved, with the ids if it has them."""

    text: str
    total_bytes: int
    token_ids: list[int] | None = None


@pytest.fixture(params=["fp16", "q8", "q4"])
def cache_type(request):
    return request.param


def of_session(cache_type: str) -> tuple[Answer, Reservation]:
    session = Session()
    session.start_load(ModelChoice(str(DEMO), ctx_size=CTX_SIZE, cache_type=cache_type))
    assert session.wait() == "", "the load's error"
    try:
        generation = session.continue_text(PROMPT, SETTINGS)
        text = "".join(generation)
        assert session.model.allocated_bytes() == session.model.reservation.total_bytes
        reservation = session.model.reservation
        return Answer(text, reservation.total_bytes, generation.token_ids), reservation
    finally:
        session.unload()


def of_command_line(cache_type: str) -> tuple[Answer, int]:
    """Return what `generate` writes and takes, and what `plan` prints."""
    options = [str(DEMO), "--ctx-size", str(CTX_SIZE), "--cache-type", cache_type, "--json"]
    writing = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", str(TOKENS),
               "--ban-eos-token"]

    def run(*arguments: str):
        result = subprocess.run([sys.executable, "-m", "exl_loader", *arguments], cwd=REPO,
                                capture_output=True, text=True, check=True)
        return json.loads(result.stdout)

    found = run("generate", *options, *writing)
    assert found["new_tokens"] == TOKENS
    planned = sum(device["total_bytes"] for device in run("plan", *options)["devices"])
    return Answer(found["text"], found["allocated_bytes"]), planned


def of_double(cache_type: str, root: Path, monkeypatch) -> list[tuple[Answer, Reservation]]:
    """Both loaders, called as the web UI calls them."""
    enter_webui(monkeypatch, write_webui(root), "--model-dir", str(DEMO.parent))
    models = importlib.import_module("modules.models")
    assert registration.register()
    args = sys.modules["modules.shared"].args
    found = []
    for loader, ask in (("ExLlamav2", ask_native), ("ExLlamav2_HF", ask_hf)):
        args.ctx_size, args.cache_type = CTX_SIZE, cache_type
        model, _ = models.load_model(DEMO.name, loader)
        text, token_ids = ask(model)
        reservation = loading.current().reservation
        found.append((Answer(text, loading.current().allocated_bytes(), token_ids), reservation))
        model.unload()
    return found


@pytest.fixture
def double(tmp_path, monkeypatch, cache_type):
    yield of_double(cache_type, tmp_path / "webui", monkeypatch)
    forget_webui()


def of_tabby(cache_type: str, monkeypatch) -> tuple[Answer, Reservation]:
    """TabbyAPI's backend, called as TabbyAPI calls it."""
    enter_tabby(monkeypatch)

    async def run() -> tuple[Answer, Reservation]:
        container = await ExlLoaderContainer.create(
            DEMO, HFModel(), **TABBY_OPTIONS, cache_mode=cache_type.upper())
        await container.load()
        try:
            pieces = [piece async for piece in container.stream_generate(
                "1", PROMPT, params(**TABBY_REQUEST), None, None) if "text" in piece]
            reservation = container.model.reservation
            answer = Answer(
                "".join(piece["text"] for piece in pieces), container.model.allocated_bytes(),
                [token for piece in pieces for token in piece["token_ids"]])
            return answer, reservation
        finally:
            await container.unload(shutdown=True)

    return asyncio.run(run())


def ask_native(model) -> tuple[str, list[int]]:
    state = SETTINGS | {"logprobs": 1, "truncation_length": CTX_SIZE, "add_bos_token": True}
    text = model.generate(PROMPT, state)
    entries = model.last_completion_probabilities
    return text, [entry["top_logprobs"][0]["token_id"] for entry in entries]


def ask_hf(model) -> tuple[str, list[int]]:
    loaded = model.loaded
    prompt_ids = loaded.encode(PROMPT)
    output = model.generate(
        inputs=torch.tensor([prompt_ids]), max_new_tokens=TOKENS, do_sample=False,
        suppress_tokens=list(loaded.eos_token_ids))
    new_ids = output[0, len(prompt_ids):].tolist()
    stream = loaded.tokenizer.stream(previous_ids=prompt_ids)
    return "".join(map(stream.push, new_ids)) + stream.flush(), new_ids


def test_all_five_front_ends_generate_the_same_tokens_and_reserve_the_same(
    double, cache_type, monkeypatch
):
    pytest.importorskip("transformers")
    tabby, tabby_plan = of_tabby(cache_type, monkeypatch)
    (native, native_plan), (hf, hf_plan) = double
    session, session_plan = of_session(cache_type)
    command_line, planned = of_command_line(cache_type)
    assert len(session.token_ids) == TOKENS and session.text
    assert native == hf == tabby == session
    assert command_line == session._replace(token_ids=None)
    assert native_plan.devices[0].total_bytes == hf_plan.devices[0].total_bytes == planned
    # Every part, not only the sum.
    parts = [
        (plan.weights_bytes, plan.cache_bytes, plan.workspace_bytes)
        for plan in (p.devices[0] for p in (native_plan, hf_plan, tabby_plan, session_plan))
    ]
    assert len(set(parts)) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_webui
def test_the_real_web_ui_agrees_as_well(webui, webui_models):
    with Server(webui, webui_models) as server:
        for cache_type in ("fp16", "q8", "q4"):
            expected = of_session(cache_type)[0]
            for loader in ("ExLlamav2", "ExLlamav2_HF"):
                options = {"cache_type": cache_type, "cache_4bit": False, "cache_8bit": False}
                assert server.load(loader=loader, ctx_size=CTX_SIZE, **options) == "OK"
                text = server.text(max_tokens=TOKENS, ban_eos_token=True)
                assert Answer(text, server.reserved_bytes()[-1]) == expected._replace(
                    token_ids=None)
                planned = exl_loader.plan(
                    webui_models / "demo", ctx_size=CTX_SIZE, cache_type=cache_type
                )
                assert server.reserved_bytes()[-1] == planned.total_bytes


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_tabbyapi
def test_the_real_tabbyapi_agrees_as_well(tabbyapi, tmp_path):
    copy_demo(tmp_path / "models", "demo")
    (tmp_path / "loras").mkdir()
    with TabbyServer(tabbyapi, tmp_path) as server:
        for cache_type in ("fp16", "q8", "q4"):
            expected = of_session(cache_type)[0]
            server.load("demo", cache_mode=cache_type.upper(), **TABBY_OPTIONS)
            found = Answer(server.text(prompt=PROMPT, **TABBY_REQUEST),
                           server.reserved_bytes()[-1])
            assert found == expected._replace(token_ids=None)
            server.ask("v1/model/unload")
