"""What is measured of blocks, the file that it is kept in, and the memory that it takes."""

from __future__ import annotations

import json

import pytest
import torch

from exl_loader.convert import conversion, convert, measurement
from exl_loader.convert.activations import LayerRunner, first_products
from exl_loader.convert.error_feedback import PreparedHessian
from exl_loader.convert.measurement import (
    BlockMeasurement,
    Combination,
    Way,
    combine,
    mean_divergences,
    measure_block,
)
from exl_loader.convert.measurement_file import as_json, from_json, read_measurement
from exl_loader.convert.mixes import Mix
from exl_loader.convert.reservation import ConversionSizes, reserve
from exl_loader.convert.roles import block_roles, layer_blocks
from exl_loader.convert.source import Source
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings
from support.builds import Recorder
from support.hf_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"calibration_rows": 3, "calibration_row_len": 32}
NARROW, WIDE = Mix((3,), (64,)), Mix((8,), (64,))


@pytest.fixture(autouse=True)
def _reference_operations_and_few_mixes(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    monkeypatch.setattr(conversion, "MOST_BITS", 16)
    monkeypatch.setattr(measurement, "MIXES", [NARROW, measurement.PROBE, WIDE])


@pytest.fixture
def folder(tiny_model):
    return tiny_model()


@pytest.fixture
def source(folder):
    found = Source(folder)
    yield found
    found.close()


def random_rows(count: int, row_len: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 259, (count, row_len), generator=generator).tolist()


def blocks_of(source: Source) -> dict:
    found = {}
    for index, layer in enumerate(source.parts.layers):
        found |= layer_blocks(index, layer)
    return found


def test_layers_run_as_in_the_engine(source, folder):
    """Hidden states after all layers give the logits of a loaded model."""
    import exl_loader

    rows = random_rows(3, 40)
    runner = LayerRunner(source, 40)
    states = runner.embed(rows)
    for index in range(len(source.parts.layers)):
        runner.run(runner.load(index), states)
    runner.load_head()
    with exl_loader.load(folder, ctx_size=256, cache_type="fp32") as model:
        for row, state in zip(rows, states, strict=True):
            difference = runner.logits(state) - model.prompt_logits(row)
            assert difference.abs().max() < 1e-4


def test_beginnings_of_texts_run_as_in_whole_texts(source):
    runner = LayerRunner(source, 40)
    whole = runner.embed(random_rows(3, 40))
    beginnings = whole[:, :17].clone()
    for index in range(len(source.parts.layers)):
        loaded = runner.load(index)
        runner.run(loaded, beginnings)
        runner.run(loaded, whole)
    torch.testing.assert_close(beginnings, whole[:, :17], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "gpt2", "cohere-norms", "gemma2"])
def test_blocks_add_up_to_the_layer(name, tmp_path):
    """Blocks run alone on their recorded inputs, whatever the order of the layer's parts."""
    make_model(name, seed=3, folder=tmp_path / "m", num_hidden_layers=1)
    source = Source(tmp_path / "m")
    runner = LayerRunner(source, 16)
    states = runner.embed(random_rows(2, 16))
    loaded = runner.load(0)
    _, inputs = runner.record(loaded, states, 2)
    layer = loaded.layer
    added = torch.zeros_like(states)
    for block, x, output_norm in (
        (layer.attention, inputs["attention"], getattr(layer, "attn_output_norm", None)),
        (layer.mlp, inputs["mlp"], getattr(layer, "mlp_output_norm", None)),
    ):
        out = runner.run_block(loaded, block, x)
        if output_norm is not None:
            rows = out.flatten(0, 1)
            output_norm.run(runner.ops, rows, rows)
        added += out
    after = states.clone()
    runner.run(loaded, after)
    torch.testing.assert_close(states + added, after, rtol=1e-4, atol=1e-4)
    source.close()


def test_products_of_the_input_are_computed_once(source, monkeypatch):
    """With kept products a block gives the same bits, in fewer products of a step."""
    runner, counted = LayerRunner(source, 40), []
    linear = runner.ops._ops.linear

    def count(*args):
        counted.append(args)
        linear(*args)

    monkeypatch.setattr(runner, "_rows_at_once", 2)
    loaded = runner.load(0)
    x = torch.randn(5, 40, source.config.hidden_size, generator=torch.Generator().manual_seed(1))
    block = loaded.layer.mlp
    products = first_products(block)
    up = block.up.spec
    half = {up.name: torch.full((up.in_features, up.out_features), 0.5, dtype=torch.float16)}
    for replaced, expected_products in (({}, 3), ({}, 1), (half, 2), ({}, 1)):
        loaded.replace(replaced)
        expected = runner.run_block(loaded, block, x)
        counted.clear()
        with monkeypatch.context() as patch:
            patch.setattr(runner.ops._ops, "linear", count)
            assert torch.equal(runner.run_block(loaded, block, x, products), expected)
        # In three steps.
        assert len(counted) == 3 * expected_products
        loaded.restore(replaced)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "cohere-norms", "gemma2"])
def test_recorded_inputs_are_those_of_the_whole_layer(name, tmp_path):
    """Whether outputs are asked for or the last product is left out."""
    make_model(name, seed=3, folder=tmp_path / "m", num_hidden_layers=1)
    source = Source(tmp_path / "m")
    runner = LayerRunner(source, 16)
    states = runner.embed(random_rows(3, 16))
    loaded, outputs = runner.load(0), torch.empty_like(states)
    found, _ = runner.record(loaded, states)
    expected, _ = runner.record(loaded, states, outputs=outputs)
    assert found.keys() == expected.keys()
    for key, hessian in found.items():
        assert torch.equal(hessian.mean(), expected[key].mean())
    runner.run(loaded, states)
    assert torch.equal(outputs, states)
    source.close()


def test_a_block_is_measured_at_its_output(source):
    runner = LayerRunner(source, 32)
    states = runner.embed(random_rows(4, 32))
    loaded = runner.load(0)
    hessians, inputs = runner.record(loaded, states, 4)
    prepared = {
        linear.name: PreparedHessian(hessians[group[0].name])
        for group in loaded.layer.input_groups() for linear in group
    }
    block, steps = loaded.layer.mlp, []
    ways, probe, probe_error = measure_block(
        runner, source, loaded, block, prepared, inputs["mlp"], steps.append
    )
    assert sum(steps) == measurement.count_steps(block) == 9
    assert probe.keys() == {linear.name for linear in loaded.layer.linears} & {
        f"model.layers.0.mlp.{role}" for role in ("gate_proj", "up_proj", "down_proj")
    }
    # The errors of matrices nearly add up: of the probe, and of nothing but 8 bits.
    by_mixes = {tuple(way.mixes.values()): way.error for way in ways}
    assert by_mixes[(WIDE,) * 3] < 1e-3 < probe_error
    assert min(ways, key=lambda way: way.size).mixes == dict.fromkeys(block_roles(block), NARROW)
    expected = runner.run_block(loaded, block, inputs["mlp"])
    loaded.replace(probe)
    change = runner.run_block(loaded, block, inputs["mlp"]) - expected
    assert probe_error == pytest.approx((change.norm() / expected.norm()).item() ** 2, rel=1e-5)
    # Afterwards the layer has its own weights again.
    loaded.restore(probe)
    assert torch.equal(runner.run_block(loaded, block, inputs["mlp"]), expected)


def test_combinations_take_the_best_step_each_time():
    ways = {
        "up_proj": [Way(10, 8.0, NARROW), Way(20, 1.0, WIDE)],
        "down_proj": [Way(10, 4.0, NARROW), Way(20, 2.0, WIDE)],
    }
    found = combine(ways)
    assert [(one.size, one.error) for one in found] == [(20, 12.0), (30, 5.0), (40, 3.0)]
    assert found[1].mixes == {"up_proj": WIDE, "down_proj": NARROW}


def test_divergences_are_those_of_the_definition(source):
    runner = LayerRunner(source, 32)
    runner.load_head()
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 32, source.config.hidden_size, generator=generator)
    other = states + 0.1 * torch.randn(states.shape, generator=generator)
    found = mean_divergences(runner, states, {"same": states, "other": other})
    logs, others = (
        torch.log_softmax(runner.logits(x.flatten(0, 1)).double().clone(), -1)
        for x in (states, other)
    )
    assert found["same"] == pytest.approx(0, abs=1e-6)
    expected = (logs.exp() * (logs - others)).sum(-1).mean().item()
    assert found["other"] == pytest.approx(expected, rel=1e-3) and expected > 1e-4


def test_every_counted_task_of_a_conversion_reaches_its_count(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "LOGITS_ROWS", 40)
    recorder = Recorder()
    convert(folder, tmp_path / "exl2", bits=7, progress=recorder, **FEW)
    begun = [rest for kind, *rest in recorder.calls if kind == "start"]
    totals = {name: total for name, total, _ in begun if total is not None}
    done = dict.fromkeys(totals, 0)
    for kind, name, *rest in recorder.calls:
        if kind == "advance" and name in done:
            done[name] += rest[0]
    assert done == totals
    # Of 3 rows of 32 tokens.
    assert totals["comparing predictions"] == 3


def test_a_measurement_is_reused_for_other_sizes(folder, tmp_path, monkeypatch):
    small = convert(folder, tmp_path / "small", bits=7, **FEW)
    monkeypatch.setattr(conversion, "measure_block", None)
    kept = tmp_path / "small" / "measurement.json"
    again = convert(folder, tmp_path / "again", bits=7, measurement=kept, **FEW)
    large = convert(folder, tmp_path / "large", bits=9, measurement=kept, **FEW)
    assert again.layers == small.layers
    for name in ("output.safetensors", "measurement.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    assert small.bits_per_weight <= 7 < large.bits_per_weight <= 9


def test_the_file_has_the_keys_of_exllamav2(folder, tmp_path):
    convert(folder, tmp_path / "exl2", bits=9, **FEW)
    values = json.loads((tmp_path / "exl2" / "measurement.json").read_text())
    assert values.keys() == {"measurement", "last_module_idx", "exl_loader"}
    assert list(values["measurement"]) == [
        f"model.layers.{i}.{block}" for i in (0, 1) for block in ("self_attn", "mlp")
    ]
    entry = values["measurement"]["model.layers.1.mlp"][0]
    assert entry.keys() == {"accuracy", "total_bits", "gate_proj", "up_proj", "down_proj"}
    assert entry["up_proj"] == {
        "group_size": {"3": 64}, "bits": [3], "bits_prop": [1.0], "scale_bits": 4
    }


def foreign(blocks: dict) -> dict:
    """A file as exllamav2 writes it: integers for shares of 1, and no divergence."""
    ways = [
        {"accuracy": accuracy, "total_bits": 0, "mix": {
            "group_size": sizes, "bits": bits, "bits_prop": shares, "scale_bits": 4}}
        for accuracy, sizes, bits, shares in (
            (0.9, {"3": 64, "2": 64}, [3, 2], [0.1, 0.9]), (0.99, {"8": 128}, [8], [1]),
        )
    ]
    return {"last_module_idx": 6, "measurement": {
        key: [
            {**{name: way[name] for name in ("accuracy", "total_bits")},
             **dict.fromkeys(block_roles(block), way["mix"])}
            for way in ways
        ]
        for key, block in blocks.items()
    }}


def test_a_measurement_of_exllamav2_is_used(source, folder, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(foreign(blocks_of(source))))
    found = read_measurement(tmp_path / "m.json", blocks_of(source))
    first = next(iter(found.values()))
    assert first.divergence is None
    assert first.combinations[0].error == pytest.approx(0.01)
    result = convert(folder, tmp_path / "exl2", bits=5, measurement=tmp_path / "m.json", **FEW)
    assert {mix.bits for mix in result.layers.values()} == {(3, 2), (8,)}


def changed(values: dict, *path, to) -> dict:
    values = json.loads(json.dumps(values))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return values


MLP = ("measurement", "model.layers.1.mlp")
BROKEN = {
    "nothing": (("measurement",), None),
    "no block": (MLP, None),
    "no way": (MLP, []),
    "accuracy": ((*MLP, 0, "accuracy"), "good"),
    "too accurate": ((*MLP, 0, "accuracy"), 1.5),
    "no role": ((*MLP, 0, "up_proj"), None),
    "width": ((*MLP, 0, "up_proj", "bits"), [7]),
    "order": ((*MLP, 0, "up_proj", "bits"), [2, 3]),
    "shares": ((*MLP, 0, "up_proj", "bits_prop"), [0.5, 0.1]),
    "group": ((*MLP, 0, "up_proj", "group_size"), {"3": 64, "2": 48}),
    "scales": ((*MLP, 0, "up_proj", "scale_bits"), 8),
    "another model": (("measurement", "model.layers.2.mlp"), []),
    "divergence": (("exl_loader",), {"divergence": {"model.layers.1.mlp": -1}}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_measurement_is_refused(source, fault):
    path, value = BROKEN[fault]
    values = changed(foreign(blocks_of(source)), *path, to=value)
    with pytest.raises(InvalidSettings, match="file"):
        from_json(values, blocks_of(source), "file")


def test_parallel_layers_have_one_entry(tmp_path):
    make_model("cohere-norms", seed=3, folder=tmp_path / "m", num_hidden_layers=1)
    source = Source(tmp_path / "m")
    mixes = {key: dict.fromkeys(block_roles(b), WIDE) for key, b in blocks_of(source).items()}
    values = as_json({
        key: BlockMeasurement([Combination(1, 0.25, roles)], 2.0) for key, roles in mixes.items()
    })
    (entry,) = values["measurement"].values()
    assert entry.keys() == {"attn", "mlp"} and entry["attn"][0]["accuracy"] == 0.5
    found = from_json(json.loads(json.dumps(values)), blocks_of(source), "file")
    assert found["model.layers.0.parallel_decoder/mlp"].divergence == 2.0
    source.close()


def test_the_reservation_is_announced_and_kept(folder, tmp_path, monkeypatch):
    announced = []
    result = convert(folder, tmp_path / "exl2", bits=9, announce=announced.append, **FEW)
    (reservation,) = announced
    expected = sum(reservation.output.values())
    # What the estimate leaves out: norms, and the header of the file.
    assert 0 <= result.file_bytes - expected < 20_000
    assert "memory:" in str(reservation) and "float16" in str(reservation)
    monkeypatch.setattr(type(reservation), "memory_bytes", 1 << 60)
    with pytest.raises(InsufficientMemory, match="conversion"):
        convert(folder, tmp_path / "other", bits=9, **FEW)
    assert not list(tmp_path.glob("other*"))


def test_every_row_more_takes_its_hidden_states(source, tmp_path):
    def memory(rows: int) -> dict[str, int]:
        sizes = ConversionSizes(
            parts=source.parts, rows=rows, measured_rows=8, probe_tokens=128, row_len=64, bits=4,
            head=NARROW, has_measurement=True,
        )
        return reserve(sizes, tmp_path / "x").memory

    few, many = memory(300), memory(400)
    hidden = source.config.hidden_size
    # The second copy is the one that is written.
    assert many.pop("hidden states") - few.pop("hidden states") == 2 * 100 * 64 * hidden * 4
    assert many == few
