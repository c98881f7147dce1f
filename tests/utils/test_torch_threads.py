"""PyTorch's number of threads while a model is loaded, and afterwards."""

import threading

import pytest
import torch

import exl_loader
from exl_loader.utils.errors import ExlLoaderError
from exl_loader.utils.progress import NullProgress
from exl_loader.utils.system.processors import torch_on_one_thread


class Watcher(NullProgress):
    """Records how many threads PyTorch would use at each step."""

    def __init__(self):
        self.seen = set()

    def advance(self, task, n=1):
        self.seen.add(torch.get_num_threads())


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_load_uses_one_thread_and_restores_the_setting(tiny_model_dir):
    watcher = Watcher()
    with exl_loader.load(tiny_model_dir, ctx_size=256, progress=watcher):
        assert torch.get_num_threads() == 3
    assert watcher.seen == {1}


def test_a_load_that_fails_restores_the_setting(tiny_model_dir):
    with pytest.raises(ExlLoaderError):
        exl_loader.load(tiny_model_dir, ctx_size=256, alpha_value=-1.0)
    assert torch.get_num_threads() == 3


def test_simultaneous_loads_restore_the_setting_of_all_threads():
    inside, outside, seen = threading.Event(), threading.Event(), []

    def later():
        with torch_on_one_thread():
            seen.append(torch.get_num_threads())
            inside.set()
            outside.wait()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=later)
    with torch_on_one_thread():
        thread.start()
        inside.wait()
    assert torch.get_num_threads() == 3
    outside.set()
    thread.join()
    new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert seen == [1, 3, 3]


def test_a_block_inside_of_a_block_restores_nothing():
    with torch_on_one_thread():
        with torch_on_one_thread():
            pass
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
