"""Files and folders appear whole or not at all."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.training.files import put_in_place, written_whole


def test_a_file_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with written_whole(target) as path:
        path.write_text("half")
        assert not target.exists()
        path.write_text("whole")
    assert target.read_text() == "whole"
    assert [entry.name for entry in target.parent.iterdir()] == ["file.txt"]


def test_a_failure_leaves_no_folder_that_was_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "new" / "deeper" / "file.txt"
    with pytest.raises(OSError, match="disk"), written_whole(target):
        raise OSError("disk")
    assert not list((tmp_path / "there").iterdir())
    with pytest.raises(OSError, match="disk"), written_whole(target):
        (target.parent.parent / "of another.txt").touch()
        raise OSError("disk")
    assert [path.name for path in (tmp_path / "there" / "new").iterdir()] == ["of another.txt"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), written_whole(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file.txt", "before")]


def test_a_folder_appears_at_the_end_and_leftovers_of_a_killed_process_go(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(OSError, match="disk"), written_whole(target) as path:
        path.mkdir()
        (path / "part").write_text("half")
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
    leftover = tmp_path / "_unfinished-folder"
    leftover.mkdir()
    (leftover / "old").write_text("old")
    with written_whole(target) as path:
        path.mkdir()
        (path / "new").write_text("new")
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert not leftover.exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_get_the_mode_of_other_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        with written_whole(tmp_path / "model") as folder:
            folder.mkdir()
            save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
        with written_whole(tmp_path / "a.safetensors") as path:
            save_file({"a": torch.zeros(2)}, path)
    finally:
        os.umask(before)
    files = [*(tmp_path / "model").iterdir(), tmp_path / "a.safetensors"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


def make_content(place: Path) -> Path:
    content = place / "whole"
    content.mkdir(parents=True)
    for name in ("config.json", "report.json", "weights"):
        (content / name).write_text(f"new {name}")
    return content


def test_content_takes_the_place_of_a_folder_that_stays(tmp_path):
    output = tmp_path / "output"
    (output / "lost+found").mkdir(parents=True)
    (output / "report.json").write_text("old")
    (output / "stale").write_text("old")
    inode = output.stat().st_ino
    put_in_place(make_content(output / "_unfinished-work"), output, last="report.json")
    assert output.stat().st_ino == inode
    names = {"lost+found", "_unfinished-work", "config.json", "report.json", "weights"}
    assert {path.name for path in output.iterdir()} == names
    assert (output / "report.json").read_text() == "new report.json"


def test_content_becomes_a_folder_that_is_not_there(tmp_path):
    put_in_place(make_content(tmp_path / "work"), tmp_path / "output", last="report.json")
    assert len(list((tmp_path / "output").iterdir())) == 3


@pytest.mark.parametrize("moves", range(4))
def test_an_interrupted_move_is_ended_by_the_next_one(moves, tmp_path, monkeypatch):
    output, replace = tmp_path / "output", Path.replace
    output.mkdir()
    (output / "report.json").write_text("old")
    content = make_content(tmp_path / "work")
    left = iter(range(moves))

    def interrupt(self, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", interrupt)
        put_in_place(content, output, last="report.json")
    assert not (output / "report.json").exists()
    put_in_place(content, output, last="report.json")
    assert {path.name for path in output.iterdir()} == {"config.json", "report.json", "weights"}
    assert not list((tmp_path / "work").iterdir())


def test_a_home_folder_is_found_wherever_it_is_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == expanded(Path("~/x")) == "/home/me/x"
    assert [expanded(path) for path in ("gpt2", "a/~", "~no-such-user/x")] == ["gpt2", "a/~", "~no-such-user/x"]
