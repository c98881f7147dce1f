"""Models with a table of positions have no position beyond it, whatever the options say."""

from __future__ import annotations

import html

import pytest

from exl_loader import load, plan
from exl_loader.memory import buffers as memory
from exl_loader.memory.reservation.text import render
from exl_loader.utils.errors import CacheFull, InvalidSettings
from extension.panel.gauge import gauge_html
from support.hf_models import make_model
from support.model_builder import build_model
from support.tiny import write_tokenizer

POSITIONS = 300


@pytest.fixture
def folder(tmp_path):
    """A model whose positions end within a page of the cache."""
    make_model("gpt2", 30, tmp_path / "m", max_position_embeddings=POSITIONS, vocab_size=331)
    write_tokenizer(tmp_path / "m", 331)
    return tmp_path / "m"


def test_a_context_beyond_the_positions_is_refused(folder):
    with pytest.raises(InvalidSettings, match=r"ctx_size.*at most 300.*301"):
        plan(folder, ctx_size=POSITIONS + 1, device="cpu")
    assert plan(folder, ctx_size=POSITIONS, device="cpu").ctx_size == POSITIONS


@pytest.mark.parametrize("options", [
    {}, {"ctx_size": "auto"}, {"ctx_size": "auto", "alpha_value": 4.0, "compress_pos_emb": 2.0},
])
def test_no_automatic_context_is_longer_than_the_positions(folder, options):
    reservation = plan(folder, device="cpu", **options)
    assert reservation.ctx_size == POSITIONS
    assert set(reservation.largest_ctx_size.values()) == {POSITIONS}


@pytest.mark.parametrize(("options", "start"), [
    ({"alpha_value": 2.5}, "alpha_value 2.5 has no effect on GPT2LMHeadModel, because"),
    ({"compress_pos_emb": 2.0}, "compress_pos_emb 2 has no effect"),
    ({"alpha_value": 4.0, "compress_pos_emb": 2.0},
     "alpha_value 4 and compress_pos_emb 2 have no effect"),
])
def test_rope_options_without_effect_are_named(folder, caplog, options, start):
    found = plan(folder, device="cpu", **options)
    (warning,) = found.warnings
    assert warning.startswith(start) and found.to_dict()["rope_warning"] == warning
    assert found.stretched_length == POSITIONS and found.length_warning is None
    assert f"Warning: {start}" in " ".join(render(found).split())
    assert warning[0].upper() + warning[1:] in html.unescape(gauge_html(found))
    with load(folder, device="cpu", **options):
        pass
    assert [record.message for record in caplog.records if "no effect" in record.message] == [
        warning
    ]


def test_nothing_is_said_where_rope_options_are_unset_or_have_an_effect(folder, tiny_model_dir):
    assert plan(folder, device="cpu").warnings == []
    found = plan(tiny_model_dir, device="cpu", ctx_size=256, alpha_value=2.0)
    assert found.warnings == [] and found.stretched_length == 2 * found.own_length


def test_a_draft_model_has_its_own_positions(folder, tmp_path):
    make_model("gpt2", 31, tmp_path / "large", max_position_embeddings=512, vocab_size=331)
    write_tokenizer(tmp_path / "large", 331)
    options = {"device": "cpu", "ctx_size": 400, "model_draft": folder}
    with pytest.raises(InvalidSettings, match=r"ctx_size_draft.*at most 300.*400"):
        plan(tmp_path / "large", **options)
    assert plan(tmp_path / "large", ctx_size_draft=256, **options).ctx_size == 400


def test_the_table_is_in_the_plan_to_the_byte(folder):
    reservation = plan(folder, device="cpu", ctx_size=256)
    before = memory.live_bytes()
    with load(folder, device="cpu", ctx_size=256):
        assert memory.live_bytes() - before == reservation.total_bytes


def test_no_row_is_read_beyond_the_table(folder):
    """Pages end later than the positions."""
    from exl_loader.backends.reference.ops import ReferenceOps

    model, cache = build_model(folder, ReferenceOps(), ctx_size=POSITIONS)
    sequence = cache.acquire(POSITIONS)
    sequence.past_len = POSITIONS - 2
    model.forward([(sequence, [5, 6])])
    with pytest.raises(CacheFull, match=r"positions.*at most 300 tokens.*301"):
        model.forward([(sequence, [7])])
