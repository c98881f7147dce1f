"""Download a model of the hub into a folder, after its plan, and go on where it stopped.

The plan comes first, and is the engine's own: the small files and the headers of the weights go
into a temporary folder, in which each weight file is as long as the real one but has no data on
the disk. The plan also says which weight files the engine reads; others are not downloaded.

A folder is unfinished as long as it has the file `weight_files.UNFINISHED_NAME`, by which the
engine refuses it. The file records what is complete:

    {"repo": ..., "revision": ..., "commit": ..., "done": {file: its hash}}

Each other file grows as `NAME.HASH.part`, and gets its name when its hash is right.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES
from ..checkpoint.weight_files import UNFINISHED_NAME, refuse_other_formats
from ..memory.reservation import LoadOptions, planned
from ..utils.byte_counts import MIB, amount
from ..utils.errors import DownloadError, InvalidSettings, ModelNotFound, shown_name
from ..utils.json_keys import read_json_object_if_there
from ..utils.progress import Progress, checked_progress, task
from .hub import DEFAULT_REVISION, Hub, HubFile, HubRepo

if TYPE_CHECKING:
    from ..memory.reservation import Reservation

# The files besides the weights: config, tokenizer, templates, licence. Patterns of whole paths.
SMALL_FILES = (
    "*.json", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt", "README.md",
    "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja",
)  # fmt: skip
# Of these, files of other programs: indexes of pickle files, a converter's measurement.
OMITTED = ("*.bin.index.json", "measurement.json", "trainer_state.json")
MAX_SMALL_BYTES = 256 * MIB

# The first request for a header. Most headers are shorter.
HEADER_BYTES = 256 << 10
# Requests for headers at once.
HEADER_THREADS = 8
HASHED_BYTES = 4 * MIB


def folder_name(repo_id: str, revision: str) -> str:
    """Return the name that text-generation-webui gives a model's folder."""
    name = repo_id.replace("/", "_")
    return name if revision == DEFAULT_REVISION else f"{name}_{revision.replace('/', '_')}"


@dataclass(frozen=True)
class ModelDownload:
    """A model that has been planned and can be downloaded; see `prepared`.

    Args:
        repo: its repository.
        target: the folder.
        reservation: the memory that it will take, for the target folder.
        files: the files that it needs, the small ones first.
        staged: a folder that has the small files.
        hub: the server.
    """

    repo: HubRepo
    target: Path
    reservation: Reservation
    files: tuple[HubFile, ...]
    staged: Path
    hub: Hub

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def missing_bytes(self) -> int:
        """Return the bytes that are not in the target folder yet. Parts of files count."""
        done = _Record.read(self.target).done
        return sum(file.size - self._present_bytes(file, done) for file in self.files)

    def free_bytes(self) -> int:
        """Return the bytes that are free on the target's disk."""
        folder = self.target.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_disk(self) -> None:
        """Refuse a disk that the missing bytes do not fit on.

        Raises:
            DownloadError: they do not.
        """
        missing, free = self.missing_bytes(), self.free_bytes()
        if missing > free:
            raise DownloadError(
                f"{self.target}: the disk is too small",
                expected=f"{amount(missing)} free, for what is missing of "
                f"{amount(self.total_bytes)}",
                actual=f"{amount(free)} free",
                remedy="Free some space, or choose a folder on another disk",
            )

    def fetch(
        self, progress: Progress | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Download what is missing. What was downloaded stays after an error or an interrupt.

        Args:
            progress: gets the bytes, of the task `downloading`.
            stopped: asked after each piece of a file; True ends the download there.

        Returns:
            False if it was stopped before its end.

        Raises:
            DownloadError: the disk is too small, the server cannot be reached or sends wrong
                bytes, or another process downloads into this folder.
        """
        self.check_disk()
        if not self.missing_bytes() and not (self.target / UNFINISHED_NAME).exists():
            return True
        self.target.mkdir(parents=True, exist_ok=True)
        with (
            _locked(self.target),
            task(checked_progress(progress), "downloading", self.missing_bytes(), "bytes")
            as advance,
        ):
            record = _Record.read(self.target).at(self.repo)
            for name in record.done.keys() - {file.name for file in self.files}:
                # Of an earlier commit.
                (self.target / name).unlink(missing_ok=True)
                del record.done[name]
            record.write(self.target)
            for file in self.files:
                if not _is_done(self.target, file, record.done):
                    if not self._fetch_file(file, advance, stopped):
                        return False
                    record.done[file.name] = file.oid
                    record.write(self.target)
            for part in self.target.glob("*.part"):
                part.unlink()
            (self.target / UNFINISHED_NAME).unlink()
        return True

    def _present_bytes(self, file: HubFile, done: dict[str, str]) -> int:
        if _is_done(self.target, file, done):
            return file.size
        part = _part(self.target, file)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def _fetch_file(
        self, file: HubFile, advance: Callable[[int], None], stopped: Callable[[], bool]
    ) -> bool:
        path = self.target / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.staged / file.name
        if _is_small(file):
            shutil.copyfile(staged, path)
            advance(file.size)
            return True
        return transfer(
            self.hub, self.repo, file, _part(self.target, file), path, advance, stopped)


@contextmanager
def prepared(
    repo_id: str,
    revision: str | None = None,
    *,
    target: Path | None = None,
    models_dir: Path = Path("."),
    options: LoadOptions | None = None,
    hub: Hub | None = None,
    progress: Progress | None = None,
) -> Iterator[ModelDownload]:
    """Look a model up and plan it, before any byte of its weights is read.

    Args:
        repo_id: such as `OWNER/NAME`.
        revision: branch, tag or commit; None for `main`.
        target: the folder to download into; None for one below `models_dir`, named as
            text-generation-webui names it.
        models_dir: the folder of model folders.
        options: of the plan.
        hub: the server; None for huggingface.co or `HF_ENDPOINT`.
        progress: gets the small files and the headers.

    Yields:
        The model. It has small files in a temporary folder, which the block's end removes.

    Raises:
        ModelNotFound: no such repository or revision, or one without weights.
        UnsupportedFormat, UnsupportedArchitecture, InvalidConfig, InvalidCheckpoint: the engine
            cannot run the model; see `plan`.
        InvalidSettings: an option of the plan makes no sense, or the folder has other files.
        DownloadError: the server cannot be reached or refuses.
    """
    progress, hub = checked_progress(progress), hub or Hub()
    repo = hub.repo(repo_id, revision)
    small = [file for file in repo.files if _is_small(file)]
    weights = [file for file in repo.files
               if file.name.endswith(".safetensors") and "/" not in file.name]
    if not weights:
        raise _no_weights(hub, repo)
    folder = target or models_dir / folder_name(repo.repo_id, repo.revision)
    _check_repo(folder, repo)
    with tempfile.TemporaryDirectory(prefix="exl_loader-") as name:
        staged = Path(name)
        _stage(hub, repo, small, weights, staged, progress)
        with planned(staged, options or LoadOptions()) as plan:
            read = {path.name for path in plan.model.checkpoint.paths}
            reservation = replace(plan.reservation, model_dir=str(folder))
        files = (*small, *(file for file in weights if file.name in read))
        found = ModelDownload(repo, folder, reservation, files, staged, hub)
        _check_folder(folder, files, progress)
        yield found


def transfer(
    hub: Hub, repo: HubRepo, file: HubFile, part: Path, path: Path,
    advance: Callable[[int], None], stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Download a file, from the end of its part on, and check its hash.

    Args:
        part: grows while the file is incomplete.
        path: what it is renamed to.
        advance: gets the number of new bytes; negative where the server begins anew.
        stopped: asked after each piece; True ends the transfer there.

    Returns:
        False if it was stopped before the end of the file.

    Raises:
        DownloadError: as `Hub.pieces`; or the bytes are not the file's, and the part is removed.
    """
    digest = file.hash()
    with open(part, "a+b") as out:
        out.seek(0)
        _feed(digest, out, file.size)
        position = out.tell()
        out.truncate()
        for offset, data in hub.pieces(repo, file, position):
            if offset != position:
                advance(offset - position)
                digest, position = file.hash(), offset
                out.truncate(offset)
            out.write(data)
            digest.update(data)
            position += len(data)
            advance(len(data))
            if position < file.size and stopped():
                return False
    if digest.hexdigest() != file.oid:
        part.unlink()
        raise DownloadError(
            file.name, expected=f"the hash {file.oid}", actual=digest.hexdigest(),
            remedy="The bytes were damaged on their way. Download it again",
        )
    os.replace(part, path)
    return True


def _feed(digest: Any, file: Any, count: int) -> None:
    """Hash the next `count` bytes of a file, or those up to its end."""
    while count:
        data = file.read(min(count, HASHED_BYTES))
        if not data:
            return
        digest.update(data)
        count -= len(data)


def _stage(
    hub: Hub, repo: HubRepo, small: Sequence[HubFile], weights: Sequence[HubFile], folder: Path,
    progress: Progress,
) -> None:
    """Fill a folder with the small files and with the headers of the weight files."""

    def header(file: HubFile) -> tuple[HubFile, bytes]:
        data = hub.read_start(repo, file, HEADER_BYTES)
        needed = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        # A header that is too long is refused when it is read.
        if len(data) < needed <= min(file.size, MAX_HEADER_BYTES):
            data = hub.read_start(repo, file, needed)
        return file, data[:needed]

    total = sum(file.size for file in small)
    with task(progress, "reading configuration", total, "bytes") as advance:
        for file in small:
            path = folder / file.name
            path.parent.mkdir(exist_ok=True)
            transfer(hub, repo, file, _part(folder, file), path, advance)
    with (
        task(progress, "reading headers", len(weights), "files") as advance,
        ThreadPoolExecutor(HEADER_THREADS) as threads,
    ):
        for file, data in threads.map(header, weights):
            with open(folder / file.name, "wb") as out:
                out.write(data)
                out.truncate(file.size)
            advance(1)


def _is_small(file: HubFile) -> bool:
    """Return whether a file is one that a model needs besides its weights."""
    matches = any(
        fnmatch.fnmatchcase(file.name, pattern) and file.name.count("/") == pattern.count("/")
        for pattern in SMALL_FILES
    )
    is_omitted = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in OMITTED)
    return matches and not is_omitted and file.size <= MAX_SMALL_BYTES


def _no_weights(hub: Hub, repo: HubRepo) -> ModelNotFound:
    """Return the error for a repository without safetensors files.

    Raises:
        UnsupportedFormat: it has pickle files or GGUF in their place.
    """
    branches = hub.branches_hint(repo.repo_id)
    others = [name for name in branches.split(", ") if name not in ("", repo.revision)]
    if not others:
        refuse_other_formats(file.name for file in repo.files)
    return ModelNotFound(
        f"{repo.repo_id}: revision {shown_name(repo.revision)}", expected="*.safetensors",
        actual="none",
        remedy=f"EXL2 repositories keep each size in a branch: {repo.repo_id}:BRANCH. The branches "
        f"are {branches}" if others else "Choose another repository",
    )


@dataclass
class _Record:
    """The contents of the file that marks an unfinished folder; empty where there is none."""

    repo: str = ""
    revision: str = ""
    commit: str = ""
    done: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> _Record:
        values = read_json_object_if_there(folder / UNFINISHED_NAME)
        repo, revision, commit = (str(values.get(n, "")) for n in ("repo", "revision", "commit"))
        done = values.get("done")
        return cls(repo, revision, commit, done if isinstance(done, dict) else {})

    def at(self, repo: HubRepo) -> _Record:
        """Return the record of a download of a commit, with what is done already."""
        return _Record(repo.repo_id, repo.revision, repo.commit, dict(self.done))

    def write(self, folder: Path) -> None:
        temporary = folder / f"{UNFINISHED_NAME}.tmp"
        temporary.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / UNFINISHED_NAME)


def _is_done(folder: Path, file: HubFile, done: dict[str, str]) -> bool:
    """Return whether a file is complete: recorded so, or in a folder without a record."""
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return done.get(file.name) == file.oid or not (folder / UNFINISHED_NAME).exists()


def _part(folder: Path, file: HubFile) -> Path:
    # By its hash, so that another version of the file never continues it.
    return folder / f"{file.name}.{file.oid[:12]}.part"


def _check_repo(folder: Path, repo: HubRepo) -> None:
    """Refuse a folder with an unfinished download of another model."""
    record = _Record.read(folder)
    if record.repo and (record.repo, record.revision) != (repo.repo_id, repo.revision):
        raise InvalidSettings(
            str(folder), expected=f"a folder for {repo.repo_id}:{repo.revision}",
            actual=f"an unfinished download of {shown_name(record.repo)}:"
            f"{shown_name(record.revision)}",
            remedy="Choose another folder, or delete this one",
        )


def _check_folder(folder: Path, files: Sequence[HubFile], progress: Progress) -> None:
    """Refuse a folder that has other files than the model's, and no record of a download."""
    if (folder / UNFINISHED_NAME).exists() or not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    total = sum(file.size for file in files)
    with task(progress, "checking the files that are there", total, "bytes") as advance:
        for file in files:
            path, digest = folder / file.name, file.hash()
            if path.is_file() and path.stat().st_size == file.size:
                with open(path, "rb") as data:
                    _feed(digest, data, file.size)
            advance(file.size)
            if digest.hexdigest() != file.oid:
                raise InvalidSettings(
                    str(folder), expected="an empty folder, or a complete download of this model",
                    actual=f"other files, and {shown_name(file.name)} is not the model's",
                    remedy="Choose another folder, or delete this one",
                )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from downloading into the folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f"{UNFINISHED_NAME}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DownloadError(
            str(folder), actual="another process is downloading into this folder",
            remedy="Wait for it",
        ) from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
