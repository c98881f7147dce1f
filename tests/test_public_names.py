"""What the package exports, and the options that `plan` and `load` share."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest

import exl_loader
from exl_loader import InvalidSettings, LoadOptions
from exl_loader.memory.reservation.options import LoadKeywords, PlanKeywords
from exl_loader.utils import errors
from support import run_python


def typed_names() -> set[str]:
    """The names that type checkers see: the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(exl_loader.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {alias.asname for node in block.body for alias in node.names}


def test_all_dir_and_types_agree():
    public = set(exl_loader.__all__)
    assert typed_names() == public
    assert {name for name in dir(exl_loader) if not name.startswith("__")} == public
    assert all(getattr(exl_loader, name).__name__ == name for name in public)
    with pytest.raises(AttributeError, match="plans"):
        exl_loader.plans  # noqa: B018


def test_every_error_is_public():
    found = {
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, exl_loader.ExlLoaderError)
    }
    assert found == {name for name in exl_loader.__all__
                     if isinstance(value := getattr(exl_loader, name), type)
                     and issubclass(value, Exception)}


def test_import_loads_nothing_else():
    code = ("import sys; import exl_loader; dir(exl_loader); "
            "print(*[name for name in sys.modules if name.startswith('exl_loader.')])")
    assert run_python(code) == "\n"


@pytest.mark.parametrize(("function", "keywords"), [("plan", PlanKeywords), ("load", LoadKeywords)])
def test_keywords_have_the_types_of_the_options(function, keywords):
    types = {entry.name: entry.type for entry in fields(LoadOptions)}
    assert {name: hint.__forward_arg__ for name, hint in keywords.__annotations__.items()} == {
        name: types[name] for name in LoadOptions.names(function)
    }


def test_every_option_is_described_and_its_default_is_valid():
    LoadOptions().check()
    for name, option in LoadOptions.OPTIONS.items():
        assert getattr(LoadOptions(), name) == option.default
        assert option.help and not option.help.endswith(".") and "\n" not in option.help
        if option.least is not None:
            for bound in (option.least, option.most):
                value = type(option.default or 1)(bound)
                LoadOptions(**{"max_batch_size": 1, name: value, **(
                    {"chunk_size": 1 << 16} if name == "max_batch_size" else {})}).check()
            with pytest.raises(InvalidSettings, match=name):
                LoadOptions(**{name: type(option.default or 1)(option.most) + 1}).check()


@pytest.mark.parametrize(
    ("function", "name", "message"),
    [
        ("plan", "ctx_siz", "Did you mean ctx_size"),
        ("load", "gpu_splits", "Did you mean gpu_split"),
        ("plan", "draft_max", "an option of load alone"),
        ("load", "vram", "an option of plan alone"),
        ("load", "replacing", "an option of plan alone"),
        ("load", "no such thing", "an unknown name"),
    ],
)
def test_unknown_option_is_refused_before_the_folder_is_read(function, name, message):
    with pytest.raises(InvalidSettings, match=message):
        getattr(exl_loader, function)("nowhere", **{name: 1})


def test_keywords_of_a_call_are_what_differs_from_the_defaults():
    options = LoadOptions(ctx_size=512, vram="1GiB", draft_max=3, cache_type="fp16")
    assert options.for_plan() == {"ctx_size": 512, "vram": "1GiB"}
    assert options.for_load() == {"ctx_size": 512, "draft_max": 3}
    assert LoadOptions.from_keywords("load", options.for_load()) == LoadOptions(
        ctx_size=512, draft_max=3
    )


def test_stretched_length_is_the_reservations(tiny_model_dir):
    options = LoadOptions(alpha_value=1.5, compress_pos_emb=2)
    found = exl_loader.plan(tiny_model_dir, **options.for_plan())
    assert options.stretched_length(tiny_model_dir) == found.stretched_length
    assert found.stretched_length == 3 * found.own_length
    with pytest.raises(InvalidSettings, match="alpha_value"):
        LoadOptions(alpha_value=0).stretched_length(tiny_model_dir)
