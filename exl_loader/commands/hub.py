"""Model repositories of the Hugging Face Hub: which files they have, and the bytes of these.

Requests are made by huggingface_hub's session, so that its login, its proxies and `HF_ENDPOINT`
hold. Transfers are our own, because `hf_hub_download` (2.4) begins an interrupted file anew.
What the server answers is untrusted: every value is type-checked.
Source of the protocol: https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ..utils.byte_counts import MIB
from ..utils.errors import DownloadError, InvalidSettings, ModelNotFound, shown

LIBRARY = "huggingface_hub"
LEAST_VERSION = "1.0"

DEFAULT_REVISION = "main"
REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")

# Seconds without an answer after which a connection counts as cut.
TIMEOUT_S = 30.0
# Cuts in a row without a new byte before a transfer is given up, and the seconds between them.
MAX_TRIES = 5
WAIT_S = 1.0
PIECE_BYTES = MIB
MAX_ANSWER_BYTES = 64 * MIB
BRANCHES_SHOWN = 12


def parse_repo(text: str) -> tuple[str, str | None]:
    """Read `OWNER/NAME`, `OWNER/NAME:REVISION`, or the address of a repository's page.

    Returns:
        The repository, and the revision or None.

    Raises:
        InvalidSettings: it is none of these.
    """
    name, revision = text.strip(), None
    if "://" in name:
        parts = [unquote(part) for part in urlsplit(name).path.split("/") if part]
        name = "/".join(parts[:2])
        if len(parts) > 3 and parts[2] == "tree":
            revision = "/".join(parts[3:])
    elif ":" in name:
        name, _, revision = name.partition(":")
    if not REPO_ID.fullmatch(name) or revision == "":
        raise InvalidSettings(
            "REPO", expected="a repository such as OWNER/NAME or OWNER/NAME:REVISION",
            actual=shown(text),
        )
    return name, revision


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        name: its path in the repository, with slashes.
        size: bytes.
        oid: SHA-256 of a file in large file storage, else git's SHA-1 of the blob; hexadecimal.
    """

    name: str
    size: int
    oid: str

    def hash(self) -> Any:
        """Return a new hash whose digest of the file's bytes is `oid`."""
        if SHA256.fullmatch(self.oid):
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


@dataclass(frozen=True)
class HubRepo:
    """One commit of a repository.

    Args:
        repo_id: `OWNER/NAME`.
        revision: the branch, tag or commit that was asked for.
        commit: what it is at.
        files: all files.
    """

    repo_id: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]


class Hub:
    """The hub, or a server that speaks its protocol.

    Args:
        endpoint: address of the server; None for `HF_ENDPOINT` or huggingface.co.
        sleep: waits so many seconds.

    Raises:
        InvalidSettings: huggingface_hub is missing or too old.
        DownloadError: it is told to stay offline.
    """

    def __init__(
        self, endpoint: str | None = None, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        try:
            from huggingface_hub import constants
            from huggingface_hub.errors import HfHubHTTPError
            from huggingface_hub.utils import build_hf_headers, get_session
        except ImportError as error:
            raise _missing_library("none that can be imported") from error
        if constants.HF_HUB_OFFLINE:
            raise DownloadError(
                "download", expected="that huggingface_hub may use the network",
                actual="HF_HUB_OFFLINE is set", remedy="Unset it",
            )
        self._session = get_session()
        if not hasattr(self._session, "stream"):
            raise _missing_library("an older version")
        self._headers: Mapping[str, str] = build_hf_headers()
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._sleep = sleep
        # All errors of the session's HTTP library, whichever that is, and of the system's sockets.
        http_error: type[Exception] = HfHubHTTPError.__bases__[0]
        self._cuts = (http_error, OSError)

    def repo(self, repo_id: str, revision: str | None = None) -> HubRepo:
        """Look a repository up.

        Raises:
            ModelNotFound: it does not exist or is private, or has no such revision. The
                branches are listed.
            DownloadError: the server cannot be reached, or answers something else.
        """
        revision = revision or DEFAULT_REVISION
        url = f"{self.endpoint}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
        answer = self._json(url, repo_id, revision)
        commit, siblings = answer.get("sha"), answer.get("siblings")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise self._strange(url, "a commit", commit)
        if not isinstance(siblings, list):
            raise self._strange(url, "a list of files", siblings)
        return HubRepo(repo_id, revision, commit, tuple(self._file(url, one) for one in siblings))

    def branches(self, repo_id: str) -> list[str]:
        """Return the names of a repository's branches."""
        url = f"{self.endpoint}/api/models/{repo_id}/refs"
        found = self._json(url, repo_id, None).get("branches")
        names = [one.get("name") if isinstance(one, dict) else None for one in found or ()]
        return [name for name in names if isinstance(name, str)]

    def branches_hint(self, repo_id: str) -> str:
        """Return the branches in words, for an error; empty if they cannot be listed."""
        try:
            names = sorted(self.branches(repo_id))
        except (DownloadError, ModelNotFound):
            return ""
        more = f" and {len(names) - BRANCHES_SHOWN} more" if len(names) > BRANCHES_SHOWN else ""
        return ", ".join(names[:BRANCHES_SHOWN]) + more

    def read_start(self, repo: HubRepo, file: HubFile, count: int) -> bytes:
        """Return the first `count` bytes of a file, or all where it has fewer."""
        data = bytearray()
        for offset, piece in self.pieces(repo, file, 0, end=min(count, file.size)):
            del data[offset:]
            data += piece
            if len(data) >= count:
                break
        return bytes(data[:count])

    def pieces(
        self, repo: HubRepo, file: HubFile, first: int, end: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Read a file from a byte on. A connection that is cut is opened again.

        Args:
            first: offset of the first byte.
            end: offset behind the last; None for the file's size. More may be sent.

        Yields:
            Offset and bytes of each piece. The offsets continue each other, but go back to 0
            where the server sends the file from its beginning.

        Raises:
            DownloadError: the server refuses the file, is cut off too often, or sends more
                than the file's size.
        """
        url = f"{self.endpoint}/{repo.repo_id}/resolve/{repo.commit}/{quote(file.name)}"
        position, last, tries = first, file.size if end is None else end, 0
        while position < last:
            try:
                with self._get(url, repo.repo_id, repo.revision, position, last) as response:
                    if response.status_code != 206:
                        position = 0
                    for piece in response.iter_bytes(PIECE_BYTES):
                        if position + len(piece) > file.size:
                            raise DownloadError(
                                file.name, expected=f"{file.size} bytes", actual="more",
                                remedy="Try again later",
                            )
                        yield position, piece
                        position, tries = position + len(piece), 0
                        if position >= last:
                            return
                if position < last:
                    raise ConnectionError("the connection ended early")
            except self._cuts as error:
                tries += 1
                if tries >= MAX_TRIES:
                    raise self._unreachable(f"{file.name} at byte {position}", error) from None
                self._sleep(WAIT_S * tries)

    def _json(self, url: str, repo_id: str, revision: str | None) -> dict[str, Any]:
        """Ask the API, up to `MAX_TRIES` times."""
        for attempt in range(1, MAX_TRIES + 1):
            try:
                with self._get(url, repo_id, revision) as response:
                    data = bytearray()
                    for piece in response.iter_bytes(PIECE_BYTES):
                        data += piece
                        if len(data) > MAX_ANSWER_BYTES:
                            raise self._strange(url, f"at most {MAX_ANSWER_BYTES} bytes", "more")
                break
            except self._cuts as error:
                if attempt == MAX_TRIES:
                    raise self._unreachable(url, error) from None
                self._sleep(WAIT_S * attempt)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._strange(url, "a JSON object", bytes(data[:40]))
        return answer

    @contextmanager
    def _get(
        self, url: str, repo_id: str, revision: str | None, first: int = 0, end: int = 0
    ) -> Iterator[Any]:
        """Open a request, for the bytes from `first` to `end` if given.

        Raises:
            ModelNotFound, DownloadError: the server refuses.
            OSError: it asks to try again.
        """
        # Compressed answers would have other offsets.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if end:
            headers["Range"] = f"bytes={first}-{end - 1}"
        with self._session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
            status = response.status_code
            if status in (200, 206):
                if status == 206 and not _starts_at(response, first):
                    raise self._strange(url, f"bytes from {first} on",
                                        response.headers.get("Content-Range"))
                yield response
                return
            if status in (408, 429) or status >= 500:
                raise OSError(f"the server answers with status {status}")
            raise self._refused(repo_id, revision, status, response.headers)

    def _refused(
        self, repo_id: str, revision: str | None, status: int, headers: Mapping[str, str]
    ) -> ModelNotFound | DownloadError:
        """Return the error for a status, in words."""
        code, page = headers.get("X-Error-Code"), f"{self.endpoint}/{repo_id}"
        has_token = any(name.lower() == "authorization" for name in self._headers)
        login = "Log in with `hf auth login`, or set HF_TOKEN"
        if code == "RevisionNotFound":
            branches = self.branches_hint(repo_id)
            return ModelNotFound(
                f"{repo_id}: revision {shown(revision)}",
                expected=f"one of its branches: {branches}" if branches else "a branch or commit",
                actual="none of this name",
            )
        if code == "GatedRepo":
            return DownloadError(
                repo_id, expected="a model that you may download",
                actual=f"a gated one (status {status})",
                remedy=f"Accept its terms on {page}"
                + ("" if has_token and status != 401 else f". {login}"),
            )
        if status == 403:
            return DownloadError(
                repo_id, actual="the server forbids it (status 403)",
                remedy="Check what your token may read, on the hub's settings page",
            )
        if status == 404 and code == "EntryNotFound":
            return DownloadError(
                repo_id, actual="the server has lost a file of it (status 404)",
                remedy="Download it again",
            )
        if status in (401, 404):
            remedy = f"Check the name on {page}"
            if not has_token:
                remedy += f". If it is private: {login}"
            elif status == 401:
                remedy += ". The token of your login may be wrong or outdated: `hf auth login`"
            return ModelNotFound(
                repo_id, expected="a repository that you may see",
                actual=f"none (status {status})", remedy=remedy,
            )
        return DownloadError(repo_id, actual=f"the server answers with status {status}",
                             remedy=f"Look at {page}")

    def _unreachable(self, what: str, error: Exception) -> DownloadError:
        text = str(error) or type(error).__name__
        return DownloadError(
            what, expected=f"an answer of {self.endpoint}",
            actual=f"{text.splitlines()[0]} ({MAX_TRIES} times)",
            remedy="Check the network and try again: the download goes on where it was",
        )

    def _strange(self, url: str, expected: str, actual: object) -> DownloadError:
        return DownloadError(
            url, expected=expected, actual=shown(actual),
            remedy=f"Check that {self.endpoint} is the hub (environment variable HF_ENDPOINT)",
        )

    def _file(self, url: str, value: Any) -> HubFile:
        """Read an entry of a repository's list of files."""
        value = value if isinstance(value, dict) else {}
        lfs = value.get("lfs")
        name, size = value.get("rfilename"), value.get("size")
        oid = lfs.get("sha256") if isinstance(lfs, dict) else value.get("blobId")
        if not isinstance(name, str) or not _is_relative(name):
            raise self._strange(url, "the path of a file in the repository", name)
        if type(size) is not int or size < 0:
            raise self._strange(url, f"the size of {shown(name)}", size)
        if not isinstance(oid, str) or not (COMMIT.fullmatch(oid) or SHA256.fullmatch(oid)):
            raise self._strange(url, f"the hash of {shown(name)}", oid)
        return HubFile(name, size, oid)


def _is_relative(name: str) -> bool:
    """Return whether a path stays in its folder on every system."""
    parts = name.split("/")
    return bool(name) and name.isprintable() and not any(
        part in ("", ".", "..") or "\\" in part or ":" in part for part in parts
    )


def _starts_at(response: Any, first: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == first


def _missing_library(actual: str) -> InvalidSettings:
    return InvalidSettings(
        "download", expected=f"the package {LIBRARY}, {LEAST_VERSION} or newer", actual=actual,
        remedy=f"Install it: python -m pip install '{LIBRARY}>={LEAST_VERSION}'",
    )
