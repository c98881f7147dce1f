"""What the page does when requests fail: it asks again, and opens again.

Requests fail with a server that runs: browsers end all of them when the machine's network changes,
even those to the machine itself, as when a VPN, a container or another Wi-Fi connects. Gradio
gives up after one failed request, and a page that lacks one of its files stays empty. So a script
at the head of the page

* reloads a page that has not got one of its files,
* repeats each request of an event until it is answered. All tries have the same name, by which the
  server knows what it has done already (`Repeats`),
* says so where the page does not open.
"""

from __future__ import annotations

import asyncio
import json
import time

from .guard import App, Message, Receive, Send

# The header with the name of a request.
HEADER = "x-exl-loader-request"

# Pauses before the second try and before the last one; each is twice as long as the one before.
FIRST_PAUSE_MS, LAST_PAUSE_MS = 100, 6400

# Answers stay for this time, which is longer than all tries of a request, and only so many bytes.
KEPT_S, KEPT_BYTES = 60.0, 64 << 20

# A page without a conversation after this time says so.
UNOPENED_MS = 60_000
# A page that has been reloaded so often within this time is not reloaded again.
MOST_RELOADS, RELOADS_MS = 5, 60_000

# In the tab's `sessionStorage`: when the first of its reloads was, and how many there were.
RELOADS = "exl_loader_reloads"

UNOPENED = "This page has not opened. Reload it; its conversations are kept."

GONE_STYLE = """\
#exl_gone { position: fixed; inset: auto 0 0 0; margin: 0; padding: 0.7em 1em; z-index: 1000;
  background: #4f46e5; color: white; text-align: center; font-family: system-ui, sans-serif; }"""


class Repeats:
    """ASGI middleware that answers a request that has a name once, and its repeats the same.

    Args:
        app: the application that answers them.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        # Name -> the messages of the answer; None if it did not come to its end.
        self._answers: dict[bytes, asyncio.Future[list[Message] | None]] = {}
        # Name -> when it was answered, and the bytes of the answer; the oldest come first.
        self._answered: dict[bytes, tuple[float, int]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        name = dict(scope.get("headers", ())).get(HEADER.encode())
        if scope["type"] != "http" or name is None:
            await self._app(scope, receive, send)
            return
        while (earlier := self._answers.get(name)) is not None:
            messages = await asyncio.shield(earlier)
            if messages is not None:
                while (await receive()).get("more_body"):
                    pass
                for message in messages:
                    await send(message)
                return
        await self._answer(name, scope, receive, send)

    async def _answer(self, name: bytes, scope: Message, receive: Receive, send: Send) -> None:
        answer = asyncio.get_running_loop().create_future()
        self._answers[name] = answer
        messages: list[Message] = []

        async def keeping_send(message: Message) -> None:
            # First, because the browser may be gone.
            messages.append(message)
            await send(message)

        try:
            await self._app(scope, receive, keeping_send)
        finally:
            last = messages[-1] if messages else {}
            is_whole = last.get("type") == "http.response.body" and not last.get("more_body")
            if is_whole:
                nbytes = sum(len(message.get("body", b"")) for message in messages)
                self._answered[name] = time.monotonic(), nbytes
                self._forget()
            else:
                # The request was cut before it was here.
                del self._answers[name]
            answer.set_result(messages if is_whole else None)

    def _forget(self) -> None:
        """Forget the oldest answers."""
        total = sum(nbytes for _, nbytes in self._answered.values())
        for name, (answered_s, nbytes) in list(self._answered.items()):
            if total <= KEPT_BYTES and time.monotonic() - answered_s <= KEPT_S:
                break
            total -= nbytes
            del self._answered[name], self._answers[name]


class HeadScript:
    """ASGI middleware that adds HTML to the head of the page `/`.

    Gradio's own `head` is added by Gradio's script, which may be what is lacking. It must be
    inside of what compresses answers.

    Args:
        app: the application that answers.
        html: what is added.
    """

    def __init__(self, app: App, html: str) -> None:
        self._app = app
        self._html = html.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("GET", "/"):
            await self._app(scope, receive, send)
            return
        start: Message = {}
        body = b""

        async def adding_send(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = body.replace(b"<head>", b"<head>" + self._html, 1)
            headers = [(key, value) for key, value in start["headers"] if key != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, adding_send)


def head_html(tab_id: str, ask_path: str) -> str:
    """Return the script, and the style of what it says.

    `window.exlSay(text)` shows a line at the lower end of the page, and removes it for "".

    Args:
        tab_id: of the hidden field with the tab's name, which an open page has.
        ask_path: where a POST is answered, whatever it has, if the server runs.
    """
    return f"<style>{GONE_STYLE}</style><script>{head_script(tab_id, ask_path)}</script>"


def head_script(tab_id: str, ask_path: str) -> str:
    """Return the JavaScript of `head_html`."""
    tab = json.dumps(f"#{tab_id} textarea, #{tab_id} input")
    return f"""(() => {{
  const send = window.fetch.bind(window), pause = ms => new Promise(done => setTimeout(done, ms));
  const isOpen = () => !!document.querySelector({tab})?.value;
  let line = null, isReloading = false;
  window.exlSay = text => {{
    if (!text) {{ line?.remove(); line = null; return; }}
    line ??= document.body.appendChild(Object.assign(
      document.createElement("p"), {{id: "exl_gone", role: "alert"}}));
    line.textContent = text;
  }};
  // Without a count it might be reloaded for ever.
  const countReloads = () => {{
    try {{
      let [since, count] = JSON.parse(sessionStorage.getItem("{RELOADS}")) ?? [0, 0];
      if (Date.now() - since > {RELOADS_MS}) [since, count] = [Date.now(), 0];
      sessionStorage.setItem("{RELOADS}", JSON.stringify([since, ++count]));
      return count;
    }} catch {{ return Infinity; }}
  }};
  const reload = async () => {{
    if (isReloading) return;
    isReloading = true;
    const count = countReloads();
    if (count > {MOST_RELOADS}) return window.exlSay({json.dumps(UNOPENED)});
    for (let ms = {FIRST_PAUSE_MS} * 2 ** count; ; ms = Math.min(2 * ms, {LAST_PAUSE_MS})) {{
      await pause(ms);
      try {{
        await send({json.dumps(ask_path)}, {{method: "POST", body: "", cache: "no-store"}});
        return location.reload();
      }} catch {{ /* once more */ }}
    }}
  }};
  addEventListener("error", ({{target}}) => {{
    const isFile = target instanceof HTMLLinkElement || target instanceof HTMLScriptElement;
    if (isFile && !isOpen()) reload();
  }}, true);
  // What `import` has not got, here and in browsers' words.
  addEventListener("vite:preloadError", reload);
  addEventListener("unhandledrejection", ({{reason}}) => {{
    if (/dynamically imported module|module script failed/i.test(reason?.message)) reload();
  }});
  setTimeout(() => isOpen() || window.exlSay({json.dumps(UNOPENED)}), {UNOPENED_MS});

  window.fetch = async (input, init) => {{
    const {{origin, pathname}} = new URL(input?.url ?? input, document.baseURI);
    const isEvent = origin === location.origin && pathname.includes("/run/");
    if (!isEvent || init?.method !== "POST") return send(input, init);
    const headers = new Headers(init.headers), bytes = crypto.getRandomValues(new Uint8Array(16));
    headers.set("{HEADER}", [...bytes].map(byte => byte.toString(16).padStart(2, "0")).join(""));
    for (let ms = {FIRST_PAUSE_MS}; ; ms *= 2) {{
      try {{
        const answer = await send(input, {{...init, headers}}), {{status, statusText}} = answer;
        // The connection may also end in the middle of an answer.
        return new Response(
          await answer.arrayBuffer(), {{status, statusText, headers: answer.headers}});
      }} catch (error) {{
        if (ms > {LAST_PAUSE_MS}) throw error;
        await pause(ms);
      }}
    }}
  }};
}})();"""
