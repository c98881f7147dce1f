"""Nothing was lost: logits, texts, plans and error types are those of the golden record."""

from __future__ import annotations

import pytest

from support.golden_cases import CASES, Bench, NotHere
from support.golden_record import Record, machine

pytestmark = pytest.mark.usefixtures("one_thread", "two_threads")


@pytest.fixture(scope="module")
def record():
    return Record()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("golden"))


def test_the_record_has_every_case_and_no_other(record):
    assert set(record.cases) == set(CASES)
    assert record.path.stat().st_size < 400_000


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_as_recorded(name, record, bench):
    try:
        result = CASES[name](bench)
    except NotHere as missing:
        pytest.skip(str(missing))
    differences = record.differences(name, result)
    assert not differences, "\n".join(differences)
    if result.bits and not record.has_bits(name):
        pytest.skip(
            "compared within bounds alone: the record has no bits of this case on this machine "
            f"({machine()}); see golden_cases.py to add them"
        )
