"""Downloads from the hub, which all tabs of the page share: one at a time.

A thread looks the model up, keeps its plan while a person decides, and downloads it. A download
that is stopped or cut off goes on where it was, also after the page was started again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl_loader import InvalidSettings, LoadOptions
from exl_loader.commands.hub import Hub, parse_repo

from ..panel.loads import WatchedProgress
from ..panel.panel import error_html

if TYPE_CHECKING:
    from exl_loader.commands.model_download import ModelDownload

# Where a download is.
NONE, LOOKING, PLANNED, FETCHING, STOPPING, COMPLETE = (
    "none", "looking", "planned", "fetching", "stopping", "complete")

BUSY = (LOOKING, FETCHING, STOPPING)

CANNOT = "Cannot be downloaded"


@dataclass(frozen=True)
class ShownDownload:
    """What a tab shows of the download.

    Args:
        stage: NONE, LOOKING and so on.
        name: `OWNER/NAME:REVISION`, or as it was typed while it is looked up; empty in NONE.
        model: with its plan, from PLANNED on; else None.
        missing_bytes, free_bytes: of the model's files and of its disk, when the stage began.
        progress: a bar as HTML; empty where nothing is under way.
        problem: an error as HTML; empty for none.
        may_start: whether it can be downloaded now.
    """

    stage: str = NONE
    name: str = ""
    model: ModelDownload | None = None
    missing_bytes: int = 0
    free_bytes: int = 0
    progress: str = ""
    problem: str = ""
    may_start: bool = False


class _Job:
    """One model, from its name to its last byte."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage = LOOKING
        self.model: ModelDownload | None = None
        self.missing_bytes = self.free_bytes = 0
        self.progress = WatchedProgress()
        self.problem = ""
        self.has_room = False
        # Set to go on from PLANNED; with `dropped` to end.
        self.go_on = threading.Event()
        self.stopped = threading.Event()
        self.dropped = False


def _progress_html(job: _Job | None) -> str:
    return job.progress.html("Asking the hub") if job is not None and job.stage in BUSY else ""


class Downloads:
    """The page's download. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self._problem = ""
        self._changes = 0
        self._completed = 0

    @property
    def version(self) -> str:
        """A text that changes with everything that is shown."""
        job = self._job
        return f"{self._changes} {hash(_progress_html(job))}"

    @property
    def completed(self) -> int:
        """How many downloads have been completed."""
        return self._completed

    @property
    def is_busy(self) -> bool:
        """True while a model is looked up or downloaded."""
        job = self._job
        return job is not None and job.stage in BUSY

    def shown(self) -> ShownDownload:
        """Return what a tab shows."""
        with self._lock:
            job = self._job
            if job is None:
                return ShownDownload(problem=self._problem)
            return ShownDownload(
                job.stage, job.name, job.model, job.missing_bytes, job.free_bytes,
                _progress_html(job), job.problem,
                job.stage == PLANNED and job.has_room,
            )

    def look_up(self, repo: str, models_dir: str) -> None:
        """Look a model up in the background, in place of another one that is not downloading.

        An error is shown instead of raised.

        Args:
            repo: `OWNER/NAME[:REVISION]`, or the address of its page.
            models_dir: the folder of model folders, in which it gets one.
        """
        with self._lock:
            if self._job is not None and self._job.stage in (FETCHING, STOPPING):
                self._job.problem = error_html(InvalidSettings(
                    "download", expected="one model at a time",
                    actual=f"{self._job.name}, which is being downloaded",
                    remedy="Stop it, or wait for its end"), heading=CANNOT)
                self._changes += 1
                return
            self._drop()
            try:
                repo_id, revision = parse_repo(repo)
            except InvalidSettings as error:
                self._problem = error_html(error, heading=CANNOT)
                return
            job = self._job = _Job(repo.strip())
            folder = Path(models_dir or ".").expanduser().absolute()
            threading.Thread(
                target=self._run, args=(job, repo_id, revision, folder), daemon=True).start()

    def start(self) -> None:
        """Download the model that is planned; nothing if none is."""
        with self._lock:
            job = self._job
            if job is not None and job.stage == PLANNED and job.has_room:
                job.stage, job.problem = FETCHING, ""
                job.stopped.clear()
                self._changes += 1
                job.go_on.set()

    def stop(self) -> None:
        """Stop the download after the bytes that have arrived, or forget what is looked up."""
        with self._lock:
            job = self._job
            if job is None or job.stage == STOPPING:
                return
            if job.stage == FETCHING:
                job.stage = STOPPING
                job.stopped.set()
                self._changes += 1
            else:
                self._drop()

    def _drop(self) -> None:
        """Forget the model; its thread ends."""
        job, self._job = self._job, None
        if job is not None:
            job.dropped = True
            job.stopped.set()
            job.go_on.set()
        self._problem = ""
        self._changes += 1

    def _run(self, job: _Job, repo_id: str, revision: str | None, models_dir: Path) -> None:
        from exl_loader.commands.model_download import prepared

        try:
            # An interrupted wait makes the tries that are left follow at once.
            hub = Hub(sleep=job.stopped.wait)
            with prepared(repo_id, revision, models_dir=models_dir, hub=hub,
                          options=LoadOptions(replacing=True), progress=job.progress) as model:
                job.model = model
                job.name = f"{repo_id}:{model.repo.revision}"
                self._plan(job, model)
                while job.go_on.wait() and not job.dropped:
                    job.go_on.clear()
                    if self._fetch(job, model):
                        return
        except Exception as error:
            with self._lock:
                if self._job is job:
                    self._drop()
                    self._problem = error_html(error, heading=CANNOT)

    def _plan(self, job: _Job, model: ModelDownload, problem: str = "") -> None:
        """Show the plan, and wait for a person."""
        missing, free = model.missing_bytes(), model.free_bytes()
        try:
            model.check_disk()
        except Exception as error:
            has_room, problem = False, problem or error_html(error, heading=CANNOT)
        else:
            has_room = True
        with self._lock:
            job.missing_bytes, job.free_bytes, job.has_room = missing, free, has_room
            job.stage, job.problem = PLANNED, problem
            self._changes += 1

    def _fetch(self, job: _Job, model: ModelDownload) -> bool:
        """Download; return False if it did not reach its end."""
        problem = ""
        try:
            if model.fetch(job.progress, job.stopped.is_set):
                with self._lock:
                    job.missing_bytes, job.stage = 0, COMPLETE
                    self._completed += 1
                    self._changes += 1
                return True
        except Exception as error:
            problem = error_html(error, heading="Interrupted")
        self._plan(job, model, problem)
        return False
