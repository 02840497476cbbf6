"""Records on disk: read back as written, and refused with a line that says why."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from evaluation.records import RECORD, load_record, save_record


@dataclass(config=RECORD)
class Inner:
    """Some numbers."""

    values: list[float]
    name: str | None = None


@dataclass(config=RECORD)
class Outer:
    """Some records."""

    parts: list[Inner]
    count: int
    told: dict[str, list[Inner]]


INNER = st.builds(Inner, st.lists(st.floats(allow_nan=False)), st.none() | st.text())
OUTER = st.builds(Outer, st.lists(INNER), st.integers(), st.dictionaries(st.text(), st.lists(INNER)))


@given(st.lists(OUTER, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, records):
    save_record(records, list[Outer], "things", 3, tmp_path / "things.json")
    assert load_record(list[Outer], "things", 3, tmp_path / "things.json") == records


def test_a_number_that_is_none_stays_one(tmp_path):
    save_record(Inner([math.nan, -math.inf]), Inner, "things", 1, tmp_path / "things.json")
    first, second = load_record(Inner, "things", 1, tmp_path / "things.json").values
    assert math.isnan(first)
    assert second == -math.inf
    json.loads((tmp_path / "things.json").read_text(), parse_constant=pytest.fail)  # strict JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read: it is no JSON"),
        ("[]", "holds something else, where things are read"),
        ('{"kind": "cakes", "schema_version": 1}', "holds cakes, where things are read"),
        ('{"kind": "things", "schema_version": 2}', "is of schema version 2, where 1 is read"),
        ('{"kind": "things", "schema_version": 1}', "is broken: content"),
        ('{"kind": "things", "schema_version": 1, "content": {"values": ["x"]}}', r"is broken: values.0: .*number"),
        ('{"kind": "things", "schema_version": 1, "content": {"values": [], "more": 1}}', "is broken: more: "),
        ("\udcff", "can't be read"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, text, message):
    path = tmp_path / "things.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        load_record(Inner, "things", 1, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.json can't be read: No such file"):
        load_record(Inner, "things", 1, tmp_path / "nothing.json")
