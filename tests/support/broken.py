"""Break model folders, and check that a load refuses them with a readable error."""

from __future__ import annotations

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

import exl_loader
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import ExlLoaderError

CTX = 300


def rejected(folder, error, *parts: str, **options) -> None:
    """Check that a load fails with one readable line and leaves no buffer.

    For tests with the fixture `no_other_model`.

    Args:
        folder: the model.
        error: the exact type of the error, or a tuple of possible types.
        parts: texts that are in the message.
        options: of the load.
    """
    with pytest.raises(ExlLoaderError) as caught:
        exl_loader.load(folder, ctx_size=CTX, **options)
    found = caught.value
    assert type(found) in (error if isinstance(error, tuple) else (error,)), found
    text = str(found)
    assert "\n" not in text and len(text) < 1000
    for part in parts:
        assert part in text, text
    assert memory.live_bytes() == 0


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder, file: str, **changes) -> None:
    """Change tensors (names with `__` for dots); None removes one."""
    tensors = load_file(folder / file)
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / file)


def edit_header(path, edit) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
