"""Records on disk: read back as written, and refused with a line that says why."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, StoredRecord, load_record, save_record


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
    settings: dict


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
INNER = st.builds(Inner, st.lists(st.floats()), st.none() | st.text())
OUTER = st.builds(
    Outer,
    parts=st.lists(INNER),
    count=st.integers(),
    told=st.dictionaries(st.text(), st.lists(INNER)),
    settings=st.dictionaries(st.text(), VALUES | st.lists(VALUES)),
)


@given(st.lists(OUTER, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, records):
    save_record(records, list[Outer], "things", 3, tmp_path / "things.json")
    read = load_record(list[Outer], "things", 3, tmp_path / "things.json")
    assert repr(read) == repr(records)  # NaN is not equal to itself, but is written alike; 1 and 1.0 are not


@pytest.mark.parametrize("type_", [Outer, list[Outer]])
def test_numbers_that_are_not_finite_stay_so_in_strict_json(type_, tmp_path):
    record = Outer([Inner([math.nan, -math.inf])], 1, {}, {"told": [math.nan, math.inf]})
    save_record(record if type_ is Outer else [record], type_, "things", 1, tmp_path / "things.json")
    json.loads((tmp_path / "things.json").read_text(), parse_constant=pytest.fail)
    read = load_record(type_, "things", 1, tmp_path / "things.json")
    read = read if type_ is Outer else read[0]
    assert repr(read.parts) == repr(record.parts)
    assert read.settings == {"told": ["NaN", "Infinity"]}  # nothing says that these were numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't be read: it is no JSON"),
        ("[]", "holds something else, not things"),
        ('{"kind": "cakes", "schema_version": 1}', "holds cakes, not things"),
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


@dataclass(config=RECORD)
class Renamed(StoredRecord):
    """A record whose only field had another name in version 1, and was a text in version 0."""

    KIND = "things"
    SCHEMA_VERSION = 2

    name: str

    @classmethod
    def migrate(cls, content, version):
        return {"name": content["title"]} if version == 1 else None


def test_older_versions_are_brought_up_to_date(tmp_path):
    path = tmp_path / "things.json"
    path.write_text('{"kind": "things", "schema_version": 1, "content": {"title": "a name"}}')
    assert Renamed.load(path) == Renamed("a name")
    Renamed.load(path).save(path)
    assert json.loads(path.read_text())["schema_version"] == 2
    for version in (0, 3, "1", None):
        path.write_text(json.dumps({"kind": "things", "schema_version": version, "content": {"title": "a name"}}))
        remedy = "update entropy-gpt" if version == 3 else "make it anew"
        with pytest.raises(ValueError, match=f"is of schema version {version}, where 2 is read: {remedy}"):
            Renamed.load(path)


def test_records_have_a_line_each(tmp_path):
    """So that a changed record is a changed line."""
    records = [Outer([Inner([1.0]), Inner([2.0])], 1, {}, {}) for _ in range(3)]
    path = tmp_path / "things.json"
    save_record(records, list[Outer], "things", 1, path)
    before = path.read_text().splitlines()
    records[1].count = 2
    save_record(records, list[Outer], "things", 1, path)
    after = path.read_text().splitlines()
    assert sum(line != old for line, old in zip(after, before, strict=True)) == 1
    save_record(records[0], Outer, "things", 1, path)
    assert sum('"values"' in line for line in path.read_text().splitlines()) == 2
