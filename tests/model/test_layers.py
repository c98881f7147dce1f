"""Recording a step and replaying it, and the weights that go into a layer."""

import pytest

torch = pytest.importorskip("torch")

from exl_loader.backends.reference.ops import ReferenceOps  # noqa: E402
from exl_loader.checkpoint import Checkpoint  # noqa: E402
from exl_loader.checkpoint.config import ModelConfig  # noqa: E402
from exl_loader.model.blueprint import Blueprint  # noqa: E402
from exl_loader.model.layers import Recorder  # noqa: E402
from exl_loader.model.weights import load_weights  # noqa: E402
from exl_loader.utils.errors import InvalidCheckpoint  # noqa: E402
from support.model_builder import build_model  # noqa: E402
from support.tiny import write_tiny_model  # noqa: E402


def test_a_recorder_runs_nothing_until_it_is_replayed():
    ops = Recorder(ReferenceOps())
    x = torch.ones(2, 3)
    ops.add(x, x)
    ops.softcap(x, 1.5)
    assert torch.equal(x, torch.ones(2, 3))
    for call in ops.calls:
        call()
    assert torch.allclose(x, torch.full((2, 3), 1.5 * torch.tanh(torch.tensor(2 / 1.5)).item()))


def test_operations_may_prepare_their_calls():
    class Binding(ReferenceOps):
        def bind(self, operation, *args):
            return lambda: log.append((operation, args))

    log = []
    ops = Recorder(Binding())
    ops.add(1, 2)
    assert log == []
    ops.calls[0]()
    assert log == [("add", (1, 2))]


def test_decoding_replays_one_recording(tiny_model_dir, monkeypatch):
    model, cache = build_model(tiny_model_dir, ReferenceOps())
    sequence = cache.acquire(20)
    model.forward([(sequence, [3])])
    monkeypatch.setattr(model, "_record", None)
    for _ in range(3):
        model.forward([(sequence, [4])])
    assert sequence.past_len == 4


@pytest.fixture
def opened(tmp_path):
    def open_model(**config):
        folder = write_tiny_model(tmp_path / "m", tokenizer=False, **config)
        checkpoint = Checkpoint.open(folder)
        blueprint = Blueprint.from_checkpoint(ModelConfig.from_dir(folder), checkpoint)
        views = {
            spec.name: torch.full(spec.shape, 7, dtype=getattr(torch, spec.dtype))
            for spec in blueprint.specs()
        }
        return blueprint, checkpoint, views

    return open_model


@pytest.mark.parametrize("tied", [False, True])
def test_progress_counts_every_byte_of_the_table(opened, tied):
    blueprint, checkpoint, views = opened(tie_word_embeddings=tied)
    counted = []
    weights = load_weights(blueprint, checkpoint, views, {"cpu": ReferenceOps()}, counted.append)
    assert sum(counted) == sum(spec.nbytes for spec in blueprint.specs())
    assert len(weights.linears) == 2 * 7 + 1
    checkpoint.close()


def test_embedding_is_the_files(opened):
    blueprint, checkpoint, views = opened(vocab_size=5000)
    weights = load_weights(blueprint, checkpoint, views, {"cpu": ReferenceOps()})
    assert torch.equal(weights.embedding, checkpoint.read("model.embed_tokens.weight"))
    checkpoint.close()


def test_norm_offsets_are_folded_in(opened):
    blueprint, checkpoint, views = opened()
    gemma = blueprint.norm.__class__(blueprint.norm.spec, 1.0)
    shifted = Blueprint(**(vars(blueprint) | {"norm": gemma}))
    weights = load_weights(shifted, checkpoint, views, {"cpu": ReferenceOps()})
    stored = checkpoint.read("model.norm.weight").float()
    assert torch.equal(weights.norms["model.norm.weight"], stored + 1)
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
