"""One builder at a time, without ever waiting for a dead one.

The operating system's lock goes away with the process that held it. For what it cannot
tell, a holder that was suspended or a disk whose locks do not work, the holder also touches
a heartbeat file: where that stands still, a waiter builds on its own. That is safe, because
builds happen in private directories and appear by a rename; the lock only saves work.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.byte_counts import MIB
from ...utils.errors import ExlLoaderError
from ...utils.json_keys import parse_json
from ...utils.progress import Progress
from ...utils.untrusted_files import read_bytes

if TYPE_CHECKING:
    from filelock import FileLock

POLL_S = 0.1
HEARTBEAT_S = 1.0
# Long beside the heartbeat: a machine that is compiling may be slow, or swap.
STALE_S = 30.0

# A network or container file system that has no locks at all says one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def build_lock(path: Path, finished: Callable[[], bool], progress: Progress) -> Iterator[bool]:
    """Hold a lock during the block, or learn that it need not or cannot be held.

    Args:
        path: the lock file; the heartbeat file stands beside it.
        finished: whether what the holder works on is there; ends the waiting.
        progress: shows the waiting, with the holder's process id.

    Yields:
        Whether the lock is held. Where not, `finished()` has become true, the holder gave no
        sign of life, or the disk has no locks.

    Raises:
        OSError: the lock file cannot be written.
    """
    # Imported on a cold start only: a warm load has no use for it and 50 ms in all.
    from filelock import FileLock

    lock = FileLock(str(path), thread_local=False)
    heartbeat = path.with_suffix(".holder")
    try:
        held = _acquire(lock, heartbeat, finished, progress)
    except NotImplementedError:  # older releases of filelock say so of ENOSYS
        held = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        held = False
    if not held:
        yield False
        return
    _write_beat(heartbeat, 0)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(heartbeat, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        beat.join()
        heartbeat.unlink(missing_ok=True)
        lock.release()


def _acquire(
    lock: FileLock, heartbeat: Path, finished: Callable[[], bool], progress: Progress
) -> bool:
    """Wait for the lock; False where it is no longer needed or its holder is silent."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
        return True
    except Timeout:
        pass
    task = f"waiting for {_holder(heartbeat)}, which compiles the same kernels"
    progress.start(task, None, "s")
    try:
        seen, seen_at, told = _signature(heartbeat), time.monotonic(), time.monotonic()
        while not finished():
            try:
                lock.acquire(timeout=POLL_S, poll_interval=POLL_S / 2)
                return True
            except Timeout:
                pass
            now, signature = time.monotonic(), _signature(heartbeat)
            if signature != seen:
                seen, seen_at = signature, now
            if now - seen_at > STALE_S:
                return False
            if now - told >= 1.0:
                told += 1.0
                progress.advance(task)
        return False
    finally:
        progress.finish(task)


def _beat(heartbeat: Path, stop: threading.Event) -> None:
    """Write who holds the lock, again and again, until told to stop."""
    count = 0
    while not stop.wait(HEARTBEAT_S):
        count += 1
        _write_beat(heartbeat, count)


def _write_beat(heartbeat: Path, count: int) -> None:
    """Replace the heartbeat file as a whole, so that nobody reads half of it."""
    record = {"pid": os.getpid(), "host": socket.gethostname(), "beat": count}
    fresh = heartbeat.with_suffix(".beat")
    try:
        fresh.write_text(json.dumps(record), encoding="utf-8")
        fresh.replace(heartbeat)
    except OSError:
        pass  # A full disk: the compiler will say so in words that reach the user.


def _signature(heartbeat: Path) -> bytes | None:
    """What a heartbeat looks like now; contents, so that no two machines' clocks matter."""
    try:
        return read_bytes(heartbeat, MIB)
    except ExlLoaderError:
        return None


def _holder(heartbeat: Path) -> str:
    """Name the process that holds the lock, as far as it is known."""
    try:
        record = parse_json(read_bytes(heartbeat, MIB))
        name = f"process {int(record['pid'])}"
        return name if record["host"] == socket.gethostname() else f"{name} on {record['host']}"
    except (ExlLoaderError, ValueError, KeyError, TypeError):
        return "another process"
