"""Code of pinned packages as a corpus: the same everywhere, or refused."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.package_corpus import (
    CONSTRAINTS,
    NOT_EVERYWHERE,
    TESTED_ON,
    hash_pins,
    load_packages,
    pin_packages,
    read_pins,
)


PACKAGES = {
    "alpha": {"alpha/one.py": "def one():\n    return 1\n", "alpha/same.py": "# the same\n", "alpha/empty.py": "\n"},
    "beta": {
        "beta/__init__.py": "VALUE = 'β'\n",
        "beta/copy.py": "# the same\n",
        "beta/tests/test_beta.py": "# a test\n",
        "beta/_version.py": "BUILD = 'here'\n",
        "beta/table.py": f"TABLE = [{'0, ' * 100_000}]\n",
        "beta/data.txt": "no code\n",
    },
}


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder with two packages, as pip installs them."""
    folder = tmp_path / "site-packages"
    for name, files in PACKAGES.items():
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        metadata.joinpath("METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0+cpu\n")
        metadata.joinpath("RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


@pytest.fixture
def pins(packages, tmp_path) -> Path:
    path = tmp_path / "pins.json"
    path.write_text(json.dumps([asdict(pin) for pin in pin_packages(["beta", "alpha", "not-installed"])]))
    return path


def test_code_alone_is_read_and_each_text_once(pins):
    assert [(pin.package, pin.version) for pin in read_pins(pins)] == [("alpha", "1.0"), ("beta", "1.0")]
    corpus = load_packages(validation_share=0, pins=pins)
    assert not corpus.validation
    assert {document.name for document in corpus.training} == {"alpha/one.py", "alpha/same.py", "beta/__init__.py"}


def test_whole_packages_are_kept_for_validation(pins, monkeypatch):
    monkeypatch.setattr("entropy_gpt.training.package_corpus.LONGEST_VALIDATED", 8)
    corpus = load_packages(validation_share=0.3, pins=pins)
    assert [document.text for document in corpus.validation] == ["VALUE = "], "the beginning of its files"
    assert {document.name for document in corpus.training} == {"alpha/one.py", "alpha/same.py"}


@pytest.mark.slow
def test_validation_has_little_text_of_training():
    """Five lines one after the other, which are not short, are a window."""

    def windows(text: str) -> set[int]:
        lines = [line.strip() for line in text.split("\n") if len(line.strip()) >= 12]
        return {hash("\n".join(lines[start : start + 5])) for start in range(len(lines) - 4)}

    corpus = load_packages()
    validated = set().union(*(windows(document.text) for document in corpus.validation))
    shared = set().union(*(windows(document.text) & validated for document in corpus.training))
    assert len(shared) < 0.02 * len(validated)
    tops = [{document.name.partition("/")[0] for document in each} for each in (corpus.training, corpus.validation)]
    assert "transformers" in tops[0] - tops[1]
    assert len(corpus.validation) > 1000


def test_the_text_does_not_depend_on_the_place(pins, packages, monkeypatch, tmp_path):
    first = load_packages(0, pins)
    shutil.copytree(packages, tmp_path / "elsewhere")
    shutil.rmtree(packages)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path])
    second = load_packages(0, pins)
    assert first.revision == second.revision and first.revision.startswith("2 packages, 3 files sha256:")
    assert [document.name for document in first.training] == [document.name for document in second.training]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("beta/copy.py", "# another\n", r"beta/copy\.py is not the file of beta 1\.0 that the corpus was made of"),
        ("alpha/empty.py", "x = 1\n", r"alpha/empty\.py is not the file of alpha 1\.0"),
        ("beta/copy.py", "", "beta 1.0 has 1 files of Python here, and the corpus was made of 2"),
        ("beta-1.0.dist-info/METADATA", "Name: beta\nVersion: 2.0\n", "beta 1.0, which is 2.0 here: pip install"),
    ],
)
def test_another_text_is_refused_by_name(pins, packages, file, text, message):
    (packages / file).write_text(text)
    with pytest.raises(CorpusError, match=message):
        load_packages(0, pins)


def test_a_build_of_the_same_release_may_say_which_it_is(pins, packages):
    (packages / "beta" / "_version.py").write_text("BUILD = 'elsewhere'\n")
    load_packages(0, pins)


def test_the_committed_pins_are_those_of_the_constraints_without_markers():
    requirements = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if line and line[0] != "#"]
    everywhere = {
        (each.name, Version(str(each.specifier).removeprefix("=="))) for each in requirements if each.marker is None
    }
    pins = read_pins()
    assert {(pin.package, Version(pin.version)) for pin in pins} <= everywhere
    assert not {pin.package for pin in pins} & {*TESTED_ON, *NOT_EVERYWHERE, "numpy", "pandas", "pyarrow"}
    assert sum(pin.characters for pin in pins) > 190_000_000
    assert all(pin.licence and len(pin.hashes) % 8 == 0 for pin in pins)


def test_every_change_of_the_pins_changes_their_hash(pins):
    before = hash_pins(pins)
    pins.write_text(pins.read_text().replace("1.0", "1.1"))
    assert hash_pins(pins) != before
