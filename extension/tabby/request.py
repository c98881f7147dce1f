"""What a request of TabbyAPI asks for, as settings of the engine.

The fields are those of TabbyAPI's `BaseSamplerRequest`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Fields with the name and the meaning of a setting.
_SAME = (
    "temperature", "temperature_last", "smoothing_factor", "top_k", "top_p", "top_a", "min_p",
    "xtc_probability", "xtc_threshold", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "mirostat_mode", "mirostat_tau", "mirostat_eta", "adaptive_decay",
    "logit_bias", "grammar_string", "json_schema", "regex_pattern", "ban_eos_token",
    "allowed_tokens", "repetition_decay", "loop_detect_window", "skew", "token_healing",
)
_RENAMED = {
    "typical": "typical_p", "banned_tokens": "custom_token_bans", "cfg_scale": "guidance_scale",
    "negative_prompt": "negative_prompt", "min_tokens": "min_new_tokens",
}
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_GRAMMARS = ("json_schema", "regex_pattern", "grammar_string")

# TabbyAPI's values for "no grammar". SillyTavern sends an empty schema with every request.
_NO_GRAMMAR: tuple[Any, ...] = ("", {})

# TabbyAPI's formats of whole messages -> the texts between which a model reasons, and what ends the
# reasoning, so that the answer follows.
_HARMONY = ("<|channel|>analysis<|message|>", "<|end|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>")
_MUSE_GLIMMER = ("to=self<|message|>", "<|eom|>",
                 "<|eom|><|start|>assistant to=user<|message|>")

# TabbyAPI's values for "not set", at which the engine's own defaults hold.
_UNSET_DRY = {"dry_base": 0, "dry_allowed_length": 0, "dry_sequence_breakers": []}

# Without a temperature below it this is TabbyAPI's value for a sampler that is off.
_ADAPTIVE_OFF = 1.0


@dataclass(frozen=True)
class Request:
    """The settings of one request.

    Args:
        settings: for `LoadedModel.generate_ids`.
        stop_strings: the texts that end the answer.
        notices: what is to be reported, a line each.
    """

    settings: dict[str, Any]
    stop_strings: tuple[str, ...]
    notices: tuple[str, ...]


def read(
    params: Any, room: int, eos_ids: Iterable[int], lookup_tokens: int,
    filter_trigger: str | None, formats: Any,
) -> Request:
    """Read a request.

    Args:
        params: the request, a `BaseSamplerRequest`.
        room: tokens that the context has left after the prompt, at least 1.
        eos_ids: token ids that end a text, in addition to those that the engine knows.
        lookup_tokens: as in `options.Choice`.
        filter_trigger: the tag that ends a reasoning which the prompt has begun; None if it has
            begun none.
        formats: has the attributes of `parsing.settings`.

    Returns:
        What it asks for. The engine checks the values.
    """
    settings = {name: value for name in _SAME if (value := _get(params, name)) is not None}
    settings |= {
        setting: value for name, setting in _RENAMED.items()
        if (value := _get(params, name)) is not None
    }
    settings |= _temperatures(params) | _penalty_range(params, settings) | _dry(params)
    if 0 < (tfs := _get(params, "tfs") or 0) < 1:
        settings["tfs"] = tfs
    target = _get(params, "adaptive_target")
    if target is not None and target < _ADAPTIVE_OFF:
        settings["adaptive_target"] = target
    for name in _GRAMMARS:
        if settings.get(name) in _NO_GRAMMAR:
            settings.pop(name, None)
    has_grammar = any(name in settings for name in _GRAMMARS)
    if filter_trigger and has_grammar:
        settings["grammar_trigger"] = filter_trigger
    notices: list[str] = []
    if filter_trigger or not has_grammar:
        settings |= _reasoning(params, filter_trigger, formats, notices)
    if "json_schema" in settings:
        settings["json_schema"] = _without_name(settings["json_schema"])
    if _get(params, "logprobs"):
        settings["logprobs"] = max(1, _get(params, "top_logprobs") or 0)
    asked = _get(params, "max_tokens") or 0
    settings["max_new_tokens"] = min(asked, room) if asked > 0 else room
    settings["prompt_lookup_num_tokens"] = lookup_tokens
    # TabbyAPI's own parsers look for tags of reasoning and of tools, which are special tokens.
    settings["skip_special_tokens"] = False
    settings["banned_strings"] = [text for text in _texts(_get(params, "banned_strings")) if text]
    texts, ids = _stops(_texts(_get(params, "stop")))
    if not settings.get("ban_eos_token"):
        ids += [token for token in eos_ids if token is not None]
    settings |= {"stop_strings": texts, "stop_token_ids": list(dict.fromkeys(ids))}
    return Request(settings, tuple(texts), tuple(notices))


def _get(params: Any, name: str) -> Any:
    # Versions of TabbyAPI differ in their fields.
    return getattr(params, name, None)


def _reasoning(
    params: Any, filter_trigger: str | None, formats: Any, notices: list[str]
) -> dict[str, Any]:
    """Read the budget of a chat's reasoning: of the request, or else of the configuration.

    Args:
        params, filter_trigger, formats: as in `read`.
        notices: gets a line if the budget has no effect.
    """
    if not hasattr(params, "reasoning_budget_tokens"):
        # Completions have no budget, and no version without the field has one.
        return {}
    asked = (params.reasoning_budget_tokens, _get(_get(params, "reasoning"), "max_tokens"),
             formats.reasoning_budget_tokens)
    budget = next((count for count in asked if count is not None and count >= 0), None)
    if budget is None:
        return {}
    message = _get(params, "reasoning_budget_message")
    if message is None:
        message = formats.reasoning_budget_message or ""
    tags = (formats.reasoning_start_token, formats.reasoning_end_token)
    if formats.harmony or formats.muse_glimmer:
        start, end, ending = _HARMONY if formats.harmony else _MUSE_GLIMMER
        message += ending
    elif formats.reasoning and all(tags):
        start, end = tags
    else:
        notices.append("a reasoning budget does nothing, because no reasoning is configured")
        return {}
    return {
        "reasoning_budget_tokens": budget, "reasoning_budget_message": message,
        "reasoning_start_token": start, "reasoning_end_token": end,
        "start_in_reasoning": "always" if filter_trigger else "never",
    }


def _temperatures(params: Any) -> dict[str, Any]:
    """Read the bounds of a dynamic temperature, which is off where they do not rise."""
    low, high = _get(params, "min_temp"), _get(params, "max_temp")
    if low is None or high is None or high <= low:
        return {}
    exponent = _get(params, "temp_exponent")
    return {
        "dynamic_temperature": True, "dynatemp_low": low, "dynatemp_high": high,
        "dynatemp_exponent": 1.0 if exponent is None else exponent,
    }


def _penalty_range(params: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the range of the penalties; the settings of penalties over no tokens are removed."""
    penalised = _get(params, "penalty_range")
    if penalised == 0:
        for name in _PENALTIES:
            settings.pop(name, None)
    # The engine's 0 and TabbyAPI's -1 are all tokens.
    return {"repetition_penalty_range": max(0, -1 if penalised is None else penalised)}


def _dry(params: Any) -> dict[str, Any]:
    multiplier = _get(params, "dry_multiplier")
    if not multiplier or multiplier < 0:
        return {}
    # Both count all tokens with 0; the engine would take -1 for the range of the penalties.
    chosen = {"dry_multiplier": multiplier, "dry_range": max(0, _get(params, "dry_range") or 0)}
    for name, unset in _UNSET_DRY.items():
        value = _get(params, name)
        if value is not None and value != unset:
            chosen[name] = value
    return chosen


def _without_name(schema: Any) -> Any:
    """Return the schema of a `response_format`, where OpenAI's clients put it beside its name."""
    if isinstance(schema, dict) and "name" in schema and isinstance(schema.get("schema"), dict):
        return schema["schema"]
    return schema


def _stops(stops: list[Any]) -> tuple[list[str], list[int]]:
    """Split stop conditions into texts and token ids."""
    texts = [stop for stop in stops if isinstance(stop, str) and stop]
    ids = [stop for stop in stops if isinstance(stop, int) and not isinstance(stop, bool)]
    return list(dict.fromkeys(texts)), ids


def _texts(value: Any) -> list[Any]:
    """Return a list that a request may also give as one text, or leave out."""
    return [value] if isinstance(value, str) else list(value or ())
