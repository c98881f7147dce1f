"""PyTorch's threads, kept out of work that is many small operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_usual = 1


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Keep PyTorch to the calling thread meanwhile, and leave its setting as it was.

    Its threads wait for each other in loops. That costs little on an idle machine; where
    another program wants the cores, or the kernels' own threads do, a load of small operations
    took six times as long.
    """
    import torch

    global _inside, _usual
    with _lock:
        if _inside == 0:
            _usual = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        # The setting is each thread's own and also what new threads start with: of several
        # loads at once every one sets both back, to what it was before the first of them.
        with _lock:
            _inside -= 1
            torch.set_num_threads(_usual)
