"""A model over several machines: each has a part of the layers, the first also embedding and head.

All machines together have every tensor of one machine once, and call layers by the model's numbers.
"""

from __future__ import annotations

import collections

import pytest

pytest.importorskip("transformers")

from exl_loader.cache.layout import CacheType, cache_specs
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.memory.segments import lay_out
from exl_loader.model.builder import build_parts
from exl_loader.model.step import workspace_specs
from exl_loader.utils.table import DeviceMap
from support.hf_models import MODELS, make_model
from support.tiny import write_tiny_model

Q4 = CacheType.parse("q4")


def parts_on(folder, *maps: DeviceMap):
    """Return a folder's config, and its parts on each map."""
    config = ModelConfig.from_dir(folder)
    with Checkpoint.open(folder) as checkpoint:
        return config, [build_parts(config, checkpoint, where) for where in maps]


def machine_maps(num_layers: int, *firsts: int, device: str = "cpu") -> list[DeviceMap]:
    """Put layers on machines, each of which begins with the layer of that number."""
    ends = [*firsts[1:], num_layers]
    return [
        DeviceMap(
            device if first == 0 else None, (device,) * (end - first),
            device if first == 0 else None, first,
        )
        for first, end in zip(firsts, ends, strict=True)
    ]


def tensors(specs) -> collections.Counter:
    return collections.Counter((spec.name, spec.segment, spec.dtype, spec.shape) for spec in specs)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_machines_together_have_each_tensor_of_one_machine_once(name, tmp_path):
    make_model(name, 0, tmp_path / "m", "float16")
    num_layers = ModelConfig.from_dir(tmp_path / "m").num_hidden_layers
    maps = machine_maps(num_layers, 0, 1, *range(2, num_layers))
    config, (whole, *machines) = parts_on(
        tmp_path / "m", DeviceMap.single("cpu", num_layers), *maps
    )
    found = collections.Counter()
    for parts in machines:
        specs = [*parts.specs(), *cache_specs(config, 3, Q4, parts.device_map)]
        found += tensors(specs)
        assert (parts.head is None) == (parts.embedding is None) == (parts is not machines[0])
    assert found == tensors([*whole.specs(), *cache_specs(config, 3, Q4, whole.device_map)])
    assert set(found.values()) == {1}
    of_machines = [linear.name for parts in machines for linear in parts.linears()]
    assert sorted(of_machines) == sorted(linear.name for linear in whole.linears())


def bytes_of(parts, config) -> dict[str, int]:
    """Return the bytes of each segment, of a model on one device."""
    specs = [
        *parts.specs(), *cache_specs(config, 5, Q4, parts.device_map),
        *workspace_specs(parts.stages(), ctx_size=1000, cache_type=Q4, chunk_size=32),
    ]
    return {name: segment.nbytes for (_, name), segment in lay_out(specs).items()}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_weights_and_cache_of_machines_add_up_to_those_of_one(is_tied, device, tmp_path):
    folder = write_tiny_model(
        tmp_path / "m", tokenizer=False, num_hidden_layers=5, tie_word_embeddings=is_tied
    )
    maps = machine_maps(5, 0, 2, 3, device=device)
    config, (whole, *machines) = parts_on(folder, DeviceMap.single(device, 5), *maps)
    # Each tensor is aligned on its own, so nothing is added where the table is cut.
    of_one, of_each = bytes_of(whole, config), [bytes_of(parts, config) for parts in machines]
    for segment in ("weights", "cache"):
        assert sum(found[segment] for found in of_each) == of_one[segment]
    assert of_each[0]["weights"] == whole.costs().of_range(0, 2, True, True)
    assert of_each[1]["weights"] == whole.costs().of_range(2, 3, True, False)
    assert of_each[2]["weights"] == whole.costs().of_range(3, 5, True, False)


def test_the_first_machine_has_the_workspace_of_a_head_of_its_own(tmp_path):
    folder = write_tiny_model(tmp_path / "m", tokenizer=False, num_hidden_layers=4)
    config, (first, last) = parts_on(folder, *machine_maps(4, 0, 3))

    def names(parts):
        specs = workspace_specs(parts.stages(), ctx_size=500, cache_type=Q4, chunk_size=32)
        return {spec.name: spec.shape for spec in specs}

    of_first, of_last = names(first), names(last)
    # Rows of the hidden state come back from the last machine, as many as a chunk has.
    assert of_first["x"] == of_last["x"] == (32, config.hidden_size)
    assert {"logits", "head_rows", "head_x"} <= set(of_first)
    assert not {"logits", "head_rows", "head_x"} & set(of_last)
    assert first.stages()[0].head is first.head and last.stages()[0].head is None


def test_cards_of_a_first_machine_read_the_embedding_in_main_memory(tmp_path):
    folder = write_tiny_model(
        tmp_path / "m", tokenizer=False, num_hidden_layers=4, tie_word_embeddings=True
    )
    where = DeviceMap("cpu", ("cuda:0", "cuda:1", "cuda:1"), "cuda:1")
    _, (parts,) = parts_on(folder, where)
    found = {(spec.name, spec.device, spec.segment, spec.read_by) for spec in parts.specs()}
    assert ("model.embed_tokens.weight", "cpu", "embedding", "cuda:0") in found
    assert ("lm_head.weight", "cuda:1", "weights", None) in found
    on_one = DeviceMap("cpu", ("cuda:0",) * 3, "cuda:0")
    _, (parts,) = parts_on(folder, on_one)
    # The head of the first card is the embedding as well, wherever the last layer is.
    assert parts.embedding.head is parts.head.linear
    assert {spec.device for spec in parts.specs()} == {"cuda:0"}


def test_a_part_of_the_layers_warns_of_no_tensor(tmp_path, caplog):
    folder = write_tiny_model(tmp_path / "m", tokenizer=False, num_hidden_layers=4)
    parts_on(folder, *machine_maps(4, 0, 1, 3))
    assert not caplog.records


def test_tables_of_devices_of_a_machine(tmp_path):
    where = DeviceMap(None, ("cuda:0", "cuda:0", "cpu"), None, 4)
    assert where.devices == ("cuda:0", "cpu") and where.numbers == range(4, 7)
    folder = write_tiny_model(tmp_path / "m", tokenizer=False, num_hidden_layers=8)
    config, (parts,) = parts_on(folder, where)
    on_card = [spec.name for spec in parts.specs() if spec.device == "cuda:0"]
    assert {name.split(".")[2] for name in on_card} == {"4", "5"}
    cached = [(spec.name, spec.device) for spec in cache_specs(config, 1, Q4, where)]
    assert cached[0] == ("cache.4.k_codes", "cuda:0") and cached[-1][1] == "cpu"
    assert cached[-1][0].startswith("cache.6.")
    assert parts.layer_places() == [("cuda:0", 0), ("cuda:0", 1), ("cpu", 0)]
