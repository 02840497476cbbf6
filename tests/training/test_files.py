"""Files and folders appear whole or not at all."""

import pytest

from entropy_gpt.training.files import written_whole


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
