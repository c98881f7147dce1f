"""The standalone page answers requests from its own page on this machine only."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from extension.page.guard import (
    MAX_BODY_BYTES,
    AllowedHosts,
    Guard,
    Refusal,
    check_request,
    host_name,
)
from support import REPO

OWN = "127.0.0.1:7860"


def headers(host=OWN, origin=None, **more):
    found = [] if host is None else [(b"host", host.encode("latin-1"))]
    if origin is not None:
        found.append((b"origin", origin.encode("latin-1")))
    return found + [(name.replace("_", "-").encode(), value.encode())
                    for name, value in more.items()]


@pytest.mark.parametrize(("host", "origin"), [
    (OWN, None), ("localhost:7860", None), ("LocalHost:7860", None), ("localhost.:7860", None),
    ("[::1]:7860", None), ("[::1]", None), ("127.0.0.1", None), ("127.8.9.1:1", None),
    ("127.0.0.1.", None),
    ("[::ffff:127.0.0.1]:7860", None),
    # Another port of this machine may lead here, for example through SSH.
    ("localhost:9000", "http://localhost:9000"),
    (OWN, "http://127.0.0.1:7860"), ("LOCALHOST:7860", "http://localhost:7860"),
    ("[::1]:7860", "http://[::1]:7860"), ("localhost", "http://localhost"),
    ("localhost:80", "http://localhost"), ("localhost", "https://localhost"),
])
def test_this_machine_is_answered(host, origin):
    check_request(headers(host, origin), AllowedHosts())


@pytest.mark.parametrize("host", [
    "evil.example.com", "evil.example.com:7860", "EVIL.EXAMPLE.COM", "evil.example.com.",
    "localhost.evil.example.com", "127.0.0.1.evil.example.com", "evil-localhost", "localhost..",
    "192.168.0.7:7860", "0.0.0.0:7860", "[::]:7860", "[fe80::1]", "[2001:db8::1]:7860",
    "8.8.8.8", "[::ffff:8.8.8.8]", "127.1", "2130706433", "0x7f000001", "",
    "localhost:7860:7860", "localhost:x", "localhost:99999", "localhost:-1", "user@localhost",
    "localhost/", "localhost#", "localhost,evil.example.com", "localhost evil", "::1", "[::1",
    "[localhost]", "localhost\xe4", "localhost\xb2", "[::1%eth0]", "a" * 10_000,
])
def test_other_hosts_are_refused(host):
    with pytest.raises(Refusal) as caught:
        check_request(headers(host), AllowedHosts(["other.example.org"]))
    assert caught.value.status in (400, 403) and len(str(caught.value)) < 400


@pytest.mark.parametrize("origin", [
    "null", "", "http://evil.example.com", "https://evil.example.com:7860", "http://localhost:8888",
    "http://localhost:7860", "http://127.0.0.1", "http://127.0.0.1:7861", "ftp://127.0.0.1:7860",
    "file://", "chrome-extension://abc", "127.0.0.1:7860", "http://127.0.0.1:7860@evil.example.com",
    "http://evil@127.0.0.1:7860", "http://127.0.0.1:7860/", "http://127.0.0.1:x",
    "http://[::1]:7860", "http://[", "http://127.0.0.1:7860.evil.example.com",
])
def test_other_origins_are_refused(origin):
    with pytest.raises(Refusal):
        check_request(headers(OWN, origin), AllowedHosts())


@pytest.mark.parametrize("found", [
    headers(None), headers(OWN) + headers(OWN), headers(OWN) + headers("evil.example.com"),
    headers(OWN, "http://127.0.0.1:7860") + [(b"origin", b"http://evil.example.com")],
    [(b"Host", b"evil.example.com")],
])
def test_missing_and_doubled_headers_are_refused(found):
    with pytest.raises(Refusal):
        check_request(found, AllowedHosts())


def test_requests_of_another_sites_page_without_an_origin_are_refused():
    with pytest.raises(Refusal):
        check_request(headers(sec_fetch_site="cross-site", sec_fetch_mode="no-cors"),
                      AllowedHosts())
    # A link in another site's page.
    check_request(headers(sec_fetch_site="cross-site", sec_fetch_mode="navigate"), AllowedHosts())
    check_request(headers(sec_fetch_site="same-origin", sec_fetch_mode="cors"), AllowedHosts())


def test_allowed_hosts_are_answered():
    allowed = AllowedHosts(["Box.example.org", "192.168.0.7"])
    for host in ("box.example.org", "BOX.EXAMPLE.ORG.:443", "192.168.0.7:80"):
        check_request(headers(host), allowed)
    check_request(headers("box.example.org", "https://box.example.org"), allowed)
    # A proxy that uses its own address for the page.
    check_request(headers(OWN, "https://box.example.org"), allowed)
    for origin in ("https://other.example.org", "null", "https://box.example.org.evil.com"):
        with pytest.raises(Refusal):
            check_request(headers(OWN, origin), allowed)
    with pytest.raises(Refusal):
        check_request(headers("xbox.example.org"), allowed)


@pytest.mark.parametrize(("text", "name"), [
    ("Box.example.org", "box.example.org"), ("::1", "::1"), ("[2001:db8::1]", "2001:db8::1"),
])
def test_the_option_names_a_host(text, name):
    assert host_name(text) == name


@pytest.mark.parametrize("text", ["", "*", "http://x", "x:80", "a b", "x/", "x@y", "ä"])
def test_invalid_host_names_are_refused(text, capsys):
    from extension.page.server import main

    with pytest.raises(SystemExit):
        main([f"--allow-host={text}"])
    assert "expected a host name or address" in capsys.readouterr().err


# The middleware


def ask(scope, messages=()):
    """Send a request through the guard; return the answer and what the app received."""
    received, sent = [], []
    pending = list(messages) or [{"type": "http.request", "body": b""}]

    async def app(scope, receive, send):
        while True:
            message = await receive()
            received.append(message)
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return pending.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, AllowedHosts())(scope, receive, send))
    return sent, received


def http(path="/", method="GET", found=None, kind="http"):
    return {"type": kind, "path": path, "method": method, "headers": found or headers()}


def test_own_requests_go_through():
    sent, received = ask(http())
    assert sent[0]["status"] == 200 and len(received) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/theme.css"])
def test_requests_from_elsewhere_reach_no_route(path, method):
    for found in (headers("evil.example.com"), headers(OWN, "null")):
        sent, received = ask(http(path, method, found))
        assert sent[0]["status"] == 403 and received == []


def test_websockets_are_closed():
    for found in (headers("evil.example.com"), headers()):
        sent, received = ask(http("/ws", found=found, kind="websocket"))
        assert sent == [{"type": "websocket.close", "code": 1008, "reason": sent[0]["reason"]}]
        assert received == []


@pytest.mark.parametrize(("path", "found"), [
    ("/gradio_api/upload", headers()), ("/upload", headers()), ("/gradio_api/Upload/", headers()),
    ("/x", headers(content_type="multipart/form-data; boundary=x")),
    ("/x", headers(content_type="Multipart/Mixed")),
])
def test_uploads_are_refused(path, found):
    sent, received = ask(http(path, "POST", found))
    assert sent[0]["status"] == 403 and received == []


@pytest.mark.parametrize("length", [str(MAX_BODY_BYTES + 1), "9" * 5000, "-1", "x", "1e3"])
def test_long_requests_are_refused(length):
    sent, received = ask(http("/x", "POST", headers(content_length=length)))
    assert sent[0]["status"] == 413 and received == []


def test_requests_in_chunks_are_bounded():
    chunk = {"type": "http.request", "body": bytes(1 << 20), "more_body": True}
    _, received = ask(http("/x", "POST"), [chunk] * 100)
    assert received[-1] == {"type": "http.disconnect"}
    assert sum(len(message.get("body", b"")) for message in received) == MAX_BODY_BYTES


# The page that is served


@pytest.fixture(scope="module")
def port():
    pytest.importorskip("gradio")
    from extension.page.server import launch, make_page
    from extension.page.session import Session
    from extension.page.watch import Watch
    from extension.panel.panel import ModelChoice

    page = make_page(Session(), ModelChoice("nowhere"), watch := Watch())
    address = launch(page, watch, allowed_hosts=["box.example.org"])
    yield int(address.rpartition(":")[2].strip("/"))
    page.close(verbose=False)


def status(port, request):
    """Send the text of a request; return the status code and the text of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode("latin-1"))
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = connection.recv(65536)
            if not data:
                break
            answer += data
    return int(answer.split(None, 2)[1]), answer.decode("latin-1").lower()


def test_the_first_answers_of_a_server_are_complete(monkeypatch):
    """A tab whose server starts again asks as soon as it listens, before `launch` returns."""
    http_server = pytest.importorskip("gradio.http_server")
    from extension.page.server import launch, make_page
    from extension.page.session import Session
    from extension.page.watch import PATH, Watch
    from extension.panel.panel import ModelChoice

    start, seen = http_server.start_server, {}

    def start_and_ask(*arguments, **options):
        started = start(*arguments, **options)
        address = f"http://127.0.0.1:{started[1]}"
        with urllib.request.urlopen(f"{address}/", timeout=300) as answer:
            seen["page"] = answer.read().decode()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}/{PATH}", b"no tab", timeout=300)
        seen["versions"] = caught.value.code, caught.value.read().decode()
        seen["evil"], _ = status(started[1], f"GET / HTTP/1.1\n{EVIL}\n")
        return started

    monkeypatch.setattr(http_server, "start_server", start_and_ask)
    page = make_page(Session(), ModelChoice("nowhere"), watch := Watch())
    launch(page, watch)
    page.close(verbose=False)
    assert "window.exlSay" in seen["page"]
    assert seen["versions"][0] == 400 and "tab: expected" in seen["versions"][1]
    assert seen["evil"] == 403


PREFLIGHT = "Access-Control-Request-Method: POST\n"
EVIL = "Host: evil.example.com\nOrigin: http://evil.example.com\n"


@pytest.mark.parametrize(("line", "lines"), [
    ("GET / HTTP/1.1", "Host: evil.example.com\n"),
    ("GET /config HTTP/1.1", EVIL),
    ("GET /gradio_api/heartbeat/x HTTP/1.1", EVIL),
    ("GET /gradio_api/queue/data?session_hash=x HTTP/1.1", EVIL),
    ("GET /no/such/route HTTP/1.1", EVIL),
    ("POST /gradio_api/queue/join HTTP/1.1", EVIL + "Content-Length: 2\n"),
    ("OPTIONS /gradio_api/queue/join HTTP/1.1", EVIL + PREFLIGHT),
    ("OPTIONS /config HTTP/1.1", "Host: HOST\nOrigin: null\n" + PREFLIGHT),
    ("POST /gradio_api/upload HTTP/1.1", "Host: HOST\nContent-Length: 2\n"),
    ("POST /gradio_api/upload HTTP/1.1", "Host: HOST\nOrigin: http://evil.example.com\n"),
    ("GET / HTTP/1.0", ""), ("GET / HTTP/1.1", "Host: HOST\nHost: evil.example.com\n"),
    ("GET http://evil.example.com/ HTTP/1.1", "Host: evil.example.com\n"),
    ("GET /ws HTTP/1.1", EVIL + "Connection: Upgrade\nUpgrade: websocket\n"
     "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n"),
])
def test_the_served_page_refuses_requests_from_elsewhere(port, line, lines):
    code, answer = status(port, f"{line}\n{lines}\n".replace("HOST", f"127.0.0.1:{port}"))
    assert code in (400, 403)
    assert "access-control-allow-origin" not in answer


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "box.example.org"])
def test_the_served_page_answers_this_machine(port, host):
    host = host.replace("PORT", str(port))
    code, _ = status(port, f"GET /config HTTP/1.1\nHost: {host}\nOrigin: http://{host}\n\n")
    assert code == 200


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_ends_the_page_that_a_script_started(port):
    process = subprocess.Popen(
        [sys.executable, "-m", "extension.page.server", "--no-browser"], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "EXL_LOADER_REFERENCE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        assert "127.0.0.1" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.communicate()
