"""Corpora of text files."""

import errno
import os
import sys
from pathlib import Path

import pytest

from entropy_gpt.training.corpus import load_corpus, load_standard_library
from entropy_gpt.training.errors import CorpusError


@pytest.fixture(scope="module")
def standard_library():
    return load_standard_library()


def test_standard_library_is_python_code_without_tests(standard_library):
    documents = (*standard_library.training, *standard_library.validation)
    names = [document.name for document in documents]
    assert {"argparse.py", os.path.join("json", "decoder.py")} <= set(names)  # noqa: PTH118
    assert not [name for name in names if {"test", "tests", "site-packages", "encodings"} & set(Path(name).parts)]
    assert standard_library.characters > 5_000_000
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in standard_library.revision


def test_the_split_is_by_file_and_always_the_same(standard_library):
    training, validation = (
        {document.name for document in part} for part in (standard_library.training, standard_library.validation)
    )
    assert training.isdisjoint(validation)
    share = sum(document.length for document in standard_library.validation) / standard_library.characters
    assert 0.04 < share < 0.1
    assert load_standard_library() == standard_library


def test_a_folder_is_read_with_its_subfolders(tmp_path):
    (tmp_path / "deep").mkdir()
    for index in range(6):
        (tmp_path / "deep" / f"{index}.py").write_text(f"x = {index}\n" * 50)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "empty.txt").write_text("")
    corpus = load_corpus(tmp_path)
    names = {document.name.partition(" ")[0] for document in (*corpus.training, *corpus.validation)}
    assert names == {os.path.join("deep", f"{index}.py") for index in range(6)}  # noqa: PTH118
    assert corpus.name == tmp_path.name
    (tmp_path / "deep" / "0.py").write_text("x = 7\n" * 50)
    assert load_corpus(tmp_path).revision != corpus.revision


def test_a_lone_file_is_split_at_a_line_end(tmp_path):
    file = tmp_path / "notes"
    lines = [f"line {index}\n" for index in range(200)]
    file.write_text("".join(lines))
    corpus = load_corpus(file)
    assert corpus.training[0].text + corpus.validation[0].text == file.read_text()
    assert corpus.training[0].text.endswith("\n")
    assert 0 < len(corpus.validation[0].text) <= 0.1 * len(file.read_text())


@pytest.mark.parametrize(
    "texts",
    [
        ["word " * 4000],
        ["x" * 20000],
        ["short\n" + "word " * 4000],
        ["word\n" * 4000, "tiny\n"],
        ["tiny\n", "word\n" * 4000],
        ["word\n" * 2000, "word\n" * 2000],
        ["word\n" * 100 * size for size in range(1, 12)],
    ],
    ids=["one line", "no space", "long last line", "unequal", "unequal too", "two", "many"],
)
def test_about_the_wanted_share_is_kept_for_validation(texts, tmp_path):
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    corpus = load_corpus(tmp_path, validation_share=0.05)
    assert corpus.characters == sum(map(len, texts))
    share = sum(len(document.text) for document in corpus.validation) / corpus.characters
    assert 0.025 <= share <= 0.1
    for document in corpus.training:
        if document.name.endswith("(beginning)") and " " in document.text:
            assert document.text.endswith(" ")


def test_hidden_folders_and_the_one_being_written_to_are_left_out(tmp_path):
    for name in ("a.py", "src/b.py", ".venv/lib/c.py", "src/.git/d.txt", ".hidden.md", "output/models/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * 100)
    corpus = load_corpus(tmp_path, without=tmp_path / "src" / ".." / "output")
    names = {document.name.removesuffix(" (beginning)") for document in corpus.training}
    names |= {document.name.removesuffix(" (end)") for document in corpus.validation}
    assert names == {"a.py", os.path.join("src", "b.py")}  # noqa: PTH118


def test_a_folder_that_can_not_be_listed_is_named(tmp_path, monkeypatch):
    """Root may list every folder, so the system's answer is given in its place."""
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def deny(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    for path in (tmp_path, tmp_path / "locked"):
        with pytest.raises(CorpusError, match=r"locked can't be read \(Permission denied\)"):
            load_corpus(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"a\0b", "is not UTF-8 text"),
        (b"\xff\xfe\xfa", "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("inside_folder", [False, True])
def test_bad_files_are_named(content, message, inside_folder, tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(tmp_path if inside_folder else file)


def test_a_missing_path_and_a_folder_without_text_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"There is no .*nowhere"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"holds no text files.*\.py"):
        load_corpus(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text("x")
    file.chmod(0)
    with pytest.raises(CorpusError, match=r"secret\.txt can't be read"):
        load_corpus(file)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("text\n" * 20)
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    assert [document.name for document in load_corpus(tmp_path).training] == ["good.txt (beginning)"]
    with pytest.raises(CorpusError, match=r"link\.txt"):
        load_corpus(tmp_path / "link.txt")


def test_lengths_are_those_of_the_texts(standard_library):
    for document in standard_library.validation:
        assert len(document.text) == document.length


def test_without_a_share_nothing_is_held_out(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"text {index}\n" * 50)
    corpus = load_corpus(tmp_path, validation_share=0)
    assert [document.name for document in corpus.training] == ["0.txt", "1.txt", "2.txt"]
    assert not corpus.validation


def test_a_file_that_has_become_shorter_or_gone_is_named(tmp_path):
    file = tmp_path / "log.txt"
    file.write_text("line\n" * 100)
    (document,) = load_corpus(file).validation
    file.write_text("line\n")
    with pytest.raises(CorpusError, match=r"log\.txt has become shorter"):
        print(document.text)
    file.unlink()
    with pytest.raises(CorpusError, match=r"log\.txt can't be read"):
        print(document.text)
