import math

import pytest

from exl_loader.checkpoint.rope import ROPE_TYPES, RopeConfig, inv_freq, parse_ropes
from exl_loader.utils.errors import InvalidConfig, InvalidSettings
from exl_loader.utils.json_keys import Keys

HEAD_DIM = 64
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 1024,
    "short_factor": [1 + i / 100 for i in range(HEAD_DIM // 2)],
    "long_factor": [1 + i / 7 for i in range(HEAD_DIM // 2)],
}
SCHEMES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3-strong": LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.0},
    "yarn": YARN,
    "yarn-whole": YARN | {"truncate": False},
    "yarn-mscale": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn-attention": YARN | {"attention_factor": 1.75},
    "yarn-betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-ratio": YARN | {"factor": None},
    "longrope": LONGROPE,
    "longrope-factor": LONGROPE | {"factor": 3.0},
    "longrope-attention": LONGROPE | {"attention_factor": 1.19},
    "longrope-no-stretch": LONGROPE | {"factor": 1.0},
}


def parse(values, head_dim=HEAD_DIM, max_position_embeddings=4096, type_names=None):
    keys = Keys(values, "config.json")
    (rope,) = parse_ropes(keys, head_dim, max_position_embeddings, type_names)
    return rope


def plain(theta=10000.0, dim=HEAD_DIM):
    return RopeConfig("default", theta, dim, 4096, 4096)


@pytest.mark.parametrize("rope_len", [1, 1024, 1025, 4096, 4097, 20000])
@pytest.mark.parametrize("theta", [10000.0, 5e5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_transformers(scheme, theta, rope_len):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = {"rope_theta": theta} | SCHEMES[scheme]
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=HEAD_DIM, max_position_embeddings=4096,
        rope_parameters=dict(values),
    )
    if values["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        compute = ROPE_INIT_FUNCTIONS[values["rope_type"]]
        expected, factor = compute(config, "cpu", seq_len=rope_len)
    actual, actual_factor = inv_freq(parse({"rope_parameters": values}), rope_len)
    # transformers computes in float32: theta ** x is off by some rounding steps there.
    assert actual == pytest.approx(expected.tolist(), rel=3e-6, abs=0)
    assert actual_factor == pytest.approx(factor, rel=1e-6)


def test_every_scheme_is_compared():
    assert {values["rope_type"] for values in SCHEMES.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_layouts_are_the_same(scheme):
    old = {"rope_theta": 7e4, "rope_scaling": SCHEMES[scheme]}
    new = {"rope_parameters": {"rope_theta": 7e4} | SCHEMES[scheme]}
    nested = {"rope_parameters": {"full_attention": new["rope_parameters"],
                                  "sliding_attention": dict(new["rope_parameters"])}}
    assert parse(old) == parse(new) == parse(nested)


def test_type_is_an_older_name_of_rope_type():
    named = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert parse(named).rope_type == "linear"


def test_phi3_names_and_levels_of_keys():
    scaling = {k: v for k, v in LONGROPE.items() if k != "original_max_position_embeddings"}
    values = {
        "rope_theta": 1e4, "original_max_position_embeddings": 2048,
        "rope_scaling": scaling | {"rope_type": "su"},
    }
    rope = parse(values, type_names={"su": "longrope", "yarn": "longrope"})
    assert (rope.rope_type, rope.original_max_position_embeddings) == ("longrope", 2048)
    with pytest.raises(InvalidConfig, match="su"):
        parse(values)


@pytest.mark.parametrize("partial, rotary_dim", [(1.0, 64), (0.75, 48), (0.5, 32)])
def test_partial_rotation(partial, rotary_dim):
    rope = parse({"rope_theta": 1e4, "partial_rotary_factor": partial})
    assert rope.rotary_dim == rotary_dim
    assert len(inv_freq(rope, 1)[0]) == rotary_dim // 2


def test_longrope_selects_its_factors_once_for_a_length():
    rope = parse({"rope_theta": 1e4, "rope_scaling": LONGROPE})
    assert rope.depends_on_length
    assert inv_freq(rope, 10) == inv_freq(rope, 1024)
    assert inv_freq(rope, 1025) == inv_freq(rope, 9999)
    assert inv_freq(rope, 1024) != inv_freq(rope, 1025)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_alpha_slows_the_slowest_pair_by_alpha_and_keeps_the_fastest(dim):
    before, after = inv_freq(plain(dim=dim), 1)[0], inv_freq(plain(dim=dim), 1, alpha_value=3)[0]
    assert after[0] == before[0] == 1.0
    assert after[-1] == pytest.approx(before[-1] / 3, rel=1e-12)


def test_compress_divides_positions():
    before = inv_freq(plain(), 1)[0]
    assert inv_freq(plain(), 1, compress_pos_emb=4)[0] == pytest.approx([f / 4 for f in before])


@pytest.mark.parametrize("name", ["alpha_value", "compress_pos_emb"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_impossible_options_are_refused(name, value):
    with pytest.raises(InvalidSettings, match=name):
        inv_freq(plain(), 1, **{name: value})


@pytest.mark.parametrize(
    "scaling, named",
    [
        ({"rope_type": "mystery"}, "mystery"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": 5}, "rope_type"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (LONGROPE | {"long_factor": None}, "long_factor"),
        (LONGROPE | {"short_factor": [1.0] * 31}, "31 values"),
        (LONGROPE | {"short_factor": [0.0] * 32}, "short_factor"),
        (LONGROPE | {"short_factor": "1"}, "short_factor"),
        (YARN | {"attention_factor": -1}, "attention_factor"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max"),
        ({"partial_rotary_factor": 0.05}, "3 of a head's 64"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"full_attention": LLAMA3, "sliding_attention": YARN}, "same RoPE settings"),
        ({"full_attention": LLAMA3, "factor": 2.0}, "same RoPE settings"),
    ],
)
def test_bad_settings_are_errors_that_name_the_key(scaling, named):
    with pytest.raises(InvalidConfig, match=named):
        parse({"rope_theta": 1e4, "rope_scaling": scaling})


@pytest.mark.parametrize("theta", [None, 0, 1, -5, "10000", 1e300, 10**400, True])
def test_bad_theta_is_refused(theta):
    with pytest.raises(InvalidConfig, match="rope_theta"):
        parse({"rope_theta": theta})
