"""Recording a step and replaying it, and reading the weights of parts."""

import pytest
import torch

from exl_loader.backends.recorder import Recorder
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.model.builder import build_parts
from exl_loader.model.parts.part import Loading
from exl_loader.utils.errors import InvalidCheckpoint
from support.model_builder import build_model
from support.tiny import write_tiny_model


def test_a_recorder_runs_nothing_until_it_is_replayed():
    recorder, ops = Recorder(), ReferenceOps()
    x = torch.ones(2, 3)
    recorder.add(x, x)
    recorder.softcap(x, 1.5)
    prepared = ops.prepare(recorder.calls)
    assert torch.equal(x, torch.ones(2, 3)) and not recorder.reads_values
    for call in prepared:
        call()
    assert torch.allclose(x, torch.full((2, 3), 1.5 * torch.tanh(torch.tensor(2 / 1.5)).item()))


def test_a_function_of_the_steps_values_runs_in_every_replay():
    recorder, ops, seen = Recorder(), ReferenceOps(), []
    recorder.call(seen.append)
    (prepared,) = ops.prepare(recorder.calls)
    assert recorder.reads_values and seen == []
    prepared()
    prepared()
    assert seen == [ops, ops]


def test_decoding_replays_one_recording(tiny_model_dir, monkeypatch):
    model, cache = build_model(tiny_model_dir, ReferenceOps())
    sequence = cache.acquire(20)
    model.forward([(sequence, [3])])
    monkeypatch.setattr(model._local, "_record", None)
    for _ in range(3):
        model.forward([(sequence, [4])])
    assert sequence.past_len == 4


@pytest.fixture
def opened(tmp_path):
    """Open a tiny model: its parts, its checkpoint, and memory for its weights."""

    def open_model(**config):
        folder = write_tiny_model(tmp_path / "m", tokenizer=False, **config)
        checkpoint = Checkpoint.open(folder)
        parts = build_parts(ModelConfig.from_dir(folder), checkpoint)
        views = {
            spec.name: torch.full(spec.shape, 7, dtype=getattr(torch, spec.dtype))
            for spec in parts.specs()
        }
        return parts, checkpoint, views

    return open_model


@pytest.mark.parametrize("tied", [False, True])
def test_progress_counts_every_byte_of_the_table(opened, tied):
    parts, checkpoint, views = opened(tie_word_embeddings=tied)
    counted = []
    parts.load(checkpoint, views, {"cpu": ReferenceOps()}, counted.append)
    assert sum(counted) == sum(spec.nbytes for spec in parts.specs())
    assert len(list(parts.linears())) == 2 * 7 + 1
    checkpoint.close()


def test_the_embedding_is_as_in_the_file(opened):
    parts, checkpoint, views = opened(vocab_size=5000)
    parts.load(checkpoint, views, {"cpu": ReferenceOps()})
    assert torch.equal(parts.embedding.table, checkpoint.read("model.embed_tokens.weight"))
    checkpoint.close()


def test_norm_offsets_are_added_to_stored_weights(opened):
    parts, checkpoint, views = opened()
    norm = parts.head.norm
    norm.offset = 1.0
    norm.load(Loading(checkpoint, views, {}))
    assert torch.equal(norm.weight, checkpoint.read("model.norm.weight").float() + 1)
    checkpoint.close()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_values_are_refused(name, value, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny_model(tmp_path / "m", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=name):
        build_model(folder, ReferenceOps())
