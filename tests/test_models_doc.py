"""The tables of models name every class that the engine runs, with its proof."""

from __future__ import annotations

import pytest

from support.model_table import CLASSES, TABLES, proof_of, replaced


@pytest.mark.parametrize("page", TABLES, ids=lambda page: page.name)
def test_a_page_has_the_table_of_the_engine(page):
    text = page.read_text(encoding="utf-8")
    assert text == replaced(text, TABLES[page]()), "run python tests/support/model_table.py"


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_compared_with_something_independent(name):
    assert proof_of(name).partition(":")[0] in ("transformers", "definition")


def test_a_class_without_a_proof_is_found():
    with pytest.raises(LookupError, match="FrobForCausalLM"):
        proof_of("FrobForCausalLM")
