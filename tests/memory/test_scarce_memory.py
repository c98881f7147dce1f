"""Two loads at once where memory is enough for one: real processes and real limits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl_loader.memory.reservation import plan
from support import REPO

CTX = 8192
PIECE_BYTES = 1 << 16

# A machine whose memory is a folder: each process keeps a sparse file in it, as long as
# the memory that it has touched. Loads ask this machine as they ask a real one.
SHARED_MACHINE = """
import os, random, sys, time
from pathlib import Path
import exl_loader
from exl_loader.backends import BACKENDS
from exl_loader.memory import buffers as memory
from exl_loader.backends.base import Capacity
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.utils.errors import InsufficientMemory

ledger, total, folder, ctx_size = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
own = ledger / f"held-{os.getpid()}"
memory.TOUCH_BYTES = int(sys.argv[5])

class SharedMachine(CpuBackend):
    def capacity(self, name):
        held = sum(path.stat().st_size for path in ledger.glob("held-*"))
        return Capacity(total, max(0, total - held), 0)

    def touch(self, buffer):
        super().touch(buffer)
        os.truncate(own, own.stat().st_size + buffer.nbytes)

def wait_for(pattern, count):
    while len(list(ledger.glob(pattern))) < count:
        time.sleep(0.005)

def load():
    own.write_bytes(b"")
    try:
        return exl_loader.load(folder, ctx_size=ctx_size)
    except InsufficientMemory as error:
        assert memory.live_bytes() == 0
        own.unlink()
        print("refused:", error, flush=True)

BACKENDS["cpu"] = SharedMachine()
import torch
assert exl_loader.plan(folder, ctx_size=ctx_size).fits
(ledger / f"planned-{os.getpid()}").touch()
wait_for("planned-*", 2)
model = load()
(ledger / f"first-{os.getpid()}").touch()
while model is None:
    time.sleep(random.uniform(0.01, 0.1))
    model = load()
settings = {"max_new_tokens": 3, "ban_eos_token": True}
print("generated", len(list(model.generate_ids([5], settings))), flush=True)
wait_for("first-*", 2)
model.unload()
own.unlink()
"""


# Two threads load at once in a process whose address space has room for one and a half.
ONE_ADDRESS_SPACE = """
import resource, sys, threading
import torch
import exl_loader
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import InsufficientMemory

folder, ctx_size = sys.argv[1], int(sys.argv[2])
needed = exl_loader.plan(folder, ctx_size=ctx_size).total_bytes
with exl_loader.load(folder, ctx_size=256):
    pass
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + needed * 8 // 5,) * 2)
found = []

def work():
    try:
        found.append(exl_loader.load(folder, ctx_size=ctx_size))
    except InsufficientMemory as error:
        found.append(error)

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
(refusal,) = [one for one in found if isinstance(one, InsufficientMemory)]
(model,) = [one for one in found if not isinstance(one, InsufficientMemory)]
settings = {"max_new_tokens": 3, "ban_eos_token": True}
assert len(list(model.generate_ids([5], settings))) == 3
assert memory.live_bytes() == model.allocated_bytes() == needed
model.unload()
exl_loader.load(folder, ctx_size=ctx_size).unload()
print(refusal)
"""


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"EXL_LOADER_REFERENCE": "1"},
    )


@pytest.mark.slow
def test_two_processes_at_once_on_a_machine_with_memory_for_one(tmp_path, tiny_model_dir):
    needed = plan(tiny_model_dir, ctx_size=CTX).total_bytes
    assert needed > 20 * PIECE_BYTES
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    total = needed * 3 // 2
    processes = [
        run(SHARED_MACHINE, ledger, total, tiny_model_dir, CTX, PIECE_BYTES) for _ in range(2)
    ]
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, sum(size(path) for path in ledger.glob("held-*")))
        time.sleep(0.005)
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    refusals = [line for out, _ in answers for line in out.splitlines() if "refused: " in line]
    assert refusals and all(" free" in line for line in refusals), answers
    assert all("generated 3" in out for out, _ in answers)
    # Each looks before it takes a piece, so both together go over by a piece at most.
    assert needed <= most <= total + PIECE_BYTES


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets the limit of an address space")
def test_two_loads_at_once_in_an_address_space_with_room_for_one(tiny_model_dir):
    ctx_size = 5 << 19
    assert plan(tiny_model_dir, ctx_size=ctx_size).total_bytes > 400 << 20
    process = run(ONE_ADDRESS_SPACE, tiny_model_dir, ctx_size)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    # Refused by what is free, or by the system, whichever comes first.
    assert out.startswith("cpu: ") and (" does not fit: " in out or " bytes" in out)
