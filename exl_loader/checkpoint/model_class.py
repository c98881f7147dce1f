"""The architecture of a model folder: that of its class, or the one that the user chose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..utils.errors import (
    ExlLoaderError,
    InvalidSettings,
    UnsupportedArchitecture,
    shown_name,
)
from ..utils.json_keys import Keys, read_json_object_if_there
from ..utils.output import warn_once
from ..utils.setting_values import invalid, unknown_name
from .architectures import ALIASES, ARCHITECTURES
from .architectures.fields import Architecture
from .architectures.multimodal import MULTIMODAL


def text_part(values: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """Return the config of a model's language part, and the class of the whole model.

    Returns:
        The config itself and "" where the class is none of a model that reads images.
    """
    keys = Keys(values, where)
    named = values.get("architectures")
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    name = next((n for n in names if n in MULTIMODAL), "")
    if not name:
        return values, ""
    text = keys.mapping("text_config") or {}
    model_type = Keys(text, f"text_config in {where}").text("model_type")
    parts = MULTIMODAL[name]
    part = next(iter(parts.values())) if model_type is None else parts.get(model_type)
    if part is None:
        raise UnsupportedArchitecture(
            f"text_config in {where}", expected=f"model_type {' or '.join(parts)} for {name}",
            actual=shown_name(str(model_type)), remedy="Choose a model of a supported architecture",
        )
    own = {key: value for key, value in values.items() if key != "text_config"}
    merged = {**part.defaults, **own, **text, "architectures": [part.architecture]}
    for key in ("tie_word_embeddings", "quantization_config"):
        if key in own:
            merged[key] = own[key]
    return merged, name


def named_architecture(name: Any) -> Architecture:
    """Return the architecture that the option `as_architecture` names.

    Raises:
        InvalidSettings: it is no name of one.
    """
    if not isinstance(name, str):
        raise invalid("as_architecture", "the name of an architecture", name)
    found = ARCHITECTURES.get(ALIASES.get(name, name))
    if found is None:
        raise unknown_name("as_architecture", name, ARCHITECTURES)
    return found


def has_unknown_class(model_dir: str | os.PathLike[str]) -> bool:
    """Return whether a folder has a config.json whose class is unknown here; never raise.

    Only for such a folder `as_architecture` makes sense.
    """
    path = Path(model_dir) / "config.json"
    try:
        return bool(read_json_object_if_there(path)) and architecture_of(path.parent) is None
    except ExlLoaderError:
        return False


def architecture_of(model_dir: Path) -> Architecture | None:
    """Return the table entry of a folder's class; None where it is unknown or there is none.

    Raises:
        InvalidConfig: config.json is not a JSON object, or the class is no name.
    """
    path = model_dir / "config.json"
    values, _ = text_part(read_json_object_if_there(path), str(path))
    return _own_architecture(Keys(values, str(path)))


def chosen_architecture(keys: Keys, as_architecture: str | None) -> Architecture:
    """Find the table entry of a model, or the one that the user chose for an unknown class."""
    own = _own_architecture(keys)
    if as_architecture is None:
        if own is None:
            raise UnsupportedArchitecture(
                f"the architecture of {keys.where}",
                expected=f"one of {', '.join((*ARCHITECTURES, *MULTIMODAL))}",
                actual=_class_of(keys),
                remedy="Choose a model of a supported architecture. If this one differs from Llama "
                "in its name alone, as_architecture (--as-architecture) LlamaForCausalLM runs it",
            )
        return own
    chosen = named_architecture(as_architecture)
    if own is None:
        warn_once(
            f"{keys.where}: the class {_class_of(keys)} is unknown, so the model runs as "
            f"{chosen.name}, with that class's default values for keys that are left out; its "
            "output may be wrong"
        )
        return chosen
    if own is not chosen:
        raise InvalidSettings(
            "as_architecture", expected=f"a model of an unknown class, or {own.name}",
            actual=f"{chosen.name} for {keys.where}, which is of the known class {own.name}",
            remedy="Leave as_architecture out for this model",
        )
    return own


def _class_of(keys: Keys) -> str:
    """Return class and `model_type` of a model as config.json names them."""
    names = keys.raw("architectures") or ["no class"]
    return shown_name(f"{', '.join(names)}, model_type {keys.text('model_type')}", 200)


def _own_architecture(keys: Keys) -> Architecture | None:
    """Find the table entry: by class name, or by `model_type` where no class with a head is named.

    Folders of a model without its head name its body (`LlamaModel`), folders of some converters
    nothing at all.

    Returns:
        None where the class is unknown.
    """
    value = keys.raw("architectures")
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise keys.fail("architectures", "a list of class names")
    for name in names:
        name = ALIASES.get(name, name)
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    model_type = keys.text("model_type")
    if all(name.endswith("Model") for name in names):
        bodies = {name.removesuffix("Model") + "ForCausalLM" for name in names}
        for architecture in ARCHITECTURES.values():
            known = architecture.model_type == model_type
            if known or (model_type is None and architecture.name in bodies):
                return architecture
    return None
