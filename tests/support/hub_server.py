"""A small server that speaks the protocol of the Hugging Face Hub, from folders on the disk.

It knows what `exl_loader download` and huggingface_hub's simple requests use: a model's info with
its files' sizes and hashes, its branches, and its files with ranges, entity tags and redirects.
Faults are scripted: `HubServer.faults` has a function for each path.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Files that the hub keeps in large file storage, and serves from another address.
LARGE = (".safetensors", ".gguf", ".bin", ".model")


@dataclass
class Answer:
    """What the server is about to send; a fault changes it.

    Args:
        status, headers, body: of the answer.
        cut_after: bytes of the body after which the connection is closed; None for all.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None


Fault = Callable[[Answer], None]


@dataclass
class Repository:
    """A model repository.

    Args:
        branches: name -> folder with its files.
        token: what a request has to bring; None for a public one.
        gated: whether its terms have not been accepted.
    """

    branches: dict[str, Path]
    token: str | None = None
    gated: bool = False


@dataclass
class HubServer:
    """The server; its repositories may be changed while it runs.

    Attributes:
        endpoint: its address.
        requests: (method, path, range header or None) of each request so far.
        faults: a path's end -> functions that change the next answers for it, each once.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: dict[str, list[Fault]] = field(default_factory=dict)

    def fault(self, path_end: str, *faults: Fault) -> None:
        """Let the next answers for a path be changed."""
        self.faults.setdefault(path_end, []).extend(faults)

    def ranges(self, name: str) -> list[str | None]:
        """Return the ranges that were asked for of a file, in order; without redirects."""
        return [found for _, path, found in self.requests
                if path.startswith("/cdn/") and path.endswith("/" + name)]

    def commit(self, repo_id: str, branch: str) -> str:
        """Return the commit that a branch is at: a hash of its files."""
        digest = hashlib.sha1(f"{repo_id}:{branch}".encode())
        folder = self.repositories[repo_id].branches[branch]
        for name in files_of(folder):
            digest.update(name.encode() + (folder / name).read_bytes())
        return digest.hexdigest()

    def answer(self, method: str, path: str, headers) -> Answer:
        """Answer a request, with the faults that were scripted for its path."""
        self.requests.append((method, path, headers.get("Range")))
        answer = self._answer(path, headers)
        for end, faults in self.faults.items():
            if path.endswith(end) and faults:
                faults.pop(0)(answer)
        return answer

    def _answer(self, path: str, headers) -> Answer:
        path = unquote(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            return self._refs(match[1], headers)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main", headers)
        if match := re.fullmatch(r"/(cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups(), headers)
        return refusal(404, "")

    def _repository(self, repo_id: str, headers) -> Repository | Answer:
        found = self.repositories.get(repo_id)
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if found is None or found.token not in (None, token):
            return refusal(404 if token else 401, "RepoNotFound")
        return found

    def _refs(self, repo_id: str, headers) -> Answer:
        found = self._repository(repo_id, headers)
        if isinstance(found, Answer):
            return found
        return as_json({"tags": [], "converts": [], "branches": [
            {"name": name, "ref": f"refs/heads/{name}",
             "targetCommit": self.commit(repo_id, name)} for name in found.branches
        ]})

    def _branch(self, repo_id: str, found: Repository, revision: str) -> str | None:
        """Return the branch that a revision is, or is the commit of."""
        for name in found.branches:
            if revision in (name, self.commit(repo_id, name)):
                return name
        return None

    def _info(self, repo_id: str, revision: str, headers) -> Answer:
        found = self._repository(repo_id, headers)
        if isinstance(found, Answer):
            return found
        branch = self._branch(repo_id, found, revision)
        if branch is None:
            return refusal(404, "RevisionNotFound")
        folder = found.branches[branch]
        return as_json({
            "id": repo_id, "modelId": repo_id, "sha": self.commit(repo_id, branch),
            "private": found.token is not None, "gated": "manual" if found.gated else False,
            "siblings": [sibling(folder, name) for name in files_of(folder)],
        })

    def _file(self, cdn: str | None, repo_id: str, revision: str, name: str, headers) -> Answer:
        found = self.repositories[repo_id] if cdn else self._repository(repo_id, headers)
        if isinstance(found, Answer):
            return found
        if found.gated and not cdn:
            return refusal(403 if "Authorization" in headers else 401, "GatedRepo")
        branch = self._branch(repo_id, found, revision)
        if branch is None:
            return refusal(404, "RevisionNotFound")
        folder = found.branches[branch]
        if not (folder / name).is_file():
            return refusal(404, "EntryNotFound")
        data = (folder / name).read_bytes()
        tag = {"ETag": f'"{oid(folder, name)}"', "X-Repo-Commit": revision,
               "Accept-Ranges": "bytes"}
        if name.endswith(LARGE) and not cdn:
            tag |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": tag["ETag"]}
            return Answer(302, tag | {"Location": f"/cdn/{repo_id}/resolve/{revision}/{name}"}, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        if wanted is None:
            return Answer(200, tag, data)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return refusal(416, "")
        tag["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return Answer(206, tag, data[first : last + 1])


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def oid(folder: Path, name: str) -> str:
    """Return a file's hash as the hub names it."""
    data = (folder / name).read_bytes()
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(folder: Path, name: str) -> dict:
    size, found = (folder / name).stat().st_size, oid(folder, name)
    if not name.endswith(LARGE):
        return {"rfilename": name, "size": size, "blobId": found}
    return {"rfilename": name, "size": size, "blobId": "0" * 40,
            "lfs": {"sha256": found, "size": size, "pointerSize": 134}}


def as_json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def refusal(status: int, code: str) -> Answer:
    headers = {"X-Error-Code": code} if code else {}
    return Answer(status, headers, json.dumps({"error": code}).encode())


# Faults


def cut(after: int) -> Fault:
    """Close the connection after so many bytes of the body."""
    def change(answer: Answer) -> None:
        answer.cut_after = after
    return change


def status(number: int, code: str = "") -> Fault:
    """Refuse."""
    def change(answer: Answer) -> None:
        refused = refusal(number, code)
        answer.status, answer.headers, answer.body = number, refused.headers, refused.body
    return change


def damage(answer: Answer) -> None:
    """Change a byte in the middle."""
    middle = len(answer.body) // 2
    wrong = bytes([answer.body[middle] ^ 1])
    answer.body = answer.body[:middle] + wrong + answer.body[middle + 1 :]


def body(data: bytes) -> Fault:
    """Send something else."""
    def change(answer: Answer) -> None:
        answer.body = data
    return change


@contextmanager
def hub_server(**repositories: Repository) -> Iterator[HubServer]:
    """Serve repositories on a free port of this machine."""
    hub = HubServer(dict(repositories))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = hub.answer(self.command, urlsplit(self.path).path, self.headers)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if answer.cut_after is None:
                self.wfile.write(answer.body)
                return
            self.wfile.write(answer.body[: answer.cut_after])
            self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            return

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                pass  # the reader has enough

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
