"""Refuse requests to the standalone page that do not come from the page itself.

Any other site that is open in the same browser can send requests to this machine. The rules are
those of Jupyter's server. `Host` must be a name or an address of this machine, because another
site can point its own domain here (DNS rebinding). `Origin`, which browsers add to requests of
scripts, must be this page. Uploads are refused, because the page has none.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

# A chat of a million tokens is 4 MB of text, and a request contains it twice.
MAX_BODY_BYTES = 32 << 20

_DEFAULT_PORTS = {"http": 80, "https": 443}
# A host and a port as in a `Host` header (RFC 3986, 3.2.2), without user or path.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z_.-]+)(?::([0-9]{1,5}))?", re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """A request that is refused: a status code and the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class AllowedHosts:
    """The host names that requests may use: this machine's own and further ones.

    Args:
        names: further host names or addresses, without ports.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = {normal_name(name) for name in names}

    def add(self, name: str) -> None:
        """Allow another name."""
        self._names.add(normal_name(name))

    def is_added(self, name: str) -> bool:
        """Return whether a normalised name is one of the further ones."""
        return name in self._names

    def allows(self, name: str) -> bool:
        """Return whether a normalised name is this machine's own or one of the further ones."""
        return name == "localhost" or _is_loopback(name) or self.is_added(name)


def normal_name(name: str) -> str:
    """Normalise a host name or address: lower case, no brackets, no trailing dot."""
    name = name.strip().lower()
    if name.startswith("["):
        return name[1:-1]
    return name.removesuffix(".")


def host_name(text: str) -> str:
    """Read an option that names a host.

    Raises:
        ValueError: it is not a host name or address.
    """
    bracketed = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
    found = _HOST.fullmatch(bracketed.lower())
    if found is None or found[2] is not None:
        raise ValueError(f"expected a host name or address without a port, found {text!r}")
    return normal_name(found[1])


def _is_loopback(name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def check_request(headers: Iterable[tuple[bytes, bytes]], allowed: AllowedHosts) -> None:
    """Check where a request comes from.

    Args:
        headers: names in lower case, and values.
        allowed: names that count as this machine.

    Raises:
        Refusal: it comes from another site, or its headers do not name its target.
    """
    found: dict[str, list[str]] = {}
    for key, value in headers:
        found.setdefault(key.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts, origins = found.get("host", []), found.get("origin", [])
    if len(hosts) != 1 or len(origins) > 1:
        raise Refusal(400, "expected one Host header and one Origin header at most")
    match = _HOST.fullmatch(hosts[0].strip().lower())
    if match is None or int(match[2] or 0) > 65535:
        raise Refusal(400, f"the Host header {hosts[0][:80]!r} is not a valid host")
    name = normal_name(match[1])
    if not allowed.allows(name):
        raise Refusal(403, f"this page is not served under {hosts[0][:80]!r}; "
                      "--allow-host adds another name")
    port = int(match[2]) if match[2] else None
    if origins and not _is_same_origin(origins[0], name, port, allowed):
        raise Refusal(403, f"requests from {origins[0][:80]!r} are refused")
    # Browsers mark requests of other sites' pages so. Following a link to this page is allowed.
    if found.get("sec-fetch-site") == ["cross-site"] and found.get("sec-fetch-mode") != [
        "navigate"
    ] and not origins:
        raise Refusal(403, "requests from another site's page are refused")


def _is_same_origin(origin: str, name: str, port: int | None, allowed: AllowedHosts) -> bool:
    """Return whether an origin is the page of the `Host` header, or one of the further names."""
    try:
        parts = urlsplit(origin.strip().lower())
        origin_port, host = parts.port, parts.hostname
    except ValueError:
        return False
    if parts.scheme not in _DEFAULT_PORTS or not host or parts.username or parts.path:
        return False
    origin_name = normal_name(host)
    # A proxy may use another name for this page than the browser does.
    if allowed.is_added(origin_name):
        return True
    default = _DEFAULT_PORTS[parts.scheme]
    return origin_name == name and (origin_port or default) == (port or default)


def check_body(path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check a request's body, as far as its headers describe it.

    Raises:
        Refusal: it is an upload, or too long.
    """
    values = {name.lower(): value.lower().strip() for name, value in headers}
    is_form = values.get(b"content-type", b"").startswith(b"multipart/")
    if is_form or "upload" in path.lower().split("/"):
        raise Refusal(403, "this page accepts no uploads")
    length = values.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 18 or int(length) > MAX_BODY_BYTES:
        raise Refusal(413, f"expected a request of at most {MAX_BODY_BYTES} bytes")


class Guard:
    """ASGI middleware that passes on the page's own requests only.

    Args:
        app: the application that answers them.
        allowed: names that count as this machine.
    """

    def __init__(self, app: App, allowed: AllowedHosts) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            check_request(scope["headers"], self._allowed)
            if scope["type"] != "http":
                raise Refusal(403, "this page has no WebSockets")
            check_body(scope["path"], scope["headers"])
        except Refusal as refusal:
            await _refuse(scope["type"], refusal, send)
            return
        received_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            # A request that is sent in chunks does not give its length beforehand.
            return message if received_bytes <= MAX_BODY_BYTES else {"type": "http.disconnect"}

        await self._app(scope, bounded_receive, send)


async def _refuse(kind: str, refusal: Refusal, send: Send) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)})
        return
    body = json.dumps({"detail": str(refusal)}).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
