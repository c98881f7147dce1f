import json

import pytest

from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.memory.segments import lay_out
from exl_loader.model.builder import build_parts
from exl_loader.model.parts.experts import Experts
from exl_loader.utils.errors import ExlLoaderError, InvalidCheckpoint, UnsupportedFormat
from exl_loader.utils.table import DeviceMap
from support.tiny import CONFIG, tensor_shapes, write_tiny_model

LAYER = "model.layers.1"


def parts_of(folder, device_map=None):
    with Checkpoint.open(folder) as checkpoint:
        return build_parts(ModelConfig.from_dir(folder), checkpoint, device_map)


def rewrite(folder, change):
    """Save the folder's tensors again after `change(tensors)`."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def test_specs_name_every_tensor_once(tiny_model):
    parts = parts_of(tiny_model())
    specs = parts.specs()
    assert {spec.name for spec in specs} == set(tensor_shapes(CONFIG))
    assert all(spec.segment == "weights" and spec.device == "cpu" for spec in specs)
    dtypes = {spec.name: spec.dtype for spec in specs}
    assert dtypes["model.norm.weight"] == "float32"
    assert dtypes["model.embed_tokens.weight"] == dtypes["lm_head.weight"] == "float16"


def test_a_tied_head_has_one_tensor(tiny_model):
    tied = parts_of(tiny_model("tied", tie_word_embeddings=True))
    apart = parts_of(tiny_model("apart"))
    assert tied.embedding.head is tied.head.linear and not [*tied.embedding.specs()]
    assert tied.head.linear.spec.source == "model.embed_tokens"
    table = CONFIG["vocab_size"] * CONFIG["hidden_size"] * 2
    total_tied, total_apart = (sum(s.nbytes for s in b.specs()) for b in (tied, apart))
    assert total_tied == total_apart - table


def test_a_head_of_its_own_wins_over_tying(tiny_model):
    folder = tiny_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    parts = parts_of(folder)
    assert parts.embedding.head is None and parts.head.linear.spec.source == "lm_head"


def test_devices(tiny_model):
    devices = DeviceMap("cuda:0", ("cuda:0", "cuda:1"), "cuda:1")
    parts = parts_of(tiny_model("tied", tie_word_embeddings=True), devices)
    of = {(spec.name, spec.device) for spec in parts.specs()}
    assert ("model.layers.0.mlp.up_proj.weight", "cuda:0") in of
    assert ("model.layers.1.input_layernorm.weight", "cuda:1") in of
    # Both ends need the table: a tied head cannot serve an embedding elsewhere.
    assert {("model.embed_tokens.weight", "cuda:0"), ("lm_head.weight", "cuda:1")} <= of
    assert {key[0] for key in lay_out(parts.specs())} == {"cuda:0", "cuda:1"}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_costs_are_the_bytes_of_every_split(tiny_model, cut, is_tied):
    folder = tiny_model(f"tied-{is_tied}", tie_word_embeddings=is_tied)
    costs = parts_of(folder, DeviceMap.single("cuda:0", 2)).costs()
    layers = ("cuda:0",) * cut + ("cuda:1",) * (2 - cut)
    segments = lay_out(parts_of(folder, DeviceMap(layers[0], layers, layers[-1])).specs())
    found = {device: segment.nbytes for (device, _), segment in segments.items()}
    ranges = {"cuda:0": (0, cut, True, cut == 2), "cuda:1": (cut, 2, True, True)}
    assert found == {device: costs.of_range(*ranges[device]) for device in dict.fromkeys(layers)}


def test_fixture_layers_are_exl2(fixtures_dir):
    parts = parts_of(fixtures_dir / "llama-low")
    assert {linear.spec.format for linear in parts.linears()} == {"exl2"}
    assert len(list(parts.linears())) == 3 * 7 + 1


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.0.self_attn.q_proj.input_scale", True),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", True),
        ("mtp.layers.0.mlp.up_proj.weight", True),
    ],
)
def test_unknown_tensors_are_ignored(tiny_model, caplog, name, warned):
    import torch

    folder = tiny_model()
    before = parts_of(folder).specs()
    rewrite(folder, lambda t: t.update({name: torch.ones(16)}))
    assert parts_of(folder).specs() == before
    assert [name in record.message for record in caplog.records] == [True] * warned


@pytest.mark.parametrize("name", ["lora_A", "lora_B.weight", "lora_a.default.weight"])
def test_an_adapter_among_the_weights_is_refused(tmp_path, name):
    import torch

    folder = write_tiny_model(tmp_path / "m", tokenizer=False)
    name = f"{LAYER}.mlp.up_proj.{name}"
    rewrite(folder, lambda t: t.update({name: torch.ones(4, 4)}))
    with pytest.raises(UnsupportedFormat, match=f"^{name}: an adapter"):
        parts_of(folder)


@pytest.mark.parametrize("name", tensor_shapes(CONFIG))
def test_a_missing_tensor_is_named(name, tmp_path):
    folder = rewrite(write_tiny_model(tmp_path / "m", tokenizer=False), lambda t: t.pop(name))
    with pytest.raises(InvalidCheckpoint, match=name.removesuffix(".weight")):
        parts_of(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", f"{LAYER}.input_layernorm.weight",
             f"{LAYER}.mlp.up_proj.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("change", ["rows", "columns", "dtype"])
def test_a_wrong_shape_or_dtype_is_named(name, change, tiny_model):
    import torch

    changes = {
        "rows": lambda x: x[:-1].contiguous(),
        "columns": lambda x: torch.cat([x, x], dim=-1),
        "dtype": lambda x: x.to(torch.int32),
    }
    folder = rewrite(tiny_model(), lambda t: t.update({name: changes[change](t[name])}))
    with pytest.raises(ExlLoaderError, match=name.removesuffix(".weight")):
        parts_of(folder)


def test_a_config_of_fewer_layers_is_not_this_models(tiny_model):
    folder = tiny_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\..*of 1 layers has, found one norm"):
        parts_of(folder)


def test_a_norm_of_another_architecture_is_refused(tiny_model):
    import torch

    name = f"{LAYER}.self_attn.q_norm.weight"
    folder = rewrite(tiny_model(), lambda t: t.update({name: torch.ones(32)}))
    with pytest.raises(InvalidCheckpoint, match="q_norm.*LlamaForCausalLM"):
        parts_of(folder)


def test_a_required_bias_must_exist(tiny_model):
    folder = tiny_model(architectures=["Qwen2ForCausalLM"])
    with pytest.raises(InvalidCheckpoint, match="q_proj.bias"):
        parts_of(folder)


def test_a_stored_bias_is_read_without_being_required(tiny_model):
    import torch

    name = f"{LAYER}.mlp.down_proj.bias"
    folder = rewrite(tiny_model(), lambda t: t.update({name: torch.zeros(64)}))
    assert name in {spec.name for spec in parts_of(folder).specs()}


def test_experts(tmp_path):
    pytest.importorskip("transformers")
    from support.hf_models import make_model

    make_model("mixtral", 0, tmp_path / "m")
    parts = parts_of(tmp_path / "m")
    mlp = parts.layers[0].mlp
    assert isinstance(mlp, Experts) and len(mlp.experts) == 5
    assert mlp.router.name == "model.layers.0.block_sparse_moe.gate"
    up = mlp.experts[4].up
    assert up.name.endswith("experts.4.w3")
    assert (up.spec.in_features, up.out_features) == (96, 168)
    # A row runs through 2 of the 5.
    layer, expert = parts.layers[0], mlp.experts[4]
    unread = 3 * sum(spec.nbytes for linear in expert.weights() for spec in linear.specs())
    assert layer.read_bytes() == sum(spec.nbytes for spec in layer.specs()) - unread


def test_fused_sources_are_cut_in_order(tmp_path):
    pytest.importorskip("transformers")
    from support.hf_models import make_model

    make_model("phi3-longrope", 0, tmp_path / "m")
    layer = parts_of(tmp_path / "m").layers[0]
    (qkv, (o,), gate_up, (down,)) = layer.input_groups()
    assert [p.spec.rows for p in qkv] == [
        (range(128),), (range(128, 192),), (range(192, 256),)]
    assert [p.spec.rows for p in gate_up] == [(range(168),), (range(168, 336),)]
    assert o.spec.rows is None and down.spec.rows is None
