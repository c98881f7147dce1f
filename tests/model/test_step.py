
import pytest

from exl_loader.backends.base import Batch
from exl_loader.backends.cpu import backend
from exl_loader.cache.layout import CacheType
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.model.builder import build_parts
from exl_loader.model.parts.part import StepViews, merged
from exl_loader.model.step import workspace_specs
from exl_loader.utils.table import DeviceMap

FP16 = CacheType.parse("fp16")


@pytest.fixture
def parts(tiny_model_dir):
    with Checkpoint.open(tiny_model_dir) as checkpoint:
        return build_parts(ModelConfig.from_dir(tiny_model_dir), checkpoint)


def shapes(parts, **options):
    specs = workspace_specs(parts.stages(), **({"ctx_size": 1000, "cache_type": FP16} | options))
    assert all(spec.segment == "workspace" for spec in specs)
    return {spec.name: spec.shape for spec in specs}


def test_shapes(parts):
    found = shapes(parts, chunk_size=48, max_batch_size=3, logits_rows=16)
    assert found["page_table"] == (3, 4)
    assert found["x"] == (48, 64) and found["gate"] == (48, 96) and found["k"] == (48, 32)
    assert found["logits"] == (16, 288)
    assert "expert_x" not in found


def test_every_text_of_a_batch_has_a_row_of_logits(parts):
    assert shapes(parts, max_batch_size=40, logits_rows=8)["logits"] == (40, 288)


def test_the_head_needs_its_tensors_on_its_device_only(tiny_model_dir):
    devices = DeviceMap("cuda:0", ("cuda:0", "cuda:1"), "cuda:1")
    with Checkpoint.open(tiny_model_dir) as checkpoint:
        config = ModelConfig.from_dir(tiny_model_dir)
        parts = build_parts(config, checkpoint, devices)
    specs = workspace_specs(parts.stages(), ctx_size=256, cache_type=FP16)
    assert [s.device for s in specs if s.name == "logits"] == ["cuda:1"]
    assert [s.device for s in specs if s.name == "x"] == ["cuda:0", "cuda:1"]


def test_scratch_is_the_largest_of_all_operations(parts, monkeypatch):
    asked = []

    def linear(rows, in_features):
        asked.append((rows, in_features))
        return 100 * in_features

    monkeypatch.setattr(backend, "dense_scratch_bytes", linear)
    monkeypatch.setattr(backend, "attention_scratch_bytes", lambda *args: 7)
    assert shapes(parts, chunk_size=48, logits_rows=16)["scratch"] == (9600,)
    assert set(asked) == {(48, 64), (48, 96), (16, 64)}
    monkeypatch.setattr(backend, "attention_scratch_bytes", lambda *args: 10**6)
    assert shapes(parts)["scratch"] == (10**6,)


def test_fewer_rows_are_the_first_rows(parts):
    import torch

    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in workspace_specs(parts.stages(), ctx_size=256, cache_type=FP16, chunk_size=16)
    }
    batch = Batch(tensors["positions"][:5], *(torch.zeros(1, dtype=torch.int32),) * 3, 5)
    views = StepViews(tensors, batch, 64)
    views.view("q", 5, 2, 32)[4, 1, 31] = 1.0
    assert tensors["q"][4, 63] == 1.0 and views.view("q", 10, 32)[9, 31] == 1.0
    assert views.x.shape == (5, 64) and views.max_rows == 16


def test_the_same_view_is_the_same_object():
    """Cards join operations that are given one tensor, and know it by identity."""
    import torch

    tensors = {name: torch.zeros(4, 6) for name in ("x", "h", "scratch", "q")}
    rows = torch.zeros(2, dtype=torch.int32)
    views = StepViews(tensors, Batch(rows, rows, rows, rows, 2), 6)
    assert views.view("q", 2, 6) is views.view("q", 2, 6)
    assert views.view("q", 4, 3) is not views.view("q", 2, 6)


def test_layers_share_the_largest_tensor_of_a_name():
    small, wide = {"q": ("float32", (4, 6))}, {"q": ("float32", (4, 9)), "k": ("int32", (4,))}
    expected = {"q": ("float32", (4, 9)), "k": ("int32", (4,))}
    assert merged([small, wide]) == merged([wide, small]) == expected
