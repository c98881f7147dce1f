"""Reading tensors: bit for bit, as copies, and from files that change meanwhile."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedFormat
from support import run_python
from support.counting import count
from support.makers import header_entry, write_folder, write_raw


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
    + ["bool", "uint16", "float8_e4m3fn", "float8_e5m2"],
)
def test_tensors_are_read_bit_for_bit(tmp_path, dtype):
    tensor = torch.randint(0, 2, (3, 5, 2)).to(getattr(torch, dtype))
    folder = write_folder(tmp_path / "m", {"x": tensor, "other": torch.ones(7)})
    with Checkpoint.open(folder) as checkpoint:
        header = checkpoint.headers["x"]
        assert (header.dtype, header.shape, header.nbytes) == (dtype, (3, 5, 2), tensor.nbytes)
        back = checkpoint.read("x")
        assert back.dtype == tensor.dtype
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
        rows = checkpoint.read_rows("x", 4, 11)
        expected = tensor.flatten(0, 1)[4:11]
        assert torch.equal(rows.view(torch.uint8), expected.view(torch.uint8))
        assert checkpoint.read_rows("x", 2, 2).shape == (0, 2)


@pytest.mark.parametrize("shape", [(), (0,), (0, 7), (7, 0)])
def test_scalars_and_empty_tensors(tmp_path, shape):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(shape), "y": torch.zeros(3)})
    with Checkpoint.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read("x"), torch.ones(shape))


def test_a_tensor_is_a_copy(tmp_path):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(4)})
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("x").zero_()
        assert checkpoint.read("x").sum() == 4
        checkpoint.close()
        assert checkpoint.read("x").sum() == 4


def test_the_error_names_a_missing_tensor(tmp_path):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(4)})
    with Checkpoint.open(folder) as checkpoint, pytest.raises(InvalidCheckpoint, match="^y: not"):
        checkpoint.read("y")


def test_a_dtype_that_torch_lacks_is_an_error_only_when_read(tmp_path):
    folder = write_raw(
        tmp_path / "m/model.safetensors", {"x": header_entry("F6_E2M3", [4], [0, 3])}, b"123"
    )
    with Checkpoint.open(folder) as checkpoint, pytest.raises(UnsupportedFormat, match="float6"):
        checkpoint.read("x")


def test_a_file_that_shrinks_is_an_error_and_not_a_signal(tmp_path):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(1 << 16)})
    with Checkpoint.open(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 1 << 15)
        with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors.*truncated"):
            checkpoint.read("x")


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_changes_is_an_error(tmp_path, replace):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(4)})
    path = folder / "model.safetensors"
    status = path.stat()
    with Checkpoint.open(folder) as checkpoint:
        if replace:
            save_file({"x": torch.zeros(4)}, folder / "new")
            os.replace(folder / "new", path)
        else:
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        # Both may happen within one tick of the file system's clock.
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
        with pytest.raises(InvalidCheckpoint, match="changed after its header was read"):
            checkpoint.read("x")


def test_a_file_that_is_removed_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "m", {"x": torch.ones(4)})
    with Checkpoint.open(folder) as checkpoint:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InvalidCheckpoint, match="model.safetensors: expected a file"):
            checkpoint.read("x")


def test_opening_imports_neither_torch_nor_numpy(tmp_path):
    folder = write_folder(tmp_path / "m", {"x.weight": torch.ones(4, 4)})
    code = (
        "import sys; from exl_loader.checkpoint import Checkpoint;"
        "from exl_loader.formats import linear_spec;"
        f"linear_spec(Checkpoint.open({str(folder)!r}), 'x', 4, 4);"
        "sys.exit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    run_python(code)


def test_two_thousand_tensors_in_ten_shards_open_in_few_calls(tmp_path):
    nbytes = 4096 * 4096 * 2
    for shard in range(10):
        header = {
            f"layers.{shard}.{i}.weight": header_entry(
                shape=(4096, 4096), offsets=(i * nbytes, (i + 1) * nbytes)
            )
            for i in range(200)
        }
        path = tmp_path / "m" / f"model-{shard + 1:05}-of-00010.safetensors"
        write_raw(path, header)
        with path.open("r+b") as file:  # sparse: no block of it is on the disk
            file.truncate(path.stat().st_size + 200 * nbytes)

    def work():
        assert len(Checkpoint.open(tmp_path / "m").headers) == 2000

    # A limited number of calls a tensor, 24 when this was written.
    assert count(work).calls < 2000 * 50
