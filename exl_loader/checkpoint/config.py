"""`config.json` as one frozen, validated record, in either of Hugging Face's layouts.

Everything after this module multiplies these numbers without looking at them again, so
each is checked here: type, range, and that they agree with each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.errors import (
    ModelNotFound,
)
from ..utils.json_keys import Keys, read_json_object, read_json_object_if_there
from .architectures.fields import ACTIVATIONS, Architecture, Formula
from .model_class import chosen_architecture, text_part
from .own_keys import check_fixed, own_keys_of
from .rope import MAX_POSITIONS, RopeConfig, parse_ropes

# Several times the largest models there are: what is beyond is damage, not a model.
GGUF_REMEDY = "Use llama.cpp for it, in the web UI the loader of that name"

MAX_VOCAB_SIZE = 1 << 22
MAX_HIDDEN_SIZE = 1 << 17
MAX_INTERMEDIATE_SIZE = 1 << 19
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_EXPERTS = 1024



@dataclass(frozen=True)
class ExpertsConfig:
    """The numbers of a model's mixtures of experts.

    Args:
        count: experts of a layer. top_k: those of a row.
        intermediate_size: width of an expert.
        shared_size: width of the shared expert; 0 where there is none.
        normalize: the weights of a row's experts sum up to `factor`.
        factor: on these weights.
        dense_layers: layers that have an ordinary MLP.
    """

    count: int
    top_k: int
    intermediate_size: int
    shared_size: int
    normalize: bool
    factor: float
    dense_layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """What a model is, without its weights. Names are Hugging Face's unless noted.

    Args:
        architecture: a key of `architectures.ARCHITECTURES`.
        multimodal_class: class of a model that reads images too, whose language part this is;
            "" for a model of text.
        norm_eps: eps of the norms.
        hidden_act: as `Ops.gate` takes it, such as `silu` or `gelu_tanh`.
        bos_token_id: None where the model has none.
        eos_token_ids: from `config.json`, then what `generation_config.json` adds.
        layer_sliding_windows: `sliding_window` of each layer, 0 where it sees everything.
        embedding_multiplier: factor on embeddings.
        residual_multiplier: factor on what a block adds to the hidden state.
        attention_multiplier: factor on attention scores, before the soft cap.
        logits_multiplier: factor on logits, before the soft cap.
        attn_logit_softcapping, final_logit_softcapping: 0.0 where there is none.
        clip_qkv: queries, keys and values are clipped to -clip_qkv..clip_qkv; 0.0 where not.
        is_parallel: attention and MLP run side by side on the same hidden state.
        has_qk_norms: queries and keys are normalised.
        has_unit_head: see `Architecture.unit_head`.
        experts: the mixtures of experts; None where every layer has an MLP.
        ropes: the rotary embeddings: none with learned positions; a second one where layers with
            a sliding window have their own.
        layer_ropes: each layer's index in `ropes`, None where it has no rotary embedding.
        further_layers: layers after the last one that are not loaded.
        learned_positions: rows of the table of learned positions; 0 without one.
        required_biases: names of linear layers, as in `Architecture`, that must have a bias.
        quantization: `quantization_config`, empty where there is none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layer_sliding_windows: tuple[int, ...]
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_multiplier: float
    attn_logit_softcapping: float
    final_logit_softcapping: float
    clip_qkv: float
    is_parallel: bool
    has_qk_norms: bool
    has_unit_head: bool
    experts: ExpertsConfig | None
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int | None, ...]
    learned_positions: int
    further_layers: int = 0
    multimodal_class: str = ""
    required_biases: frozenset[str] = frozenset()
    quantization: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dir(cls, path: str | Path, as_architecture: str | None = None) -> ModelConfig:
        """Read the configuration of a model folder.

        Args:
            path: the folder.
            as_architecture: see `from_dict`.

        Raises:
            ModelNotFound: there is no such folder, or it has no `config.json`.
            InvalidConfig: the file cannot be read, or a value is missing, of the wrong type,
                absurd, or contradicts another.
            UnsupportedArchitecture: the model is of a kind that is not in `ARCHITECTURES`.
            InvalidSettings: see `from_dict`.
        """
        folder = Path(path)
        # Unlike Path.is_dir, this raises nothing where the name is too long or a folder closed.
        if not os.path.isdir(folder):
            if folder.suffix.lower() == ".gguf" and os.path.exists(folder):
                raise ModelNotFound(
                    str(folder), expected="a model folder with config.json and *.safetensors",
                    actual="a GGUF file, which is llama.cpp's", remedy=GGUF_REMEDY,
                )
            raise ModelNotFound(
                str(folder), expected="a model folder",
                actual="a file" if os.path.exists(folder) else "nothing there",
                remedy="Give the folder that holds config.json and the *.safetensors files",
            )
        config_path = folder / "config.json"
        try:
            values = read_json_object(config_path)
        except ModelNotFound:
            raise _no_model(folder) from None
        generation_path = folder / "generation_config.json"
        generation = read_json_object_if_there(generation_path)
        return cls.from_dict(
            values,
            where=str(config_path),
            generation=Keys(generation, str(generation_path)),
            as_architecture=as_architecture,
        )

    @property
    def own_length(self) -> int:
        """The model's own length in tokens, with the RoPE scaling of its config."""
        # Models of two RoPEs (Gemma 3, OLMo 3) state the length after scaling.
        if len(self.ropes) != 1:
            return self.max_position_embeddings
        return self.ropes[0].own_length

    @property
    def max_ctx_size(self) -> int:
        """The most tokens of a sequence: those for which there are positions."""
        return self.learned_positions or MAX_POSITIONS

    @property
    def num_local_experts(self) -> int:
        """Experts of a layer; 0 where the MLP is dense."""
        return 0 if self.experts is None else self.experts.count

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], *, where: str = "config.json",
        generation: Keys | None = None, as_architecture: str | None = None,
    ) -> ModelConfig:
        """Read the configuration out of parsed JSON; see `from_dir`.

        Args:
            values: the JSON object.
            where: its file, for messages.
            generation: `generation_config.json`.
            as_architecture: the architecture to read a model of an unknown class as, with a
                warning. None refuses such a model.

        Raises:
            InvalidSettings: `as_architecture` is no architecture, or the model's class is
                known and another one.
        """
        values, multimodal_class = text_part(values, where)
        architecture = chosen_architecture(Keys(values, where), as_architecture)
        keys = own_keys_of(values, where, architecture)
        check_fixed(keys, architecture)
        dimensions = _dimensions(keys, architecture)
        head_dim, hidden_size = dimensions["head_dim"], dimensions["hidden_size"]
        num_layers = dimensions["num_hidden_layers"]
        max_position_embeddings = keys.required_integer(
            "max_position_embeddings", 2, MAX_POSITIONS
        )
        if "model_max_length" in keys.defaults:
            longer = keys.integer("model_max_length", 2, MAX_POSITIONS) or 0
            max_position_embeddings = max(max_position_embeddings, longer)
        positions, factors = architecture.positions, architecture.factors
        windows = _layer_sliding_windows(keys, architecture, num_layers)
        ropes: tuple[RopeConfig, ...] = ()
        if positions.learned is None:
            ropes = parse_ropes(
                keys, head_dim, max_position_embeddings, positions.type_names,
                positions.local_theta,
            )

        def factor(formula: Formula) -> float:
            return _factor(keys, formula, hidden_size, num_layers, head_dim)

        qk = architecture.norms.qk
        bos_token_ids = _token_ids(keys, "bos_token_id", dimensions["vocab_size"])
        return cls(
            architecture=architecture.name,
            **dimensions,
            norm_eps=keys.required_number("rms_norm_eps", 0.0, 1.0),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=bool(keys.boolean("tie_word_embeddings")),
            hidden_act=_activation(keys, architecture),
            bos_token_id=bos_token_ids[0] if bos_token_ids else None,
            eos_token_ids=_eos_token_ids(keys, generation, dimensions["vocab_size"]),
            layer_sliding_windows=windows,
            embedding_multiplier=factor(factors.embedding),
            residual_multiplier=factor(factors.residual),
            attention_multiplier=factor(factors.attention),
            logits_multiplier=factor(factors.logits),
            attn_logit_softcapping=keys.number("attn_logit_softcapping", 0.0, 1e6) or 0.0,
            final_logit_softcapping=keys.number("final_logit_softcapping", 0.0, 1e6) or 0.0,
            clip_qkv=(keys.number("clip_qkv", 1e-6, 1e6) or 0.0) if architecture.clip_qkv else 0.0,
            is_parallel=_is_set(keys, architecture.parallel),
            has_qk_norms=qk is not None and (qk.key is None or _is_set(keys, qk.key)),
            has_unit_head=_has_unit_head(keys, architecture),
            experts=_experts(keys, architecture, dimensions),
            ropes=ropes,
            layer_ropes=_layer_ropes(keys, architecture, ropes, windows),
            learned_positions=max_position_embeddings if positions.learned is not None else 0,
            further_layers=_further_layers(keys, architecture),
            multimodal_class=multimodal_class,
            required_biases=_required_biases(keys, architecture),
            quantization=keys.mapping("quantization_config") or {},
        )


def _is_set(keys: Keys, rule: bool | str) -> bool:
    """Return a rule that is a constant, or the value of a config key."""
    return bool(keys.boolean(rule)) if isinstance(rule, str) else rule


def _has_unit_head(keys: Keys, architecture: Architecture) -> bool:
    key = architecture.unit_head
    value = None if key is None else keys.raw(key)
    # Index writes 0 and 1.
    if value not in (None, 0, 1):
        raise keys.fail(str(key), "0 or 1")
    return bool(value)


def _factor(
    keys: Keys, formula: Formula, hidden_size: int, num_layers: int, head_dim: int
) -> float:
    """Compute a factor, in float64. Where it is a square root or a quotient, a model that runs in
    bfloat16 in transformers has it rounded to bfloat16.
    """
    def number(key: str) -> float:
        return keys.required_number(key, 1e-6, 1e6)

    if formula == "hidden_size ** 0.5":
        return float(hidden_size**0.5)
    if formula == "head_dim ** -0.5":
        return float(float(head_dim) ** -0.5)
    if formula == "query_pre_attn_scalar ** -0.5":
        return float(number("query_pre_attn_scalar") ** -0.5)
    if formula == "scale_depth / num_hidden_layers ** 0.5":
        return number("scale_depth") / float(num_layers**0.5)
    if formula == "dim_model_base / hidden_size":
        return number("dim_model_base") / hidden_size
    if formula == "1 / logits_scaling":
        return 1 / number("logits_scaling")
    return 1.0 if formula == "1" else number(formula)


def _no_model(folder: Path) -> ModelNotFound:
    """The error for a folder without config.json, by what it holds instead."""
    try:
        is_gguf = any(name.lower().endswith(".gguf") for name in os.listdir(folder))
    except OSError:
        is_gguf = False
    return ModelNotFound(
        str(folder), expected="a model folder with config.json and *.safetensors",
        actual="GGUF, which is llama.cpp's" if is_gguf else "no config.json",
        remedy=GGUF_REMEDY if is_gguf else
        "Give the model's own folder, or download what is missing",
    )


def _dimensions(keys: Keys, architecture: Architecture) -> dict[str, int]:
    hidden_size = keys.required_integer("hidden_size", 1, MAX_HIDDEN_SIZE)
    num_heads = keys.required_integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS) or num_heads
    if architecture.multi_query is not None and not keys.boolean("new_decoder_architecture"):
        num_kv_heads = 1 if keys.boolean(architecture.multi_query) else num_kv_heads
    if num_heads % num_kv_heads:
        raise keys.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = keys.integer("head_dim", 1, MAX_HEAD_DIM)
    if head_dim is None:
        head_dim, rest = divmod(hidden_size, num_heads)
        if rest or not 1 <= head_dim <= MAX_HEAD_DIM:
            raise keys.fail(
                "hidden_size",
                f"num_attention_heads ({num_heads}) times a head_dim of at most {MAX_HEAD_DIM}",
            )
    return {
        "vocab_size": keys.required_integer("vocab_size", 1, MAX_VOCAB_SIZE),
        "hidden_size": hidden_size,
        "intermediate_size": _width(keys, architecture, hidden_size),
        "num_hidden_layers": keys.required_integer("num_hidden_layers", 1, MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
    }


def _width(keys: Keys, architecture: Architecture, hidden_size: int) -> int:
    """Return the width of the MLP."""
    multiple = architecture.default_width
    if multiple is not None and keys.raw("intermediate_size") is None:
        return multiple * hidden_size
    return keys.required_integer("intermediate_size", 1, MAX_INTERMEDIATE_SIZE)


def _experts(
    keys: Keys, architecture: Architecture, dimensions: dict[str, int]
) -> ExpertsConfig | None:
    mixture = architecture.experts
    if mixture is None:
        return None
    count = keys.required_integer("num_local_experts", 1, MAX_EXPERTS)
    shared_size = 0
    if mixture.shared is not None:
        shared_size = keys.required_integer(mixture.shared_width, 0, MAX_INTERMEDIATE_SIZE)
        if mixture.shared_count is not None:
            shared_size *= keys.required_integer(mixture.shared_count, 0, MAX_EXPERTS)
    factor = None
    if mixture.factor is not None:
        factor = keys.number(mixture.factor, 1e-6, 1e6)
    return ExpertsConfig(
        count=count,
        top_k=keys.required_integer("num_experts_per_tok", 1, count),
        intermediate_size=keys.required_integer(mixture.width, 1, MAX_INTERMEDIATE_SIZE),
        shared_size=shared_size,
        normalize=_normalizes(keys, mixture.normalize),
        factor=1.0 if factor is None else factor,
        dense_layers=_dense_layers(keys, mixture.dense_layers, dimensions["num_hidden_layers"]),
    )


def _further_layers(keys: Keys, architecture: Architecture) -> int:
    key = architecture.further_layers
    return 0 if key is None else keys.integer(key, 0, MAX_LAYERS) or 0


def _normalizes(keys: Keys, rule: bool | str) -> bool:
    """Return whether the weights of chosen experts sum up to 1.

    DBRX has the order of a norm by which they are divided in its key, or null.
    """
    value = keys.raw(rule) if isinstance(rule, str) else rule
    if value not in (None, False, True, 1):
        raise keys.fail(str(rule), "true, false, 1 or null")
    return bool(value)


def _dense_layers(keys: Keys, rule: str, num_layers: int) -> frozenset[int]:
    """Find the layers that have an ordinary MLP; see `Mixture.dense_layers`."""
    if rule == "none":
        return frozenset()
    if rule == "first":
        return frozenset(range(keys.required_integer("first_k_dense_replace", 0, num_layers)))
    if rule == "outside":
        interval = keys.required_integer("moe_layer_interval", 1, MAX_LAYERS)
        start = keys.required_integer("moe_layer_start_index", 0, MAX_LAYERS)
        end = keys.required_integer("moe_layer_end_index", -1, MAX_LAYERS)
        last = num_layers - 1 if end == -1 else end
        return frozenset(
            i for i in range(num_layers) if (i + 1) % interval or not start <= i <= last
        )
    listed = keys.raw("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        raise keys.fail("mlp_only_layers", "a list of layer numbers")
    step = keys.required_integer("decoder_sparse_step", 1, MAX_LAYERS)
    return frozenset(i for i in range(num_layers) if i in listed or (i + 1) % step)


def _activation(keys: Keys, architecture: Architecture) -> str:
    # DBRX has an object for it.
    value = keys.raw("hidden_act")
    name = value.get("name") if isinstance(value, dict) else keys.text("hidden_act")
    if name is None and architecture.keys.get("hidden_act") == "hidden_activation":
        # Folders of Gemma have a null for it beside a `hidden_act` that is not meant.
        name = keys.defaults["hidden_act"]
    if name is None or name not in ACTIVATIONS:
        raise keys.fail("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _required_biases(keys: Keys, architecture: Architecture) -> frozenset[str]:
    """Find the linear layers that must have a bias, always or because a key is set."""
    # Both keys are checked even where the architecture has no use for them.
    is_set = {key: bool(keys.boolean(key)) for key in ("attention_bias", "mlp_bias")}
    required = set()
    for name, rule in architecture.biases.items():
        if isinstance(rule, str) and rule not in is_set:
            is_set[rule] = bool(keys.boolean(rule))
        if is_set[rule] if isinstance(rule, str) else rule:
            required.add(name)
    return frozenset(required)


def _layer_sliding_windows(
    keys: Keys, architecture: Architecture, num_layers: int
) -> tuple[int, ...]:
    """Find each layer's window; a row sees the `window` newest positions, itself included."""
    rule = architecture.sliding_window
    window = None if rule == "none" else keys.integer("sliding_window", 0, MAX_POSITIONS)
    if "use_sliding_window" in keys.defaults and not keys.boolean("use_sliding_window"):
        window = None
    if not window:
        return (0,) * num_layers
    if rule == "uniform":
        return (window,) * num_layers
    layer_types = keys.raw("layer_types")
    if layer_types is None:
        slides = _default_slides(keys, architecture, num_layers)
        return tuple(window if slides(i) else 0 for i in range(num_layers))
    known = {"sliding_attention": window, "full_attention": 0}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(isinstance(name, str) and name in known for name in layer_types)
    ):
        raise keys.fail("layer_types", f"{num_layers} times {' or '.join(known)}")
    return tuple(known[name] for name in layer_types)


def _default_slides(
    keys: Keys, architecture: Architecture, num_layers: int
) -> Callable[[int], bool]:
    """Return whether a layer has a sliding window, where no `layer_types` say so."""
    rule = architecture.sliding_window
    if rule == "upper":
        first = keys.required_integer("max_window_layers", 0, MAX_LAYERS)
        return lambda i: i >= first
    if rule == "pattern":
        pattern = keys.raw("sliding_window_pattern")
        if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
            # EXAONE writes a letter for each layer of a period: L for local, G for global.
            return lambda i: pattern[i % len(pattern)] == "L"
        period = keys.required_integer("sliding_window_pattern", 1, MAX_LAYERS)
        return lambda i: (i + 1) % period != 0
    if rule == "unrotated":
        rotated = _rotated_layers(keys, num_layers)
        return lambda i: not rotated[i]
    if rule == "lower":
        end = keys.required_integer("max_window_layers", 0, MAX_LAYERS)
        return lambda i: i % 2 == 0 and i < end
    if rule == "listed":
        return lambda i: True
    assert rule == "alternating", rule
    return lambda i: i % 2 == 0


def _rotated_layers(keys: Keys, num_layers: int) -> tuple[bool, ...]:
    """Return which layers have RoPE by `no_rope_layers`, which has a 1 for those that have it."""
    listed = keys.raw("no_rope_layers")
    if not listed:
        interval = keys.required_integer("no_rope_layer_interval", 1, MAX_LAYERS)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    if (
        not isinstance(listed, list) or len(listed) != num_layers
        or not all(type(i) is int and i in (0, 1) for i in listed)
    ):
        raise keys.fail("no_rope_layers", f"{num_layers} times 0 or 1")
    return tuple(i == 1 for i in listed)


def _layer_ropes(
    keys: Keys, architecture: Architecture, ropes: tuple[RopeConfig, ...],
    windows: tuple[int, ...],
) -> tuple[int | None, ...]:
    """Find each layer's rotary embedding; see `ModelConfig.layer_ropes`."""
    rule, num_layers = architecture.positions.layers, len(windows)
    if not ropes:
        return (None,) * num_layers
    if rule == "listed":
        rotated = _rotated_layers(keys, num_layers)
    elif rule == "sliding" or (rule == "sliding or all" and any(windows)):
        rotated = tuple(window > 0 for window in windows)
    else:
        rotated = (True,) * num_layers
    own = len(ropes) - 1
    return tuple(
        (own if window else 0) if is_rotated else None
        for is_rotated, window in zip(rotated, windows, strict=True)
    )


def _token_ids(keys: Keys, key: str, vocab_size: int) -> list[int]:
    """Read one id or a list of ids; those outside the vocabulary can never occur."""
    value = keys.raw(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise keys.fail(key, "a token id or a list of them")
    return [i for i in ids if 0 <= i < vocab_size]


def _eos_token_ids(keys: Keys, generation: Keys | None, vocab_size: int) -> tuple[int, ...]:
    """Read what both files name; the class's default where neither has the key."""
    named = [
        where for where in (keys, generation)
        if where is not None and "eos_token_id" in where.values
    ]
    ids: list[int] = []
    for where in named or [keys]:
        ids += _token_ids(where, "eos_token_id", vocab_size)
    return tuple(dict.fromkeys(ids))
