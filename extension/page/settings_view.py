"""The settings of sampling that people change, folded in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from exl_loader.commands.model_options import TERMINAL_DEFAULTS

from ..panel.panel import named
from .conversation import SETTING_NAMES, stop_lines, stop_strings

# What a conversation begins with.
FIRST_SETTINGS: dict[str, Any] = {
    "max_new_tokens": 256, "temperature": TERMINAL_DEFAULTS["temperature"],
    "top_p": TERMINAL_DEFAULTS["top_p"], "top_k": TERMINAL_DEFAULTS["top_k"], "min_p": 0,
    "repetition_penalty": 1, "seed": -1, "stop_strings": [],
}


class SettingsView:
    """The fields, made in the current block of Gradio."""

    def __init__(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="exl_settings"):
            with gr.Row():
                length = _number("max_new_tokens", "Length", "Most tokens of a new text", 1, 1)
                temperature = _number(
                    "temperature", "Temperature", "0 takes the most likely token", 0, 0.05)
            with gr.Row():
                top_p = _share("top_p", "Top P", "The likeliest tokens up to this probability")
                min_p = _share("min_p", "Min P", "Tokens with this share of the best one's")
            with gr.Row():
                top_k = _number("top_k", "Top K", "So many of the likeliest tokens, 0 is all", 0, 1)
                penalty = _number("repetition_penalty", "Repetition penalty",
                                  "Above 1 makes repeated tokens less likely", 0, 0.01)
            with gr.Row():
                seed = _number("seed", "Seed", "The same seed gives the same text, -1 draws one",
                               -1, 1)
                stops = gr.Textbox(
                    "", lines=1, max_lines=5, min_width=180, elem_id="exl_stop_strings",
                    **named("Stop at", "stop_strings", r"A text in each line, \n is a line's end"))
        # In the order of SETTING_NAMES.
        self.fields: list[Any] = [length, temperature, top_p, top_k, min_p, penalty, seed, stops]


def _number(name: str, label: str, info: str, minimum: float, step: float) -> gr.Number:
    return gr.Number(
        FIRST_SETTINGS[name], minimum=minimum, step=step, precision=0 if step == 1 else None,
        min_width=180, elem_id=f"exl_{name}", **named(label, name, info))


def _share(name: str, label: str, info: str) -> gr.Slider:
    return gr.Slider(0, 1, value=FIRST_SETTINGS[name], step=0.01, min_width=180,
                     elem_id=f"exl_{name}", **named(label, name, info))


def read_fields(values: Sequence[Any]) -> dict[str, Any]:
    """Return the settings that the fields hold, by name."""
    settings = dict(zip(SETTING_NAMES, values, strict=True))
    settings["stop_strings"] = stop_strings(str(settings["stop_strings"] or ""))
    return settings


def write_fields(settings: dict[str, Any]) -> list[Any]:
    """Return the values of the fields for settings; those that lack are the first ones."""
    values = FIRST_SETTINGS | {k: v for k, v in settings.items() if v is not None}
    stops = values["stop_strings"]
    values["stop_strings"] = stop_lines([stops] if isinstance(stops, str) else stops)
    return [values[name] for name in SETTING_NAMES]
