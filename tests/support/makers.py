"""Random quantised layers and model folders, written from the format descriptions alone.

The makers are independent of `exl_loader.formats`: codes become bit streams through numpy's
`packbits`, and each returns the weights that its tensors encode, computed before packing.

    tensors, weight = make_exl2_layer(rng, 256, 96, [(5, 128), (4, 128)])
    tensors, weight = make_gptq_layer(rng, 256, 96, bits=4, group_size=64, act_order=True)
    state = write_quantized_model(folder, "exl2", seed=1)      # state dict for transformers

`tensors` maps the name after the layer's prefix (`q_weight`, ...) to a torch tensor;
`weight` is float32 [in_features, out_features] (transpose it for `nn.Linear`).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import linear_spec, read_linear
from exl_loader.model.parts.linear import Linear
from support.tiny import CONFIG, tensor_shapes, write_tokenizer

Tensors = dict[str, torch.Tensor]


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [rows, columns] into int32 [ceil(rows * bits / 32), columns], a stream a column.

    Least significant bit first, nothing between codes, the last word filled up with zeros.
    """
    single = (codes[:, None, :].astype(np.uint32) >> np.arange(bits)[None, :, None]) & 1
    stream = single.reshape(-1, codes.shape[1]).astype(np.uint8)
    stream = np.pad(stream, ((0, -len(stream) % 32), (0, 0)))
    packed = np.packbits(stream, axis=0, bitorder="little")
    return np.ascontiguousarray(packed.T).view(np.int32).T.copy()


def exl2_groups(rng: np.random.Generator, in_features: int, sizes=(32, 64, 128)) -> list:
    """Draw a group layout: random widths and sizes, the last group taking what is left."""
    groups, left = [], in_features
    while left > 0:
        rows = min(int(rng.choice(sizes)), left)
        groups.append((int(rng.choice([2, 3, 4, 5, 6, 8])), rows))
        left -= rows
    return sorted(groups[:-1], key=lambda group: -group[0]) + groups[-1:]


def make_exl2_layer(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    groups: list | None = None,
    *,
    permuted: bool = True,
    bias: bool = False,
    invperm_dtype: torch.dtype = torch.int32,
) -> tuple[Tensors, torch.Tensor]:
    """Make an EXL2 layer with random codes.

    Args:
        groups: (bits, rows) of each group in stored order; rows of all but the last are
            multiples of 32. Drawn where not given.
        invperm_dtype: int32, or int16 whose bits are read as unsigned.

    Returns:
        its tensors, and float32 [in_features, out_features] in original channel order.
    """
    groups = groups or exl2_groups(rng, in_features)
    columns = -(-out_features // 32) * 32
    qs = rng.integers(1, 17, (len(groups), columns))
    scale_max = np.empty(len(groups), np.float16)
    stored, streams, table = [], [], []
    for index, (bits, rows) in enumerate(groups):
        codes = rng.integers(0, 1 << bits, (rows, columns))
        scale_max[index] = 2 * in_features**-0.5 * 12**0.5 / (1 << bits) * rng.uniform(0.7, 1.4)
        step = scale_max[index] / np.float16(256)
        scale = (qs[index] ** 2).astype(np.float16) * step
        assert scale.dtype == np.float16
        stored.append((codes - (1 << (bits - 1))).astype(np.float16) * scale)
        table += [bits, sum(len(s) for s in streams)]
        streams.append(pack_stream(codes, bits))
    perm = rng.permutation(in_features) if permuted else np.arange(in_features)
    weight = np.empty((in_features, columns), np.float32)
    weight[perm] = np.concatenate(stored)
    invperm = torch.from_numpy(np.argsort(perm).astype(np.int32))
    tensors = {
        "q_weight": torch.from_numpy(np.concatenate(streams)),
        "q_groups": torch.tensor(table, dtype=torch.int16),
        "q_scale": torch.from_numpy(pack_stream((qs - 1).T, 4).T.copy()),
        "q_scale_max": torch.from_numpy(scale_max),
        "q_invperm": invperm.to(invperm_dtype),
    }
    if bias:
        tensors["bias"] = torch.from_numpy(rng.normal(size=out_features).astype(np.float16))
    return tensors, torch.from_numpy(weight[:, :out_features].copy())


def make_gptq_layer(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    act_order: bool = False,
    g_idx: bool = True,
    v2: bool = False,
    bias: bool = False,
) -> tuple[Tensors, torch.Tensor]:
    """Make a GPTQ layer with random codes and zero points (1 to 2^bits - 1).

    Args:
        group_size: -1 is one group. act_order: channels belong to groups in random order.
        g_idx: store the group index, as AutoGPTQ always does. v2: zero points as they are,
            not less one.

    Returns:
        its tensors, and float32 [in_features, out_features].
    """
    assert g_idx or not act_order
    size = in_features if group_size == -1 else group_size
    index = np.arange(in_features) // size
    if act_order:
        index = rng.permutation(index)
    num_groups = -(-in_features // size)
    codes = rng.integers(0, 1 << bits, (in_features, out_features))
    zeros = rng.integers(1, 1 << bits, (num_groups, out_features))
    spread = 12**0.5 / (1 << bits) * in_features**-0.5
    scales = (spread * rng.uniform(0.5, 1.5, zeros.shape)).astype(np.float16)
    weight = scales[index].astype(np.float32) * (codes - zeros[index])
    stored_zeros = zeros if v2 else zeros - 1
    tensors = {
        "qweight": torch.from_numpy(pack_stream(codes, bits)),
        "qzeros": torch.from_numpy(pack_stream(stored_zeros.T, bits).T.copy()),
        "scales": torch.from_numpy(scales),
    }
    if g_idx:
        tensors["g_idx"] = torch.from_numpy(index.astype(np.int32))
    if bias:
        tensors["bias"] = torch.from_numpy(rng.normal(size=out_features).astype(np.float16))
    return tensors, torch.from_numpy(weight.astype(np.float32))


def quantization_config(format: str, **settings) -> dict:
    """Give the `quantization_config` that the usual tools write."""
    if format == "exl2":
        own = {"version": "0.3.2", "bits": 4.0, "head_bits": 6, "calibration": {"rows": 1}}
    else:
        own = {"bits": 4, "group_size": 128, "desc_act": False, "sym": False}
    return {"quant_method": format} | own | settings


def write_folder(
    folder: Path,
    tensors: Tensors,
    config: dict | None = None,
    *,
    file: str = "model.safetensors",
    shards: int = 1,
) -> Path:
    """Write tensors and a config.json; with several shards `file` becomes a numbered series."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    names = sorted(tensors)
    stem = file.removesuffix(".safetensors")
    for shard in range(shards):
        path = file if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / path)
    return folder


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file by hand: any header (an object, or bytes as they are), any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path.parent


def header_entry(dtype="F16", shape=(2,), offsets=(0, 4)) -> dict:
    """Give one entry of a safetensors header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_layer(folder: Path, tensors: Tensors, name: str = "layer", **settings) -> Path:
    """Write a folder with one layer, for tests of the formats alone."""
    format = "exl2" if "q_weight" in tensors else "gptq" if "qweight" in tensors else None
    config = {"quantization_config": quantization_config(format, **settings)} if format else {}
    return write_folder(folder, {f"{name}.{key}": t for key, t in tensors.items()}, config)


def write_quantized_model(
    folder: Path,
    format: str,
    *,
    seed: int = 0,
    config: dict | None = None,
    shards: int = 1,
    tokenizer: bool = False,
    **layer_options,
) -> Tensors:
    """Write a small random Llama whose linear layers are quantised.

    Args:
        format: `exl2` (the head as well) or `gptq` (the head stays float16).
        config: changes to `tiny.CONFIG`. layer_options: for the layer's maker.

    Returns:
        the state dict that it encodes: Hugging Face names, float32, weights [out, in].
    """
    config = CONFIG | (config or {})
    rng = np.random.default_rng(seed)
    make = make_exl2_layer if format == "exl2" else make_gptq_layer
    state, tensors = {}, {}
    for name, shape in tensor_shapes(config).items():
        layer = name.removesuffix(".weight")
        if name.endswith("_proj.weight") or (format == "exl2" and layer == "lm_head"):
            stored, weight = make(rng, shape[1], shape[0], **layer_options)
            state[name] = weight.t().contiguous()
            tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
            continue
        values = rng.normal(size=shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        half = torch.from_numpy(values + (len(shape) == 1)).half()
        state[name], tensors[name] = half.float(), half
    options = {}
    if format == "gptq":
        options = {
            "bits": layer_options.get("bits", 4),
            "group_size": layer_options.get("group_size", 128),
            "desc_act": layer_options.get("act_order", False),
            "checkpoint_format": "gptq_v2" if layer_options.get("v2") else "gptq",
        }
    config["quantization_config"] = quantization_config(format, **options)
    file = "output.safetensors" if format == "exl2" else "model.safetensors"
    write_folder(folder, tensors, config, file=file, shards=shards)
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return state


def linear_part(
    checkpoint: Checkpoint, name: str, in_features: int, out_features: int, *,
    device: str = "cpu", **options,
) -> Linear:
    """Describe a layer on a device; options as those of `linear_spec`."""
    return Linear(linear_spec(checkpoint, name, in_features, out_features, **options), device)


def allocate(part: Linear) -> Tensors:
    """Make a layer's tensors, full of what was in memory before."""
    tensors = {}
    for role, spec in part.tensors.items():
        tensors[role] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        tensors[role].view(torch.uint8).fill_(0xA5)
    return tensors


def load_layer(
    folder: Path, in_features: int, out_features: int, name: str = "layer", ops=None, **options
):
    """Open a folder, read and pack one layer; `ops` packs it, by default the reference.

    Returns:
        (the layer's part, its resident layer, its weight decoded from the checkpoint).
    """
    with Checkpoint.open(folder) as checkpoint:
        part = linear_part(checkpoint, name, in_features, out_features, **options)
        stored = read_linear(part.spec, checkpoint)
        return part, (ops or ReferenceOps()).pack(stored, allocate(part)), stored.weight()


def warnings_of_weights(caplog) -> list[str]:
    """Return the logged warnings, without the one that a folder of these has no tokenizer."""
    return [
        record.getMessage() for record in caplog.records
        if "has no tokenizer files" not in record.getMessage()
    ]
