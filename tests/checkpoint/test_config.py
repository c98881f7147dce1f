import json
import math

import pytest

from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.utils.errors import (
    ExlLoaderError,
    InvalidConfig,
    ModelNotFound,
    UnsupportedArchitecture,
)
from support.exhaustive import rotated

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 700,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}


def parse(changes=None, architecture="LlamaForCausalLM", **more):
    values = LLAMA | {"architectures": [architecture]} | (changes or {}) | more
    return ModelConfig.from_dict({k: v for k, v in values.items() if v != "absent"})


def write(folder, text, name="config.json"):
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def test_fixtures_of_both_layouts(fixtures_dir):
    new = ModelConfig.from_dir(fixtures_dir / "llama-low")
    old = ModelConfig.from_dir(fixtures_dir / "llama-mid")
    assert (new.ropes[0].rope_theta, old.ropes[0].rope_theta) == (10000.0, 500000.0)
    assert new.quantization["quant_method"] == old.quantization["quant_method"] == "exl2"
    assert (new.head_dim, new.num_key_value_heads, new.vocab_size) == (64, 2, 500)
    assert (new.bos_token_id, new.eos_token_ids) == (1, (2,))


def test_llama_2_layout_with_few_keys():
    config = parse(num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 64)
    assert config.ropes[0].rope_theta == 10000.0
    assert config.attention_multiplier == 64**-0.5
    assert config.layer_sliding_windows == (0,) * 4
    assert not config.tie_word_embeddings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_equal_transformers(architecture):
    """A folder may leave out keys for which its architecture has a default."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    entry = ARCHITECTURES[architecture]
    config_class = next(
        (found for found in auto.CONFIG_MAPPING.values() if found.model_type == entry.model_type),
        None,
    )
    if config_class is None:
        pytest.skip("transformers has no such class")
    reference = config_class()

    def own_name(name):
        names = entry.keys.get(name, name)
        return names if isinstance(names, str) else names[0]

    def theirs(name):
        objects = (reference, *(getattr(reference, section) for section in entry.sections))
        values = (getattr(found, own_name(name), None) for found in objects)
        value = next((value for value in values if value is not None), None)
        if name == "num_key_value_heads" and entry.multi_query is not None:
            return 1 if getattr(reference, entry.multi_query) else num_heads
        if name == "intermediate_size" and value is None:
            return entry.default_width * theirs("hidden_size")
        if name == "bos_token_id" and value is not None and value >= reference.vocab_size:
            return None
        return num_heads if name == "num_key_value_heads" and value is None else value

    num_heads = theirs("num_attention_heads")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")
    values = {own_name(name): theirs(name) for name in sizes}
    if theirs("hidden_size") % num_heads and theirs("head_dim") is None:
        # The class's own defaults do not go together, so every folder has a head_dim.
        values["head_dim"] = 128
    config = ModelConfig.from_dict({"architectures": [architecture]} | values)
    same = ("num_key_value_heads", "max_position_embeddings",
            "tie_word_embeddings", "bos_token_id", *sizes)
    assert {n: getattr(config, n) for n in same} == {n: theirs(n) for n in same}
    # DBRX and OPT have PyTorch's default and no key for it.
    assert config.norm_eps == (theirs("rms_norm_eps") or 1e-5)
    head_dim = getattr(reference, "head_dim", None)
    assert config.head_dim == head_dim or head_dim is None
    eos = reference.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    in_vocabulary = [i for i in ids if i is not None and i < config.vocab_size]
    assert config.eos_token_ids == tuple(in_vocabulary)
    if hasattr(reference, "rotary_dim"):
        assert config.ropes[0].rotary_dim == reference.rotary_dim
    else:
        _compare_ropes(config, getattr(reference, "rope_parameters", None))
    windows = getattr(reference, "layer_types", None)
    if windows is not None:
        sliding = tuple(name == "sliding_attention" for name in windows)
        assert tuple(w > 0 for w in config.layer_sliding_windows) == sliding
    assert max(config.layer_sliding_windows) == (getattr(reference, "sliding_window", None) or 0)


def test_own_lengths_of_other_keys():
    """Command R has two lengths; Gemma 3 and OLMo 3 state theirs after scaling."""
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 352,
             "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    cohere = {"max_position_embeddings": 8192, "model_max_length": 131072}
    gemma = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    olmo = {"max_position_embeddings": 65536, "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}}
    for name, values, length in (
        ("CohereForCausalLM", cohere, 131072), ("LlamaForCausalLM", cohere, 8192),
        ("Gemma3ForCausalLM", gemma, 131072), ("Olmo3ForCausalLM", olmo, 65536),
    ):
        config = ModelConfig.from_dict({"architectures": [name]} | sizes | values)
        assert config.own_length == length, name


def _compare_ropes(config, reference):
    """Compare the rotary embeddings with those of transformers, which may be nested."""
    if not config.ropes:
        assert not reference and config.learned_positions == config.max_position_embeddings
        return
    nested = [reference.get(name) for name in ("full_attention", "sliding_attention")]
    expected = nested if nested[0] else [reference]
    assert [rope.rope_theta for rope in config.ropes] == list(
        dict.fromkeys(parameters["rope_theta"] for parameters in expected)
    )
    partial = expected[0].get("partial_rotary_factor", 1.0)
    assert config.ropes[0].rotary_dim == int(config.head_dim * partial)


@pytest.mark.parametrize(
    "architecture, changes, windows",
    [
        ("LlamaForCausalLM", {"sliding_window": 64}, (0, 0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 64}, (64,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (0,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("MixtralForCausalLM", {"sliding_window": 64}, (64,) * 4),
        ("MixtralForCausalLM", {}, (0,) * 4),
        ("Phi3ForCausalLM", {"sliding_window": 64}, (64,) * 4),
        ("Phi3ForCausalLM", {}, (0,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "max_window_layers": 0}, (0,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 64, "max_window_layers": 3, "use_sliding_window": True},
            (0, 0, 0, 64),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
            },
            (64, 64, 0, 0),
        ),
        ("Gemma2ForCausalLM", {"sliding_window": 64}, (64, 0, 64, 0)),
        (
            "Gemma2ForCausalLM",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
            (0, 0, 0, 64),
        ),
        ("Gemma2ForCausalLM", {"sliding_window": None}, (0,) * 4),
    ],
)
def test_windows(architecture, changes, windows):
    config = parse(changes, architecture)
    assert config.layer_sliding_windows == windows


def test_gemma2_scalars():
    config = parse(architecture="Gemma2ForCausalLM", query_pre_attn_scalar=144,
                   attn_logit_softcapping=None)
    assert config.attention_multiplier == 144**-0.5
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (0.0, 30.0)
    assert (config.hidden_act, config.tie_word_embeddings) == ("gelu_tanh", True)


def test_end_tokens_come_from_both_files(tmp_path):
    write(tmp_path, LLAMA | {"eos_token_id": [2, 7]})
    write(tmp_path, {"eos_token_id": [7, 9, 2000]}, "generation_config.json")
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize(
    "ids, expected", [(5, (5,)), (None, ()), ([], ()), ([3, 3], (3,)), (-1, ()), (1000, ())]
)
def test_end_tokens_outside_the_vocabulary_cannot_occur(ids, expected):
    assert parse(eos_token_id=ids).eos_token_ids == expected


def test_no_bos():
    assert parse(bos_token_id=None).bos_token_id is None


@pytest.mark.parametrize(
    "names, model_type, expected",
    [
        (["Unknown", "Qwen2ForCausalLM"], None, "Qwen2ForCausalLM"),
        (["LLaMAForCausalLM"], None, "LlamaForCausalLM"),
        (None, "phi3", "Phi3ForCausalLM"),
        ([], "qwen3", "Qwen3ForCausalLM"),
        (["MistralModel"], "mistral", "MistralForCausalLM"),
        (["Gemma2Model"], None, "Gemma2ForCausalLM"),
        (["SomethingModel"], "llama", "LlamaForCausalLM"),
    ],
)
def test_architecture_is_found(names, model_type, expected):
    assert parse(architectures=names, model_type=model_type).architecture == expected


@pytest.mark.parametrize(
    "changes", [{"architectures": ["BertModel"]}, {"architectures": []}, {"architectures": None},
                {"architectures": None, "model_type": "bert"},
                {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
                {"architectures": ["BertModel"], "model_type": "bert"}]
)
def test_unknown_architecture_lists_the_known_ones(changes):
    with pytest.raises(UnsupportedArchitecture) as caught:
        parse(changes)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    "key, value",
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [5]),
        *[
            (key, value)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                        "num_attention_heads")
            for value in (0, -1, 2.0, "256", None, True, [4], 1 << 40, 10**400, "absent")
        ],
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("num_key_value_heads", -2),
        ("num_attention_heads", 3),
        ("head_dim", 0),
        ("head_dim", 1 << 20),
        ("head_dim", 33),
        ("head_dim", 2),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 1 << 31),
        ("max_position_embeddings", None),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", None),
        ("hidden_act", "tanh"),
        ("hidden_act", 3),
        ("hidden_act", None),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", True),
        ("bos_token_id", 1.0),
        ("rope_scaling", "linear"),
        ("rope_theta", "10000"),
        ("quantization_config", "exl2"),
        ("quantization_config", [1]),
    ],
)
def test_bad_values_are_refused(key, value):
    named = {"hidden_size": "hidden_size|num_attention_heads", "head_dim": "head_dim|rotat",
             "num_attention_heads": "num_attention_heads|num_key_value_heads",
             "rope_theta": "rope_theta"}.get(key, key)
    with pytest.raises(InvalidConfig, match=named):
        parse({key: value})


@pytest.mark.parametrize(
    "architecture, changes, named",
    [
        ("MixtralForCausalLM", {"num_local_experts": 0}, "num_local_experts"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("MistralForCausalLM", {"sliding_window": -1}, "sliding_window"),
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma2ForCausalLM", {"layer_types": ["odd_attention"] * 4}, "layer_types"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": math.nan}, "attn_logit_softcapping"),
        ("Gemma2ForCausalLM", {"hidden_activation": "tanh"}, "hidden_activation"),
        ("Qwen2ForCausalLM", {"use_sliding_window": 1}, "use_sliding_window"),
        ("IndexForCausalLM", {"norm_head": 2}, "norm_head"),
        ("FalconForCausalLM", {"ffn_hidden_size": 0}, "ffn_hidden_size"),
        ("Starcoder2ForCausalLM", {"norm_epsilon": -1}, "norm_epsilon"),
    ],
)
def test_bad_values_of_single_architectures(architecture, changes, named):
    with pytest.raises(InvalidConfig, match=named):
        parse(changes, architecture)


@pytest.mark.parametrize(
    "architecture, key, value",
    [
        ("FalconForCausalLM", "alibi", True),
        ("GPT2LMHeadModel", "scale_attn_weights", False),
        ("GPT2LMHeadModel", "scale_attn_by_inverse_layer_idx", True),
        ("GPTBigCodeForCausalLM", "add_cross_attention", True),
    ],
)
def test_what_no_part_computes_is_refused(architecture, key, value):
    named = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    assert parse({key: None}, architecture, **named)
    assert parse({key: not value}, architecture, **named)
    with pytest.raises(UnsupportedArchitecture, match=f"{key} in .*: expected {not value}"):
        parse({key: value}, architecture, **named)


def test_the_width_that_a_config_leaves_out():
    named = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    assert parse({}, "GPT2LMHeadModel", **named).intermediate_size == 256
    assert parse({"n_inner": 40}, "GPT2LMHeadModel", **named).intermediate_size == 40
    with pytest.raises(InvalidConfig, match="intermediate_size"):
        parse({"intermediate_size": None})


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFound, match="nothing there"):
        ModelConfig.from_dir(tmp_path / "missing")
    write(tmp_path, "x", "file")
    with pytest.raises(ModelNotFound, match="a file"):
        ModelConfig.from_dir(tmp_path / "file")


def test_no_config(tmp_path):
    with pytest.raises(ModelNotFound, match="no config.json"):
        ModelConfig.from_dir(tmp_path)
    write(tmp_path, "GGUF", "model.Q4_K_M.gguf")
    with pytest.raises(ModelNotFound, match="GGUF.*Use llama.cpp"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "5", '{"a": NaN}', '{"a": Infinity}', "[" * 200_000, '{"a": 1}}',
     '{"vocab_size": ' + "9" * 5000 + "}"],
)
def test_broken_json(tmp_path, text):
    with pytest.raises(InvalidConfig, match="config.json"):
        ModelConfig.from_dir(write(tmp_path, text))


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InvalidConfig):
        ModelConfig.from_dir(tmp_path)


def test_config_is_a_folder(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidConfig, match="a folder"):
        ModelConfig.from_dir(tmp_path)


def test_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert ModelConfig.from_dir(tmp_path).vocab_size == 1000


def test_broken_generation_config(tmp_path):
    write(write(tmp_path, LLAMA), "{", "generation_config.json")
    with pytest.raises(InvalidConfig, match="generation_config.json"):
        ModelConfig.from_dir(tmp_path)


VALUES = [None, True, -1, 0, 1e300, "x", [], [None], {}, {"a": {}}]


@pytest.mark.parametrize(("architecture", "value"), rotated(sorted(ARCHITECTURES), VALUES))
def test_any_value_for_any_key_is_an_error_or_a_config(architecture, value):
    """Any value of any key gives a configuration or a typed error."""
    arch = ARCHITECTURES[architecture]
    keys = {*LLAMA, *arch.defaults, "rope_scaling", "rope_parameters", "layer_types",
            "quantization_config", "head_dim", "partial_rotary_factor", "attention_bias",
            "original_max_position_embeddings"}
    outcomes = []
    for key in keys:
        try:
            outcomes.append(parse({key: value}, architecture).architecture)
        except ExlLoaderError as error:
            outcomes.append(error.thing)
    assert len(outcomes) == len(keys) and all(outcomes)


@pytest.mark.parametrize(
    ("key", "value", "warned"),
    [("residual_multiplier", 0.22, True), ("residual_multiplier", 1.0, False),
     ("scale_emb", 12, True), ("is_causal", False, True), ("is_causal", True, False),
     ("final_logit_softcapping", 30.0, True), ("attn_logit_softcapping", None, False),
     ("use_qk_norm", True, True), ("no_rope_layers", [1, 1, 0], True), ("clip_qkv", None, False)],
)
def test_keys_of_other_architectures_are_reported(caplog, key, value, warned):
    where = f"config.json of {key} {value}"
    config = ModelConfig.from_dict(LLAMA | {key: value}, where=where)
    assert config == ModelConfig.from_dict(LLAMA)
    assert [f"{where}: LlamaForCausalLM has no use for {key}" in record.message
            for record in caplog.records] == [True] * warned


def test_dbrx_has_its_numbers_in_objects():
    """As databricks/dbrx-instruct has them, where transformers 4 read them."""
    config = ModelConfig.from_dict({
        "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": 6144,
        "n_heads": 48, "n_layers": 40, "max_seq_len": 32768, "vocab_size": 100352,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4,
                       "moe_normalize_expert_weights": 1, "ffn_act_fn": {"name": "silu"}},
    })
    assert (config.num_key_value_heads, config.clip_qkv) == (8, 8.0)
    assert config.ropes[0].rope_theta == 500000
    assert config.experts is not None and config.experts.normalize
    assert (config.experts.count, config.experts.top_k) == (16, 4)
    assert config.intermediate_size == config.experts.intermediate_size == 10752
