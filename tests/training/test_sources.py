"""What is read of files and folders as people have them, and what is left out."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from entropy_gpt.training.arguments import DataArguments
from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.sources import open_source


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def texts_of(path, **arguments) -> list[str]:
    """All texts, in the order in which they are read; the same when streamed."""
    kept, streamed = (
        list(open_source(DataArguments(dataset=str(path), validation_share=0.0, streaming=s, **arguments)).training)
        for s in (False, True)
    )
    assert kept == streamed
    return kept


def write_lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name", ["br[1].jsonl", "star*.jsonl", "is it?.jsonl", "a::b.jsonl", "{a,b}.jsonl", "a b#c.jsonl"]
)
def test_a_path_is_no_pattern(name, tmp_path):
    for decoy in ("br1.jsonl", "star2.jsonl", "is itx.jsonl", "a.jsonl", "b.jsonl"):
        write_lines(tmp_path / decoy, "the wrong text")
    assert texts_of(write_lines(tmp_path / name, "the right text")) == ["the right text"]
    folder = tmp_path / name.removesuffix(".jsonl")
    write_lines(folder / name, "in a folder")
    assert texts_of(folder) == ["in a folder"]
    Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "plain")
    (tmp_path / "plain").rename(f"{folder} saved")
    assert texts_of(f"{folder} saved") == ["saved"]


@pytest.mark.parametrize("suffix", ["TXT", "txt.gz", "JSONL", "jsonl.gz", "json", "csv", "CSV.GZ", "TSV"])
def test_neither_suffixes_in_capitals_nor_byte_order_marks_matter(suffix, tmp_path):
    text = "Zoë said:\nyes"
    kind = suffix.lower().removesuffix(".gz")
    tables = {"csv": f'number,text\n1,"{text}"\n', "tsv": f'number\ttext\n1\t"{text}"\n', "txt": text}
    content = tables.get(kind) or json.dumps({"text": text})
    content = b"\xef\xbb\xbf" + content.encode()
    path = tmp_path / "texts" / f"file.{suffix}"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content) if suffix.lower().endswith("gz") else content)
    assert texts_of(path) == texts_of(path.parent) == [text]


@pytest.mark.parametrize(("suffix", "content"), [("txt", "a text"), ("jsonl", '{"text": "a text"}')])
def test_names_of_files_need_not_be_utf_8(suffix, content, tmp_path):
    path = tmp_path / "texts" / os.fsdecode(b"caf\xe9." + suffix.encode())
    path.parent.mkdir()
    path.write_text(content)
    assert texts_of(path) == texts_of(path.parent) == ["a text"]


def test_values_that_look_like_missing_ones_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n12\n" + "long " * 40_000)
    assert texts_of(tmp_path / "a.csv")[:3] == ["NA", "null", "12"]


def test_other_columns_may_hold_anything(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "x": 1}\n{"text": "two \\ud83d", "x": {"y": []}}\n{"x": 0}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two " + 3 * "\ufffd"]


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("linked")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("own")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts")
    assert texts_of(tmp_path / "texts") == ["own", "linked"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_what_is_left_out_is_said_in_one_line(kind, tmp_path, caplog):
    write_lines(tmp_path / "texts" / f"a.{kind}", "text")
    for name in ("b.png", "c.PNG", ".git/x.txt", "Makefile"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("x")
    (tmp_path / "texts" / "link.txt").symlink_to("gone")
    open_source(DataArguments(dataset=str(tmp_path / "texts")))
    (message,) = caplog.messages
    begin, _, reasons = message.rstrip(".").partition(": ")
    assert begin == f"Left out of {tmp_path / 'texts'}"
    assert sorted(reasons.split(", ")) == [".png (2)", "hidden (1)", "links to nothing (1)", "without suffix (1)"]


def test_rows_without_text_are_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"other": "two"}\n{"text": null}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one"]
    assert caplog.messages == [f"Left out of {tmp_path / 'a.jsonl'}: rows without text (3)."]


def test_files_of_other_splits_are_counted(tmp_path, caplog):
    for name in ("train-0", "train-1", "test", "notes"):
        write_lines(tmp_path / "rows" / f"{name}.jsonl", name)
    assert texts_of(tmp_path / "rows") == ["train-0", "train-1"]
    assert "of other splits (2)" in caplog.text
    assert texts_of(tmp_path / "rows", dataset_split="test") == ["test"]


def test_the_card_of_a_folder_names_its_configurations(tmp_path):
    for name in ("en/one", "en/two", "de/one"):
        write_lines(tmp_path / "rows" / f"{name}.jsonl", name)
    card = tmp_path / "rows" / "README.md"
    card.write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*.jsonl\n"
        "- config_name: de\n  data_dir: de\n---\n"
    )
    assert texts_of(tmp_path / "rows", dataset_config="en") == ["en/one", "en/two"]
    assert texts_of(tmp_path / "rows", dataset_config="de") == ["de/one"]
    with pytest.raises(CorpusError, match=r"several configurations\. Choose one: en, de"):
        texts_of(tmp_path / "rows")
    with pytest.raises(CorpusError, match=r"no configuration fr\. It has en, de"):
        texts_of(tmp_path / "rows", dataset_config="fr")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt", "a.txt.gz"])
def test_a_file_in_another_encoding_is_named(name, tmp_path):
    content = '{"text": "Zoë"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(CorpusError, match=rf"{name} is not UTF-8 text"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1"), ("a.txt.gz", b"\x1f\x8b"), ("a.jsonl.gz", b"x")]
)
def test_a_damaged_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"{name} (is damaged|can't be read)"):
        texts_of(tmp_path / name)
